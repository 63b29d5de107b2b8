"""Tiny jina-clip-v1 and jina-clip-v2: both towers in one file, and what the processor is told."""

import io
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fundament.core import Media
from tests.checkpoints import random_tensors, save, unigram, word_piece

Version = Literal["v1", "v2"]

WIDTH, HEAD, LAYERS, PATCH = 64, 32, 2, 14
IMAGE = 60  # no multiple of a patch, as 512 is none of 14
MLP = int(WIDTH * 2.6667)
RANK, ALPHA = 4, 6
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
PREFIX = "Represent the query for retrieving evidence documents: "

VISION: dict[str, Any] = {
    "model_type": "jina_clip_vision",
    "embed_dim": WIDTH,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "width": WIDTH,
    "layers": LAYERS,
    "head_width": HEAD,
    "mlp_ratio": 2.6667,
    "patch_dropout": 0.1,
    "qkv_bias": True,
    "rope_embeddings": True,
    "pt_hw_seq_len": 16,
    "intp_freq": True,
    "naive_swiglu": True,
    "subln": True,
    "x_attention": True,
    "post_norm": False,
    "ls_init_value": None,
    "proj_type": None,
}

SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


def vision_tensors() -> dict[str, Tensor]:
    """Random weights of the image tower, without a prefix."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + (IMAGE // PATCH) ** 2, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    for i in range(LAYERS):
        block = f"blocks.{i}"
        for name, size in (("norm1", WIDTH), ("norm2", WIDTH), ("attn.inner_attn_ln", WIDTH), ("mlp.ffn_ln", MLP)):
            shapes |= {f"{block}.{name}.weight": (size,), f"{block}.{name}.bias": (size,)}
        shapes |= {f"{block}.attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkv"}
        shapes |= {f"{block}.attn.{part}_bias": (WIDTH,) for part in "qv"}
        for name, n_out, n_in in (("attn.proj", WIDTH, WIDTH), ("mlp.w1", MLP, WIDTH), ("mlp.w2", MLP, WIDTH)):
            shapes |= {f"{block}.{name}.weight": (n_out, n_in), f"{block}.{name}.bias": (n_out,)}
        shapes |= {f"{block}.mlp.w3.weight": (WIDTH, MLP), f"{block}.mlp.w3.bias": (WIDTH,)}
    return random_tensors(shapes, seed=1)


def text_tensors(version: Version, vocab: int) -> dict[str, Tensor]:
    """Random weights of a text tower in the flash names, before any adapter."""
    inner = SIZES["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocab, WIDTH),
        "embeddings.token_type_embeddings.weight": (1 if version == "v2" else 2, WIDTH),
        "emb_ln.weight": (WIDTH,),
        "emb_ln.bias": (WIDTH,),
    }
    for i in range(SIZES["num_hidden_layers"]):
        layer = f"encoder.layers.{i}"
        linears = [("mixer.Wqkv", 3 * WIDTH, WIDTH), ("mixer.out_proj", WIDTH, WIDTH)]
        if version == "v2":
            linears += [("mlp.fc1", inner, WIDTH), ("mlp.fc2", WIDTH, inner)]
        else:
            linears += [("mlp.wo", WIDTH, inner)]
            shapes[f"{layer}.mlp.gated_layers.weight"] = (2 * inner, WIDTH)
        for name, n_out, n_in in linears:
            shapes |= {f"{layer}.{name}.weight": (n_out, n_in), f"{layer}.{name}.bias": (n_out,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"{layer}.{name}.weight": (WIDTH,), f"{layer}.{name}.bias": (WIDTH,)}
    return random_tensors(shapes, seed=2)


def terms(base: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of the one adapter of each linear layer and table."""
    draw, found = torch.Generator().manual_seed(3), {}
    for name, weight in base.items():
        if weight.ndim == 2:
            sizes = ((len(weight), RANK), (RANK, weight.shape[1]))
            if "embeddings" not in name:
                sizes = ((RANK, weight.shape[1]), (len(weight), RANK))
            found[name.removesuffix(".weight")] = tuple(torch.randn(1, *size, generator=draw) * 0.4 for size in sizes)
    return found  # type: ignore[return-value]


def merged_text(vocab: int) -> dict[str, Tensor]:
    """The weights of the text tower of v2 with its adapter added, by hand."""
    base = text_tensors("v2", vocab)
    for stem, (a, b) in terms(base).items():
        product = a[0] @ b[0] if "embeddings" in stem else b[0] @ a[0]
        base[f"{stem}.weight"] = base[f"{stem}.weight"] + ALPHA / RANK * product
    return base


def clip(directory: Path, version: Version = "v2", **told: Any) -> Path:
    """A checkpoint of either version; `told` are keys of `hf_model_config_kwargs` that differ."""
    tokenizer = unigram() if version == "v2" else word_piece()
    vocab = tokenizer.get_vocab_size()
    tensors = {f"vision_model.{name}": tensor for name, tensor in vision_tensors().items()}
    base = text_tensors(version, vocab)
    if version == "v2":
        woven = dict(base)
        for stem, (a, b) in terms(base).items():
            woven[f"{stem}.parametrizations.weight.original"] = woven.pop(f"{stem}.weight")
            woven |= {f"{stem}.parametrizations.weight.0.lora_A": a, f"{stem}.parametrizations.weight.0.lora_B": b}
        tensors |= {f"text_model.transformer.roberta.{name}": tensor for name, tensor in woven.items()}
        lora = {"lora_adaptations": ["retrieval.query"], "lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout_p": 0}
        told = SIZES | {"vocab_size": vocab} | lora | told
    else:
        tensors |= {f"text_model.transformer.{name}": tensor for name, tensor in base.items()}
        told = SIZES | {"vocab_size": vocab} | told
    tensors["logit_scale"] = torch.tensor(2.66)
    vision = VISION | ({} if version == "v2" else {"pt_hw_seq_len": IMAGE // PATCH, "intp_freq": False})
    config = {
        "architectures": ["JinaCLIPModel"],
        "model_type": "jina_clip",
        "add_projections": False,
        "logit_scale_init_value": 2.6592,
        "projection_dim": WIDTH,
        "text_config": {
            "model_type": "jina_clip_text",
            "embed_dim": WIDTH,
            "hf_model_name_or_path": "jinaai/jina-embeddings-v3",
            "hf_model_config_kwargs": told,
            "pooler_type": "mean_pooler",
            "proj_type": None,
            "proj_bias": False,
        },
        "vision_config": vision,
    }
    processor = {
        "image_processor_type": "JinaCLIPImageProcessor",
        "processor_class": "JinaCLIPProcessor",
        "size": IMAGE,
        "mean": MEAN,
        "std": STD,
        "resize_mode": "shortest",
        "interpolation": "bicubic",
        "fill_color": 0,
    }
    save(directory, config, tensors, tokenizer)
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return directory


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """A picture with edges and slopes, so that filters and crops show."""
    draw = np.random.default_rng([seed, height, width])
    coarse = draw.integers(0, 256, (-(-height // 5), -(-width // 5), 3), dtype=np.uint8)
    fine = draw.integers(0, 40, (height, width, 3), dtype=np.uint8)
    blocks = coarse.repeat(5, axis=0).repeat(5, axis=1)[:height, :width]
    return np.asarray(np.maximum(blocks, 40) - fine, dtype=np.uint8)


def png(pixels: NDArray[np.uint8]) -> Media:
    """A picture as a caller sends it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return Media("image", file.getvalue())
