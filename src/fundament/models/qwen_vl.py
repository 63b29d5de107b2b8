"""Qwen2.5-VL and Qwen2-VL: jina-embeddings-v4 and jina-reranker-m0 (Günther et al., 2025)."""

from dataclasses import replace
from typing import Any

import torch

from fundament.backbone.adapters import adapters_of
from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.device import Placement
from fundament.backbone.linear import Linear
from fundament.backbone.picture_prompt import Prompt, read_sizes
from fundament.backbone.task_adapters import read_task_adapters
from fundament.backbone.tokenizing import TextTokenizer
from fundament.backbone.towers.images import read_processor
from fundament.backbone.towers.states import CAPACITY_BYTES
from fundament.backbone.vision_embedder import VisionEmbedder
from fundament.backbone.vision_language import (
    LAYOUT,
    load_vision_language,
    read_language,
    read_tower_of,
)
from fundament.backbone.vision_ranker import Score, VisionRanker
from fundament.catalog import ModelSpec
from fundament.errors import CheckpointError

PROJECTOR, SCORE = "multi_vector_projector", "score"

# The reranker's own code sets these, whatever `preprocessor_config.json` says.
RANKED_PIXELS = (3_136, 602_112)


def recognises(config: dict[str, Any]) -> bool:
    """Both by the class that their config names, as their `model_type` is the base model's."""
    return bool({"JinaEmbeddingsV4Model", "JinaVLForRanking"} & set(config.get("architectures") or ()))


def kept_bytes(spec: ModelSpec) -> int:
    """What the towers made of files that may come again."""
    del spec  # all have one
    return CAPACITY_BYTES


def load(checkpoint: Checkpoint, spec: ModelSpec, placement: Placement) -> VisionEmbedder | VisionRanker:
    """The embedder or the reranker, as `architectures` says.

    Raises:
        CheckpointError: the checkpoint does not fit, or its config asks for what is not served.
    """
    ranks = "JinaVLForRanking" in checkpoint.config["architectures"]
    return load_ranker(checkpoint, spec, placement) if ranks else load_embedder(checkpoint, spec, placement)


def load_embedder(checkpoint: Checkpoint, spec: ModelSpec, placement: Placement) -> VisionEmbedder:
    """jina-embeddings-v4: three adapters, of the language model and of the layer that makes a vector per token.

    Raises:
        CheckpointError: the checkpoint does not fit.
    """
    config = checkpoint.config
    tower, (shape, _) = read_tower_of(checkpoint), read_language(config)
    tasks = adapters_of(spec)
    projected = (int(config["multi_vector_projector_dim"]), shape.hidden)
    adapters = read_task_adapters(checkpoint, tasks, shape, LAYOUT, (PROJECTOR, projected), placement)
    head = checkpoint.read(
        {"projector.weight": projected, "projector.bias": projected[:1]},
        {"projector": PROJECTOR},
        placement,
        ignored=rf"(?!{PROJECTOR}\.).*",
    )
    tokenizer = TextTokenizer(checkpoint.directory, spec.context)
    return VisionEmbedder(
        tokenizer,
        load_vision_language(checkpoint, placement, tower, adapters.layers, others=rf"{PROJECTOR}\..*"),
        Linear(head["projector.weight"], head["projector.bias"], adapters.head),
        read_prompt(checkpoint, tokenizer, pixels=None),
        spec,
        {task: place for place, task in enumerate(tasks)},
    )


def load_ranker(checkpoint: Checkpoint, spec: ModelSpec, placement: Placement) -> VisionRanker:
    """jina-reranker-m0: a head of two layers over the last token.

    Raises:
        CheckpointError: the checkpoint does not fit.
    """
    shape, _ = read_language(checkpoint.config)
    score = checkpoint.read(
        {
            "inner.weight": (shape.hidden, shape.hidden),
            "inner.bias": (shape.hidden,),
            "outer.weight": (1, shape.hidden),
            "outer.bias": (1,),
        },
        {"inner": f"{SCORE}.0", "outer": f"{SCORE}.2"},
        replace(placement, dtype=torch.float32),
        ignored=rf"(?!{SCORE}\.).*",
    )
    tokenizer = TextTokenizer(checkpoint.directory, spec.context)
    return VisionRanker(
        load_vision_language(checkpoint, placement, read_tower_of(checkpoint), others=rf"{SCORE}\..*"),
        Score((score["inner.weight"], score["inner.bias"]), (score["outer.weight"], score["outer.bias"])),
        read_prompt(checkpoint, tokenizer, pixels=RANKED_PIXELS),
        spec,
    )


def read_prompt(checkpoint: Checkpoint, tokenizer: TextTokenizer, *, pixels: tuple[int, int] | None) -> Prompt:
    """How pictures stand among tokens: their ids as `config.json` says, their sizes as the processor's file does.

    Raises:
        CheckpointError: an id or a limit that neither says.
    """
    config, (shape, _) = checkpoint.config, read_language(checkpoint.config)
    processor = read_processor(checkpoint)
    start, stop, pad = (config[f"{name}_token_id"] for name in ("vision_start", "vision_end", "image"))
    if (highest := max(start, stop, pad)) >= shape.vocab:
        raise CheckpointError(f"config.json names token {highest}, and the language model has {shape.vocab} tokens")
    return Prompt(
        tokenizer,
        start=start,
        stop=stop,
        pad=pad,
        sizes=read_sizes(processor, read_tower_of(checkpoint), pixels=pixels),
    )
