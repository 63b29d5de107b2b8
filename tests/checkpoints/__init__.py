"""Tiny random checkpoints as publishers lay them out: file names, config keys, tensor names, tokenizers."""

import json
import string
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from fundament.backbone.device import Placement
from fundament.catalog import ModelSpec
from fundament.core import Embed, Model, Ranking, Rerank
from fundament.engine.loading import load_model
from fundament.engine.local import finish
from fundament.engine.weights import Local

T = TypeVar("T")

WORDS = ["the", "search", "engine", "finds", "what", "people", "mean", "naïve", "東京", "déjà", "🙂", "tokenization"]


def texts(lengths: list[int]) -> list[str]:
    """One text of each number of words, the same ones every time."""
    generator = np.random.default_rng(7)
    return [" ".join(generator.choice(WORDS, n)) for n in lengths]


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Numbers of a size at which every tensor shows in the result: norms around one, matrices that keep the scale."""
    generator = torch.Generator().manual_seed(seed)

    def one(name: str, shape: tuple[int, ...]) -> Tensor:
        numbers = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            return 1.5 * numbers / shape[-1] ** 0.5
        return 0.3 * numbers + float(name.endswith("weight"))

    return {name: one(name, shape) for name, shape in shapes.items()}


def save(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    *,
    pooling: str | None = None,
    pickled: bool = False,
) -> Path:
    """Write a model directory: config, weights, tokenizer, and sentence-transformers' pooling where one is named."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(directory / "tokenizer.json"))
    if pooling:
        (directory / "1_Pooling").mkdir(exist_ok=True)
        (directory / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    if pickled:
        torch.save(dict(tensors), directory / "pytorch_model.bin")
    else:
        save_file(dict(tensors), directory / "model.safetensors")
    return directory


def resave(directory: Path, *, config: Mapping[str, Any] | None = None, **tensors: Tensor | None) -> Path:
    """Change config keys and tensors of a directory in place; None takes a tensor away."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(config or {})))
    kept = {name: t for name, t in (load_file(directory / "model.safetensors") | tensors).items() if t is not None}
    save_file(kept, directory / "model.safetensors")
    return directory


def load(
    directory: Path,
    family: str,
    *,
    context: int = 512,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **facts: Any,
) -> Model[Any, Any]:
    """Load a directory as a model of that family; `facts` are the catalogue's that differ."""
    config = json.loads((directory / "config.json").read_text())
    entry = {"id": "tiny", "name": "Tiny", "dim": config.get("d_model") or config.get("hidden_size", 0), **facts}
    spec = ModelSpec(family=family, released=date(2024, 1, 1), licence="Apache-2.0", context=context, **entry)
    return load_model(Local(spec, directory), Placement(torch.device(device), dtype))


def embed(model: Model, inputs: list[str]) -> Tensor:
    """The vectors of some texts, `[texts, dim]`, cut to the context."""
    call = Embed(inputs=inputs, truncate=True)
    items = model.prepare(call)
    return torch.from_numpy(finish(model, call, items, model.forward(items)).vectors)


def assert_same_alone(
    run: Callable[[list[T]], Sequence[Tensor]], rows: list[T], *, atol: float = 1e-5, rtol: float = 1e-5
) -> None:
    """Each row alone becomes what it becomes in the company of the others, wherever it stands among them."""
    for row, among in zip(rows, run(rows), strict=True):
        torch.testing.assert_close(run([row])[0], among, atol=atol, rtol=rtol)


def rank(model: Model, query: str, documents: Sequence[str], **fields: Any) -> Ranking:
    """What a reranker makes of a query and documents, every row in one batch."""
    call = Rerank(query=query, documents=documents, **fields)
    items = model.prepare(call)
    made = finish(model, call, items, model.forward(items))
    assert isinstance(made, Ranking)
    return made


def word_piece(special: Sequence[str] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")) -> Tokenizer:
    """BERT's kind: lower case, pieces of words, the third of the special tokens before a text and the fourth behind."""
    pieces = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase), "the", "##ing", "search"]
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate([*special, *pieces])}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.post_processor = processors.BertProcessing((special[3], 3), (special[2], 2))
    return tokenizer


def byte_bpe() -> Tokenizer:
    """RoBERTa's kind: bytes and a few merges, `<s> … </s>`."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "the")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate([*special, *pieces])}, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def unigram(
    special: Sequence[str] = ("<s>", "<pad>", "</s>", "<unk>"),
    single: str = "<s> $A </s>",
    pair: str = "<s> $A </s> </s> $B </s>",
) -> Tokenizer:
    """XLM-RoBERTa's kind and T5's: SentencePiece's pieces with their scores, special tokens around or behind."""
    pieces = ["▁", *string.ascii_lowercase, "▁the", "▁what", "search", "ing", "東", "京"]
    scores = [*((token, 0.0) for token in special), *((piece, -1.0 - 0.1 * i) for i, piece in enumerate(pieces))]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=special.index("<unk>"), byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in [*special, "<mask>"]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(token, special.index(token)) for token in single.split() if token in special],
    )
    return tokenizer
