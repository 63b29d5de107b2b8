"""Token counts that Jina's own service recorded for jina-reranker-m0 and jina-embeddings-v4, with Qwen's vocabulary.

The counts are `usage` in the samples of the repository jina-ai/jina-sagemaker. They tell of the prompts around texts
and pictures. The vocabulary comes with a package of its makers, which is read and never imported.
"""

import base64
import importlib.util
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fundament.backbone.tokenizing import TextTokenizer
from fundament.backbone.vision_embedder import VisionEmbedder
from fundament.backbone.vision_ranker import VisionRanker
from fundament.catalog import CATALOG
from fundament.core import Embed, Item, Rerank
from tests.checkpoints import load
from tests.checkpoints.clip import picture, png
from tests.checkpoints.qwen_vl import HIDDEN, SPECIAL, qwen_vl

PACKAGE, RANKS = "dashscope", "resources/qwen.tiktoken"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What Qwen2's tokenizer divides texts into before bytes are merged."""


def read_ranks() -> dict[bytes, int]:
    """Qwen's 151,643 tokens and the order in which they are merged."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"the package {PACKAGE} is not installed; `make test` installs it")
    lines = (Path(found.submodule_search_locations[0]) / RANKS).read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that a token is merged of, by merging its bytes in the order of the ranks until two are left."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        places = range(len(parts) - 1)
        first = min(places, key=lambda place: ranks.get(parts[place] + parts[place + 1], len(ranks)))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def letters() -> list[str]:
    """How a vocabulary of bytes spells each of them: itself where it can be printed, else a letter beyond Latin-1."""
    spelled = sorted(pre_tokenizers.ByteLevel.alphabet())
    beyond = iter(letter for letter in spelled if ord(letter) > 255)
    return [chr(byte) if chr(byte) in spelled else next(beyond) for byte in range(256)]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    """Qwen2's, as its `tokenizer.json` has it."""
    ranks, spelling = read_ranks(), letters()

    def spelled(token: bytes) -> str:
        return "".join(spelling[byte] for byte in token)

    merges = [last_merge(token, ranks) for token in ranks if len(token) > 1]
    made = Tokenizer(
        models.BPE(
            {spelled(token): rank for token, rank in ranks.items()}, [(spelled(a), spelled(b)) for a, b in merges]
        )
    )
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return TextTokenizer(made, 32_768)


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory, tokenizer: TextTokenizer) -> VisionRanker:
    model = load(qwen_vl(tmp_path_factory.mktemp("m0"), "m0"), "qwen_vl", kind="reranker", context=10_240)
    assert isinstance(model, VisionRanker)
    model.prompt.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory, tokenizer: TextTokenizer) -> VisionEmbedder:
    spec = CATALOG["jina-embeddings-v4"]
    facts = {name: getattr(spec, name) for name in ("tasks", "default_task", "context", "modalities", "outputs")}
    model = load(qwen_vl(tmp_path_factory.mktemp("v4"), "v4"), "qwen_vl", dim=HIDDEN, **facts)
    assert isinstance(model, VisionEmbedder)
    model.prompt.tokenizer = model.text.tokenizer = tokenizer
    return model


def counts(items: Sequence[Item]) -> list[int]:
    return [item.n_counted for item in items]


def test_the_beginning_of_a_long_text_is_that_of_the_whole(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["Where's", "the", "dog", "2026?", "\n\n", "Naïve", "東京", "déjà", "🙂", "!?\n", "", "…", "x" * 30]
    draw, n_cut = random.Random(7), 0
    for _ in range(300):
        text = " ".join(draw.choices(words, k=200))
        most = draw.randrange(1, 60)
        monkeypatch.setattr(tokenizer, "context", most)
        monkeypatch.setattr("fundament.backbone.tokenizing._CHARACTERS_PER_TOKEN", 1 + draw.randrange(4))
        (found,) = tokenizer.encode([text])
        [whole] = tokenizer.pieces([text])
        assert found.ids.tolist() == whole[:most].tolist()
        assert found.truncated
        n_cut += not found.is_whole
    assert n_cut > 200


def test_a_text_is_its_tokens(tokenizer: TextTokenizer) -> None:
    text = "Where's the dog, 2026?\n  Naïve 東京 déjà 🙂"
    [ids] = tokenizer.pieces([text])
    assert tokenizer.text_of(ids) == text
    assert len(tokenizer.pieces(["the"])[0]) == len(tokenizer.pieces([" dog"])[0]) == 1


@pytest.mark.parametrize(
    ("query", "documents", "recorded"),
    [
        ("where is the dog?", ["I am a text", "The dog is right here!"], [18, 19]),
        ("where's the dog", ["the dog is in my house", "the cat looks good", "fish chips"], [19, 17, 15]),
        ("do you like cat", ["cash is king", "yes I do like cat", "morning"], [16, 18, 15]),
    ],
)
def test_pairs_of_texts_count_as_recorded(
    ranker: VisionRanker, query: str, documents: list[str], recorded: list[int]
) -> None:
    assert counts(ranker.prepare(Rerank(query=query, documents=documents))) == recorded


@pytest.mark.parametrize(("size", "recorded"), [((1200, 1600), 784), ((224, 224), 80)])
def test_a_picture_beside_a_text_counts_as_recorded(ranker: VisionRanker, size: tuple[int, int], recorded: int) -> None:
    call = Rerank(query="where is the dog?", documents=[png(picture(*size))])
    assert counts(ranker.prepare(call)) == [recorded]


@pytest.mark.parametrize(
    ("texts", "recorded"),
    [
        (["cash is king", "yes I do like cat", "morning"], 15),
        (["the dog is in my house", "the cat looks good", "fish chips"], 18),
    ],
)
def test_embedded_texts_count_as_recorded(embedder: VisionEmbedder, texts: list[str], recorded: int) -> None:
    assert sum(counts(embedder.prepare(Embed(inputs=texts, task="text-matching")))) == recorded
