"""Tiny jina-reranker-v3 and Qwen3-Reranker checkpoints as their publishers lay them out."""

from datetime import date
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from fundament.catalog import ModelSpec
from fundament.core import Ranking, Rerank
from fundament.engine.loading import load_model
from fundament.engine.local import finish
from fundament.engine.weights import Local
from tests.checkpoints import qwen, save
from tests.checkpoints.llama import Config, tensors
from tests.conftest import FLOAT32

DIM = 12  # of the projector's output
INNER = 20

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<|embed_token|>",
    "<|rerank_token|>",
]
SPLIT = (  # Qwen's own
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


WORDS = (  # what merges into one token; Ċ is a line's end
    "yes",
    "no",
    "Ġthe",
    "Ġrelevance",
    "Ġrelevant",
    "Ġpassage",
    "Ġpassages",
    "Ġquery",
    "Ġquestion",
    "Ġdetermine",
    "Ġinstruction",
    "Ġnumerical",
    "Ġidentifier",
    "Ġprovided",
    "Ġdocument",
    "Ġanswer",
    "Ġintent",
    "Ġsatisfies",
    "Ġbased",
    "Ġhow",
    "Ġcan",
    "Ġof",
    "Document",
    "Instruct",
    "passage",
    "query",
    "system",
    "user",
    "assistant",
    ">Ċ",
    "ĊĊ",
    ":Ċ",
    "?Ċ",
    '">Ċ',
    "</",
)


def tokenizer() -> Tokenizer:
    """Qwen's kind: bytes and some words, also marks with line ends behind them, special tokens, no post-processor."""
    merges = list(dict.fromkeys((word[:i], word[i]) for word in WORDS for i in range(1, len(word))))
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    made = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return made


BACKBONE: Config = qwen.QWEN3 | {"vocab_size": tokenizer().get_vocab_size(), "max_position_embeddings": 8192}
LISTWISE: Config = BACKBONE | {
    "architectures": ["JinaForRanking"],
    "auto_map": {"AutoModel": "modeling.JinaForRanking"},
    "sliding_window": None,
}
HYBRID: Config = LISTWISE | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "use_sliding_window": True,
    "sliding_window": 40,
}
GENERATIVE: Config = BACKBONE | {"architectures": ["Qwen3ForCausalLM"]}


def weights(config: Config, *, projector: bool = False, head: bool = False) -> dict[str, Tensor]:
    """The tensors of a config in their public names."""
    found = {f"model.{name}": tensor for name, tensor in tensors(config, qk_norm=True).items()}
    draw = torch.Generator().manual_seed(9)
    if projector:
        found["projector.0.weight"] = torch.randn(INNER, config["hidden_size"], generator=draw)
        found["projector.2.weight"] = torch.randn(DIM, INNER, generator=draw)
    if head:
        found["lm_head.weight"] = torch.randn(config["vocab_size"], config["hidden_size"], generator=draw)
    return found


def write(directory: Path, config: Config, **has: bool) -> Path:
    """A model directory."""
    return save(directory, config, weights(config, **has), tokenizer())


def load(directory: Path, family: str, *, context: int = 100_000, placement: Any = FLOAT32) -> Any:
    """The directory as a reranker."""
    spec = ModelSpec(
        id="tiny",
        family=family,
        kind="reranker",
        name="Tiny",
        released=date(2026, 1, 1),
        licence="x",
        context=context,
        dim=DIM if family == "listwise" else 0,
    )
    return load_model(Local(spec, directory), placement)


def rank(model: Any, call: Rerank) -> Ranking:
    """A call in a batch of its own."""
    items = model.prepare(call)
    found: Ranking = finish(model, call, items, model.forward(items))
    return found


def _own_config(config: Config) -> Qwen3Config:
    return Qwen3Config(**{key: value for key, value in config.items() if key not in ("auto_map", "architectures")})


def states(config: Config, found: dict[str, Tensor], ids: list[int]) -> Tensor:
    """transformers' states of one row after its last norm, `[tokens, hidden]`."""
    made = Qwen3Model(_own_config(config))
    bare = {name.removeprefix("model."): tensor for name, tensor in found.items() if name.startswith("model.")}
    made.load_state_dict(bare, strict=True)
    with torch.inference_mode():
        state: Tensor = made.eval()(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return state


def language_model(config: Config, found: dict[str, Tensor]) -> Qwen3ForCausalLM:
    """transformers' language model."""
    made = Qwen3ForCausalLM(_own_config(config))
    tied = {"lm_head.weight": found["model.embed_tokens.weight"]} if config["tie_word_embeddings"] else {}
    made.load_state_dict({**tied, **found}, strict=True)
    language: Qwen3ForCausalLM = made.eval()
    return language
