"""Tiny jina-embeddings-v5-omni-small and -nano: language model, both towers, and what each task has of its own."""

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniAudioEncoderConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from tests.checkpoints import llama, qwen, random_tensors

Size = Literal["small", "nano"]

HIDDEN, MELS = 32, 16
MARKS = ("vision_start", "vision_end", "image", "video", "audio_start", "audio", "audio_end")
IDS = {mark: llama.VOCAB + place for place, mark in enumerate(MARKS)}
SPECIAL: dict[Size, list[int]] = {"small": [*IDS.values()], "nano": [IDS[m] for m in MARKS if m.startswith(("a", "i"))]}

VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_heads": 2,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "in_channels": 3,
    "num_position_embeddings": 49,
    "deepstack_visual_indexes": [],
    "out_hidden_size": HIDDEN,
    "hidden_act": "gelu_pytorch_tanh",
}
AUDIO: dict[str, Any] = {
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "num_mel_bins": MELS,
    "n_window": 50,
    "output_dim": HIDDEN,
    "activation_function": "gelu",
}


def text_config(size: Size) -> dict[str, Any]:
    if size == "small":
        return qwen.QWEN3 | {"vocab_size": llama.VOCAB + len(MARKS)}
    kept = {key: value for key, value in qwen.QWEN3.items() if "sliding" not in key and "window" not in key}
    return kept | {
        "model_type": "llama",
        "head_dim": 8,
        "num_key_value_heads": 4,
        "vocab_size": llama.VOCAB + len(MARKS),
        "max_position_embeddings": 4096,
    }


def config(size: Size) -> dict[str, Any]:
    ids = {f"audio{part}_token_id": IDS[f"audio{part}"] for part in ("", "_start", "_end")}
    if size == "nano":
        ids["image_token_index"] = IDS["image"]
    else:
        ids |= {"image_token_id": IDS["image"], "video_token_id": IDS["video"]}
        ids |= {f"{mark}_token_id": IDS[mark] for mark in ("vision_start", "vision_end")}
    return {
        "architectures": ["JinaEmbeddingsV5OmniModel"],
        "model_type": "jina_embeddings_v5_omni",
        "text_config": text_config(size),
        "vision_config": VISION,
        "audio_config": AUDIO,
        "task_names": list(llama.ADAPTERS),
        "special_token_ids": SPECIAL[size],
        "projector_hidden_act": "gelu",
        "modality": "omni",
        **ids,
    }


@cache
def language(size: Size) -> dict[str, Tensor]:
    """The language model's weights, bare."""
    return llama.tensors(text_config(size), qk_norm=size == "small", seed=3)


def network(size: Size, task: str) -> nn.Module:
    """transformers' language model with a task's adapter merged in."""
    told = {key: value for key, value in text_config(size).items() if key not in ("architectures", "model_type")}
    made: nn.Module = Qwen3Model(Qwen3Config(**told)) if size == "small" else LlamaModel(LlamaConfig(**told))
    terms = llama.adapter(text_config(size), rank=4, seed=1 + llama.ADAPTERS.index(task))
    made.load_state_dict(llama.merged(language(size), terms, 6 / 4), strict=True)
    return made.eval()


@cache
def vision_network() -> Qwen3VLVisionModel:
    """transformers' tower; its own merger is not used."""
    made = Qwen3VLVisionModel(Qwen3VLVisionConfig(**VISION)).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    made.load_state_dict(random_tensors(shapes, seed=4), strict=True)
    return made


@cache
def audio_network() -> Qwen2_5OmniAudioEncoder:
    """transformers' tower without its last layer."""
    made = Qwen2_5OmniAudioEncoder(Qwen2_5OmniAudioEncoderConfig(**AUDIO)).eval()
    made.proj = nn.Identity()
    shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    made.load_state_dict(random_tensors(shapes, seed=5), strict=True)
    return made


@cache
def parts(size: Size) -> dict[str, Tensor]:
    """What each task has of its own, in the file's names."""
    wide, inner = 4 * VISION["hidden_size"], VISION["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {}
    for task in llama.ADAPTERS:
        stem = task.replace("-", "_")
        shapes |= {
            f"mergers.{stem}.norm.weight": (inner,),
            f"mergers.{stem}.norm.bias": (inner,),
            f"mergers.{stem}.linear_fc1.weight": (wide, wide),
            f"mergers.{stem}.linear_fc1.bias": (wide,),
            f"mergers.{stem}.linear_fc2.weight": (HIDDEN, wide),
            f"mergers.{stem}.linear_fc2.bias": (HIDDEN,),
            f"audio_projectors.{stem}.weight": (HIDDEN, AUDIO["d_model"]),
            f"audio_projectors.{stem}.bias": (HIDDEN,),
            f"task_token_embeddings.{stem}": (len(SPECIAL[size]), HIDDEN),
        }
    return random_tensors(shapes, seed=6)


def omni(directory: Path, size: Size, *, tower: str = "vision_tower", marks: str = "") -> Path:
    """A checkpoint of either size.

    Args:
        directory: where it goes.
        size: which of the two.
        tower: what the names of the vision tower begin with.
        marks: what the names of the tasks' embeddings end with: nothing or `.weight`.
    """
    vision = {name: t for name, t in vision_network().state_dict().items() if not name.startswith("merger")}
    named = {f"language_model.{name}": tensor for name, tensor in language(size).items()}
    named |= {f"{tower}.{name}": tensor for name, tensor in vision.items()}
    named |= {f"audio_tower.{name}": tensor for name, tensor in audio_network().state_dict().items()}
    named |= {f"{name}{marks if 'token_emb' in name else ''}": tensor for name, tensor in parts(size).items()}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(size)))
    told = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16, "merge_size": 2}
    (directory / "preprocessor_config.json").write_text(json.dumps(told))
    llama.tokenizer(ends=True).save(str(directory / "tokenizer.json"))
    save_file({name: tensor.contiguous() for name, tensor in named.items()}, directory / "model.safetensors")
    for task in llama.ADAPTERS:
        terms = llama.adapter(text_config(size), rank=4, seed=1 + llama.ADAPTERS.index(task))
        deep = {name.replace("model.layers", "model.language_model.layers"): t for name, t in terms.items()}
        llama.save_adapter(directory, task, deep, r=4, lora_alpha=6)
    return directory


def embeddings(size: Size, task: str, ids: Tensor) -> Tensor:
    """The embeddings of tokens, those of the marks the task's own."""
    table = language(size)["embed_tokens.weight"].clone()
    table[SPECIAL[size]] = parts(size)[f"task_token_embeddings.{task.replace('-', '_')}"]
    return table[ids]


def last_state(made: nn.Module, embedded: Tensor, *, causal: bool) -> Tensor:
    """The state of the last token."""
    n = len(embedded)
    with torch.inference_mode():
        mask = None if causal else torch.zeros(1, 1, n, n)
        return made(inputs_embeds=embedded[None], attention_mask=mask).last_hidden_state[0, -1]
