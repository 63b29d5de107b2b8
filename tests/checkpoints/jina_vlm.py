"""A tiny jina-vlm: its publishers' nested config, tensor names and processor's file, tokens behind the vocabulary."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from tests.checkpoints import random_tensors, save

TURNS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "the"), ("Ċ", "Ċ")]
ADDED = ["<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>", "<im_slice>"]
VOCAB = 256 + len(TURNS) + len(MERGES)
MORE = 16
END, EOS = 257, 258
HIDDEN, N_LAYERS, HEADS, KV_HEADS, HEAD_DIM, INNER, EPS, THETA = 64, 2, 4, 2, 16, 96, 1e-6, 1e6
SEEN, SEEN_LAYERS, SEEN_HEADS, SEEN_INNER, PROJECTED = 32, 10, 2, 48, 40
SIDE, PATCH, MARGIN, MOST_TILES = 98, 14, 2, 6
READ = [-4, -10]

TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% for part in message.content -%}
{%- if part.type == 'image' -%}{{ image_prompt_token }}{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""


def tokenizer() -> Tokenizer:
    """Bytes and a few merges; the tokens of pictures have the ids behind all others."""
    vocabulary = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {token: 256 + i for i, token in enumerate(TURNS)}
    vocabulary |= {a + b: 256 + len(TURNS) + i for i, (a, b) in enumerate(MERGES)}
    made = Tokenizer(models.BPE(vocabulary, MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in (*TURNS, *ADDED)])
    return made


def config() -> dict[str, Any]:
    """`config.json`, as nested as published."""
    plain = {"eps": EPS, "type": "default", "with_affine": True, "bias": True}
    rms = {"eps": EPS, "type": "rms", "with_affine": True, "bias": False}
    return {
        "architectures": ["JinaVLMForConditionalGeneration"],
        "model_type": "jvlm",
        "auto_map": {"AutoModelForCausalLM": "modeling_jvlm.JinaVLMForConditionalGeneration"},
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "jvlm",
            "hidden_size": HIDDEN,
            "n_layers": N_LAYERS,
            "vocab_size": VOCAB,
            "embedding_size": VOCAB,
            "additional_vocab_size": MORE,
            "max_sequence_length": 4096,
            "rope": True,
            "rope_theta": THETA,
            "block_config": {
                "attn_config": {
                    "n_heads": HEADS,
                    "n_kv_heads": KV_HEADS,
                    "head_dim": HEAD_DIM,
                    "q_lnorm": True,
                    "k_lnorm": True,
                    "qkv_lnorm_on_heads": True,
                    "lnorm_config": rms,
                    "sliding_window": -1,
                },
                "ffn_config": {"activation_type": "silu", "gated_activation": True, "size": INNER, "bias": False},
                "lnorm_config": rms,
            },
        },
        "vision_config": {
            "model_type": "jvlm",
            "hidden_size": SEEN,
            "input_size": [SIDE, SIDE],
            "patch_size": PATCH,
            "n_channels": 3,
            "n_layers": SEEN_LAYERS,
            "output_size": HIDDEN,
            "linear_patch_embedding": True,
            "patch_embedding_bias": True,
            "use_absolute_positional_embeddings": True,
            "use_cls_token": False,
            "pre_lnorm": False,
            "post_lnorm": True,
            "vit_layers": READ,
            "block_config": {
                "attn_config": {
                    "n_heads": SEEN_HEADS,
                    "n_kv_heads": None,
                    "head_dim": SEEN // SEEN_HEADS,
                    **dict.fromkeys(("q_bias", "k_bias", "v_bias", "o_bias"), True),
                },
                "ffn_config": {
                    "activation_type": "gelu_pytorch_tanh",
                    "gated_activation": False,
                    "size": SEEN_INNER,
                    "bias": True,
                },
                "lnorm_config": plain,
            },
            "vl_connector_config": {
                "attn_pooling_config": {
                    "n_heads": SEEN_HEADS,
                    "n_kv_heads": None,
                    "head_dim": SEEN // SEEN_HEADS,
                    "o_bias": True,
                },
                "mlp_projector_config": {"activation_type": "silu", "gated_activation": True, "size": PROJECTED},
                "padding_embed_type": "pad_and_partial_pad",
                "pooling_type": "attention_meanq",
                "pooling_h": 2,
                "pooling_w": 2,
                "projector_type": "mlp",
            },
        },
    }


PROCESSOR: dict[str, Any] = {
    "image_processor_type": "JinaVLMImageProcessor",
    "cropping_method": "overlap-and-resize",
    "normalization_method": "minmax",
    "image_min": -1.0,
    "image_max": 1.0,
    "interpolation": "bilinear",
    "max_crops": MOST_TILES,
    "base_input_size": [SIDE, SIDE],
    "patch_size": PATCH,
    "overlap_margins": [MARGIN, MARGIN],
    "use_column_tokens": True,
    "pooling_h": 2,
    "pooling_w": 2,
    "token_length_h": 4,
    "token_length_w": 4,
    "min_pixels": 3136,
    "max_pixels": 1_003_520,
}


def tensors() -> dict[str, Tensor]:
    """Random weights in the file's names."""
    language, vision, pooling = "model.language_model.", "model.vision_model.", "model.vision_model.vl_connector."
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        f"{language}embedding.embedding": (VOCAB, HIDDEN),
        f"{language}embedding.new_embedding": (MORE, HIDDEN),
        f"{language}ln_f.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
        f"{vision}patch_embed.proj.weight": (SEEN, 3 * PATCH**2),
        f"{vision}patch_embed.proj.bias": (SEEN,),
        f"{vision}pos_embed": ((SIDE // PATCH) ** 2, SEEN),
        f"{vision}post_lnorm.weight": (SEEN,),
        f"{vision}post_lnorm.bias": (SEEN,),
        f"{pooling}pad_embed": (2, 2 * SEEN),
        f"{pooling}pooling.q_w.weight": (SEEN, 2 * SEEN),
        f"{pooling}pooling.kv_w.weight": (2 * SEEN, 2 * SEEN),
        **{f"{pooling}pooling.{part}_b": (SEEN,) for part in "qkv"},
        f"{pooling}pooling.out.weight": (SEEN, SEEN),
        f"{pooling}pooling.out.bias": (SEEN,),
        f"{pooling}projector.up.weight": (2 * PROJECTED, SEEN),
        f"{pooling}projector.down.weight": (HIDDEN, PROJECTED),
    }
    for i in range(N_LAYERS):
        layer = f"{language}layers.{i}."
        shapes |= {
            f"{layer}attn_lnorm.weight": (HIDDEN,),
            f"{layer}ffn_lnorm.weight": (HIDDEN,),
            f"{layer}attn.qkv_w.weight": (q + 2 * kv, HIDDEN),
            f"{layer}attn.q_lnorm.weight": (HEAD_DIM,),
            f"{layer}attn.k_lnorm.weight": (HEAD_DIM,),
            f"{layer}attn.out.weight": (HIDDEN, q),
            f"{layer}ffn.up.weight": (2 * INNER, HIDDEN),
            f"{layer}ffn.down.weight": (HIDDEN, INNER),
        }
    for i in range(SEEN_LAYERS):
        layer = f"{vision}layers.{i}."
        shapes |= {f"{layer}{name}_lnorm.{kind}": (SEEN,) for name in ("attn", "ffn") for kind in ("weight", "bias")}
        shapes |= {f"{layer}attn.{part}_b": (SEEN,) for part in "qkv"}
        shapes |= {
            f"{layer}attn.qkv_w.weight": (3 * SEEN, SEEN),
            f"{layer}attn.out.weight": (SEEN, SEEN),
            f"{layer}attn.out.bias": (SEEN,),
            f"{layer}ffn.up.weight": (SEEN_INNER, SEEN),
            f"{layer}ffn.up.bias": (SEEN_INNER,),
            f"{layer}ffn.down.weight": (SEEN, SEEN_INNER),
            f"{layer}ffn.down.bias": (SEEN,),
        }
    return random_tensors(shapes, seed=12)


def jina_vlm(
    directory: Path, *, processor: dict[str, Any] | None = None, template: str = TEMPLATE, zeros: bool = False
) -> Path:
    """A checkpoint.

    Args:
        directory: where it goes.
        processor: keys of `preprocessor_config.json` that differ.
        template: the chat template.
        zeros: the language model's biases are there, as zeros.
    """
    found = tensors()
    if zeros:
        widths = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
        found |= {
            f"model.language_model.layers.{i}.attn.{part}_b": torch.zeros(width)
            for i in range(N_LAYERS)
            for part, width in widths.items()
        }
    save(directory, config(), found, tokenizer())
    (directory / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | (processor or {})))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": TURNS[2]}))
    (directory / "chat_template.jinja").write_text(template)
    return directory
