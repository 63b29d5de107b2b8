"""Tiny EuroBERT and jina-embeddings-v5-text-nano checkpoints as their publishers lay them out."""

import torch
from torch import Tensor
from transformers import EuroBertConfig, EuroBertModel

from tests.checkpoints.llama import ADAPTERS, VOCAB, Config

EUROBERT: Config = {
    "architectures": ["EuroBertForMaskedLM"],
    "model_type": "eurobert",
    "attention_bias": False,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 250000.0,
    "rope_scaling": None,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
    "pad_token_id": VOCAB - 1,
}
V5_NANO: Config = EUROBERT | {
    "architectures": ["JinaEmbeddingsV5Model"],
    "model_type": "jina_embeddings_v5",
    "task_names": list(ADAPTERS),
    "is_decoder": False,
    "rope_theta": 1000000.0,
    "auto_map": {"AutoModel": "modeling_jina_embeddings_v5.JinaEmbeddingsV5Model"},
}


def network(config: Config, state: dict[str, Tensor]) -> torch.nn.Module:
    """transformers' own class on the same weights."""
    dropped = ("auto_map", "model_type", "architectures", "is_decoder")
    made = EuroBertModel(EuroBertConfig(**{key: value for key, value in config.items() if key not in dropped}))
    made.load_state_dict(state, strict=True)
    return made.eval()
