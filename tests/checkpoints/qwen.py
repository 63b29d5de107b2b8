"""Tiny Qwen2, Qwen3 and jina-embeddings-v5-text-small checkpoints as their publishers lay them out."""

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2Model, Qwen3Config, Qwen3Model

from tests.checkpoints.llama import ADAPTERS, VOCAB, Config, tensors

QWEN2: Config = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 512,
    "max_window_layers": 2,
    "sliding_window": 4,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "vocab_size": VOCAB,
}
QWEN3: Config = QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "attention_bias": False,
}
V5_SMALL: Config = QWEN3 | {
    "architectures": ["JinaEmbeddingsV5Model"],
    "model_type": "jina_embeddings_v5",
    "task_names": list(ADAPTERS),
    "rope_theta": 3500000.0,
    "auto_map": {"AutoModel": "modeling_jina_embeddings_v5.JinaEmbeddingsV5Model"},
}


def weights(config: Config) -> dict[str, Tensor]:
    """The tensors of a config: Qwen2 has q/k/v biases, Qwen3 has q/k norms."""
    qwen2 = config["model_type"] == "qwen2"
    return tensors(config, qkv_bias=qwen2, qk_norm=not qwen2)


def network(config: Config, state: dict[str, Tensor]) -> torch.nn.Module:
    """transformers' own class on the same weights."""
    plain = {key: value for key, value in config.items() if key not in ("auto_map", "model_type", "architectures")}
    if config["model_type"] == "qwen2":
        made: torch.nn.Module = Qwen2Model(Qwen2Config(**plain))
    else:
        made = Qwen3Model(Qwen3Config(**plain))
    made.load_state_dict(state, strict=True)
    return made.eval()
