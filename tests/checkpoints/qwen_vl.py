"""Tiny jina-embeddings-v4 and jina-reranker-m0: the older tensor names, adapters in one file, Qwen's kind of tokens."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2VLConfig, Qwen2VLModel

from tests.checkpoints import random_tensors, save

Kind = Literal["v4", "m0"]

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|endoftext|>"]
TASKS = ("retrieval", "text-matching", "code")
HIDDEN, VOCAB, PROJECTED, RANK, ALPHA = 64, 280, 12, 4, 6
LEAST, MOST = 3136, 28 * 28 * 24
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]

TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "vocab_size": VOCAB,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "use_sliding_window": False,
    "bos_token_id": 261,
    "eos_token_id": 261,
}
VISION: dict[Kind, dict[str, Any]] = {
    "v4": {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    },
    "m0": {"depth": 2, "embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2, "num_heads": 2},
}
for told in VISION.values():
    told.update({"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3})

IDS = {"vision_start_token_id": 258, "vision_end_token_id": 259, "image_token_id": 260, "video_token_id": 261}

LINEARS = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)


def tokenizer() -> Tokenizer:
    """Qwen's kind: bytes and a few merges, no special tokens around a text."""
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "the"), ("Ċ", "Ċ")]
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    vocabulary |= {token: 256 + i for i, token in enumerate(SPECIAL)}
    vocabulary |= {a + b: 262 + i for i, (a, b) in enumerate(merges)}
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return made


def config(kind: Kind) -> dict[str, Any]:
    """`config.json`: nested for v4, flat for m0, as published."""
    rope = {"mrope_section": [2, 3, 3]}
    if kind == "m0":
        return {
            "architectures": ["JinaVLForRanking"],
            "model_type": "qwen2_vl",
            "rope_scaling": {"type": "mrope", **rope},
            "vision_config": VISION[kind],
            "tie_word_embeddings": False,
            **TEXT,
            **IDS,
        }
    return {
        "architectures": ["JinaEmbeddingsV4Model"],
        "model_type": "qwen2_5_vl",
        "auto_map": {"AutoModel": "modeling_jina_embeddings_v4.JinaEmbeddingsV4Model"},
        "text_config": {**TEXT, "rope_scaling": {"rope_type": "default", "type": "default", **rope}},
        "vision_config": VISION[kind],
        "single_vector_pool_strategy": "mean",
        "multi_vector_projector_dim": PROJECTED,
        "task_names": list(TASKS),
        "truncate_dim": None,
        "tie_word_embeddings": True,
        **IDS,
    }


def network(kind: Kind, state: dict[str, Tensor] | None = None) -> nn.Module:
    """transformers' own class, on weights in the file's names."""
    told = {key: value for key, value in config(kind).items() if key not in ("architectures", "model_type", "auto_map")}
    made: nn.Module = Qwen2VLModel(Qwen2VLConfig(**told)) if kind == "m0" else Qwen2_5_VLModel(Qwen2_5_VLConfig(**told))
    if state is not None:
        made.load_state_dict({_inside(name): tensor for name, tensor in state.items()}, strict=True)
    return made.eval()


def _inside(name: str) -> str:
    return name if name.startswith("visual.") else name.replace("model.", "language_model.", 1)


def tensors(kind: Kind) -> dict[str, Tensor]:
    """Random weights of both towers in the file's names."""
    shapes = {
        name.replace("language_model.", "model.", 1): tuple(tensor.shape)
        for name, tensor in network(kind).state_dict().items()
    }
    return random_tensors(shapes, seed=4)


def head(kind: Kind) -> dict[str, Tensor]:
    """What lies beside the towers."""
    if kind == "v4":
        shapes: dict[str, tuple[int, ...]] = {
            "multi_vector_projector.weight": (PROJECTED, HIDDEN),
            "multi_vector_projector.bias": (PROJECTED,),
        }
    else:
        shapes = {
            "score.0.weight": (HIDDEN, HIDDEN),
            "score.0.bias": (HIDDEN,),
            "score.2.weight": (1, HIDDEN),
            "score.2.bias": (1,),
            "lm_head.weight": (VOCAB, HIDDEN),
        }
    return random_tensors(shapes, seed=5)


def terms(task: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of a task, by the name of the linear layer."""
    base = tensors("v4") | head("v4")
    draw = torch.Generator().manual_seed(10 + TASKS.index(task))
    stems = [f"model.layers.{i}.{part}" for i in range(TEXT["num_hidden_layers"]) for part in LINEARS]
    found = {}
    for stem in [*stems, "multi_vector_projector"]:
        n_out, n_in = base[f"{stem}.weight"].shape
        found[stem] = (
            torch.randn(RANK, n_in, generator=draw) * 0.3,
            torch.randn(n_out, RANK, generator=draw) * 0.3,
        )
    return found


def merged(task: str) -> dict[str, Tensor]:
    """All weights with a task's adapter added, by hand."""
    found = tensors("v4") | head("v4")
    for stem, (a, b) in terms(task).items():
        found[f"{stem}.weight"] = found[f"{stem}.weight"] + ALPHA / RANK * b @ a
    return found


def adapter_file(directory: Path, found: dict[str, Tensor]) -> None:
    """Write a folder as PEFT does."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(found, directory / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "bias": "none",
        "target_modules": "(.*(model).*(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj).*$|.*(projector).*$)",
        "exclude_modules": ".*visual.*",
        "lora_dropout": 0.1,
        "task_type": "FEATURE_EXTRACTION",
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))


def qwen_vl(
    directory: Path,
    kind: Kind,
    *,
    newer_names: bool = False,
    folders: bool = False,
    processor: dict[str, Any] | None = None,
) -> Path:
    """A checkpoint of either model.

    Args:
        directory: where it goes.
        kind: which of the two.
        newer_names: `model.language_model.…` and `model.visual.…`, as transformers saves since 4.52.
        folders: a folder per task in place of one file of all adapters.
        processor: keys of `preprocessor_config.json` that differ; None takes one away.
    """

    def named(name: str) -> str:
        if not newer_names:
            return name
        return f"model.{_inside(name)}" if name.startswith(("model.", "visual.")) else name

    found = {named(name): tensor for name, tensor in (tensors(kind) | head(kind)).items()}
    save(directory, config(kind), found, tokenizer())
    told = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": LEAST,
        "max_pixels": MOST,
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": MEAN,
        "image_std": STD,
    }
    told |= processor or {}
    kept = {key: value for key, value in told.items() if value is not None}
    (directory / "preprocessor_config.json").write_text(json.dumps(kept))
    if kind == "v4" and folders:
        for task in TASKS:
            parts = {
                f"base_model.model.{stem}.lora_{side}.weight": tensor
                for stem, ab in terms(task).items()
                for side, tensor in zip("AB", ab, strict=True)
            }
            adapter_file(directory / "adapters" / task, parts)
    elif kind == "v4":
        inner = "model.language_model." if newer_names else "model."
        adapter_file(
            directory / "adapters",
            {
                f"base_model.model.{stem.replace('model.', inner, 1)}.lora_{side}.{task}.weight": tensor
                for task in TASKS
                for stem, ab in terms(task).items()
                for side, tensor in zip("AB", ab, strict=True)
            },
        )
    return directory
