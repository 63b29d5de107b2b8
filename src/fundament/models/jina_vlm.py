"""jina-vlm (Koukounas et al., 2025): SigLIP2's tower over tiles, pooled by attention, and Qwen3 for the language."""

from typing import Any

from fundament.backbone.cached import CachedDecoder
from fundament.backbone.chat_template import ChatTemplate, read_chat_template
from fundament.backbone.checkpoint import Checkpoint, Config, Part, Source
from fundament.backbone.device import Placement
from fundament.backbone.linear import Linear, read_activation
from fundament.backbone.picture_writer import ChatTokens, PictureWriter
from fundament.backbone.tokenizing import TextTokenizer
from fundament.backbone.towers.images import PROCESSOR, read_processor
from fundament.backbone.towers.tile_vision import TileShape, TileVision, head_parameters, layers_read
from fundament.backbone.towers.tiles import read_tiles
from fundament.backbone.transformer import Shape, Transformer, parameters
from fundament.catalog import ModelSpec
from fundament.errors import CheckpointError

ARCHITECTURE = "JinaVLMForConditionalGeneration"

PICTURE = "<|image|>"
MARKS = ("<im_patch>", "<im_col>", "<im_start>", "<im_end>")
"""A picture's tokens, in the order of the numbers in `tiles`."""
OTHERS = ("<im_slice>",)
TURN_END = "<|im_end|>"

LANGUAGE, VISION, HEAD = "model.language_model.", "model.vision_model.", "lm_head"

_BLOCK: dict[str, Source] = {
    "layers.{i}.qkv.weight": "layers.{i}.attn.qkv_w.weight",
    "layers.{i}.qkv.bias": ("layers.{i}.attn.q_b", "layers.{i}.attn.k_b", "layers.{i}.attn.v_b"),
    "layers.{i}.out": "layers.{i}.attn.out",
    "layers.{i}.attention_norm": "layers.{i}.attn_lnorm",
    "layers.{i}.mlp_norm": "layers.{i}.ffn_lnorm",
    "layers.{i}.down": "layers.{i}.ffn.down",
}
LANGUAGE_LAYOUT: dict[str, Source] = {
    "final_norm": "ln_f",
    "tokens.weight": ("embedding.embedding", "embedding.new_embedding"),
    **_BLOCK,
    "layers.{i}.q_norm": "layers.{i}.attn.q_lnorm",
    "layers.{i}.k_norm": "layers.{i}.attn.k_lnorm",
    "layers.{i}.up": Part("layers.{i}.ffn.up", 0, 2),
    "layers.{i}.gate": Part("layers.{i}.ffn.up", 1, 2),
}
VISION_LAYOUT: dict[str, Source] = {
    "patches": "patch_embed.proj",
    "positions.weight": "pos_embed",
    **_BLOCK,
    "layers.{i}.up": "layers.{i}.ffn.up",
    "final_norm": "post_lnorm",
    "pads.weight": "vl_connector.pad_embed",
    "pool_q.weight": "vl_connector.pooling.q_w.weight",
    "pool_q.bias": "vl_connector.pooling.q_b",
    "pool_kv.weight": "vl_connector.pooling.kv_w.weight",
    "pool_kv.bias": ("vl_connector.pooling.k_b", "vl_connector.pooling.v_b"),
    "pool_out": "vl_connector.pooling.out",
    "up": Part("vl_connector.projector.up", 0, 2),
    "gate": Part("vl_connector.projector.up", 1, 2),
    "down": "vl_connector.projector.down",
}

# Settings of the publishers' classes that are served in one way only, and what they are where a config is silent.
_BLOCK_SETTINGS = {"postnorm": False, "attn_lscale_init": None, "ffn_lscale_init": None}
_ATTENTION_SETTINGS = {
    **dict.fromkeys(("v_lnorm", "o_lnorm", "inner_lnorm"), False),
    "sliding_window": -1,
    "softmax_scale": None,
    "clip_qkv": None,
}


def recognises(config: dict[str, Any]) -> bool:
    """By the class or the `model_type`, which are its publishers' own."""
    return ARCHITECTURE in (config.get("architectures") or ()) or config.get("model_type") == "jvlm"


def load(checkpoint: Checkpoint, spec: ModelSpec, placement: Placement) -> PictureWriter:
    """Tower, connector, language model and head, strictly.

    Raises:
        CheckpointError: the checkpoint does not fit, or its config asks for what is not served.
    """
    vision, tiles = read_vision(checkpoint), read_tiles(read_processor(checkpoint))
    language = read_language(checkpoint)
    if (tiles.patches, tiles.cell) != (vision.side, vision.cell) or 3 * tiles.patch**2 != vision.patch:
        raise CheckpointError(f"{PROCESSOR} cuts pictures otherwise than config.json says that the tower reads them")
    if vision.out != language.hidden:
        raise CheckpointError(f"pictures' states have {vision.out} numbers, the language model's {language.hidden}")
    transformer = Transformer(
        language,
        checkpoint.read(
            parameters(language),
            LANGUAGE_LAYOUT,
            placement,
            prefixes=(LANGUAGE,),
            ignored=rf"(?!{LANGUAGE}).*",
        ),
    )
    tower = checkpoint.read(
        parameters(vision.layers) | head_parameters(vision),
        VISION_LAYOUT,
        placement,
        prefixes=(VISION,),
        ignored=rf"({LANGUAGE}|{HEAD}\.).*",
    )
    tokenizer = TextTokenizer(checkpoint.directory, spec.context)
    tokens = read_tokens(checkpoint, tokenizer, language.vocab)
    return PictureWriter(
        tokenizer,
        read_template(checkpoint, tokenizer, tokens),
        tokens,
        tiles,
        TileVision(vision, tower),
        CachedDecoder(transformer),
        read_head(checkpoint, language, placement),
    )


def read_language(checkpoint: Checkpoint) -> Shape:
    """The language model of `text_config`: Qwen3's, with added tokens behind the vocabulary.

    Raises:
        CheckpointError: a setting that is not served.
    """
    told = Config(checkpoint.config["text_config"], "text_config of config.json")
    attention, inner, norm = _block(told)
    usual = {"partial_rotary_factor": 1.0, "rope_scaling": None}
    _check(told, {"rope": True, "normalize_input_embeds": False, **usual}, usual)
    _check(attention, {"q_lnorm": True, "k_lnorm": True, "qkv_lnorm_on_heads": True, "o_bias": False}, {})
    _check(inner, {"gated_activation": True, "bias": False, "inner_lnorm": False}, {"gated_activation": True})
    _check(norm, {"type": "rms"}, {})
    if (attention.get("lnorm_config") or norm).get("eps", norm["eps"]) != norm["eps"]:
        raise CheckpointError(f"{attention.where}: norms of heads with an eps of their own are not served")
    if checkpoint.config.get("tie_word_embeddings"):
        raise CheckpointError("config.json: tie_word_embeddings is not served")
    return Shape(
        vocab=(told.get("embedding_size") or told["vocab_size"]) + told["additional_vocab_size"],
        hidden=told["hidden_size"],
        intermediate=inner["size"],
        n_layers=told["n_layers"],
        n_heads=attention["n_heads"],
        n_kv_heads=attention.get("n_kv_heads") or attention["n_heads"],
        head_dim=attention["head_dim"],
        norm="rms",
        norm_eps=norm["eps"],
        pre_norm=True,
        positions="rotary",
        rope_theta=float(told["rope_theta"]),
        causal=True,
        # The publishers' class has these biases as parameters of zeros where the model has none.
        qkv_bias=f"{LANGUAGE}layers.0.attn.q_b" in checkpoint.names,
        out_bias=False,
        qk_norm="head",
        gated=True,
        activation=read_activation(inner["activation_type"]),
        up_bias=False,
        down_bias=False,
    )


def read_vision(checkpoint: Checkpoint) -> TileShape:
    """The tower and the connector of `vision_config`.

    Raises:
        CheckpointError: a setting that is not served.
    """
    told = Config(checkpoint.config["vision_config"], "vision_config of config.json")
    attention, inner, norm = _block(told)
    served = {"use_cls_token": False, "pre_lnorm": False, "post_lnorm": True, "n_channels": 3}
    always = {"linear_patch_embedding": True, "patch_embedding_bias": True, "use_absolute_positional_embeddings": True}
    _check(told, {**served, **always}, {**always, "n_channels": 3})
    _check(attention, {"q_lnorm": False, "k_lnorm": False, "o_bias": True}, {})
    _check(inner, {"gated_activation": False, "bias": True, "inner_lnorm": False}, {})
    _check(norm, {"type": "default"}, {"type": "default"})
    connector = Config(told["vl_connector_config"], "vl_connector_config of config.json")
    kinds = {"pooling_type": "attention_meanq", "padding_embed_type": "pad_and_partial_pad", "projector_type": "mlp"}
    _check(connector, kinds, {"projector_type": "mlp"})
    pooling = Config(connector["attn_pooling_config"], "attn_pooling_config of config.json")
    projector = Config(connector["mlp_projector_config"], "mlp_projector_config of config.json")
    n_heads = attention["n_heads"]
    shared = [each for each in (attention, pooling) if each.get("n_kv_heads") not in (None, each["n_heads"])]
    if shared or connector["pooling_h"] != connector["pooling_w"]:
        raise CheckpointError(f"{connector.where}: shared heads and cells that are no squares are not served")
    _check(pooling, {"o_bias": True, **_ATTENTION_SETTINGS}, _ATTENTION_SETTINGS)
    _check(projector, {"gated_activation": True, "bias": False, "activation_type": "silu"}, {})
    height, width = told["input_size"]
    side, rest = divmod(height, told["patch_size"])
    if height != width or rest:
        raise CheckpointError(f"{told.where}: input_size {height} x {width} is no square of patches")
    layers = Shape(
        vocab=0,
        hidden=told["hidden_size"],
        intermediate=inner["size"],
        n_layers=told["n_layers"],
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=attention["head_dim"],
        norm="layer",
        norm_eps=norm["eps"],
        pre_norm=True,
        n_positions=side**2,
        activation=read_activation(inner["activation_type"]),
    )
    return TileShape(
        layers=layers,
        patch=3 * told["patch_size"] ** 2,
        side=side,
        cell=connector["pooling_h"],
        read=layers_read(told["vit_layers"], layers.n_layers),
        n_heads=pooling["n_heads"],
        head_dim=pooling["head_dim"],
        pooled=layers.hidden,
        inner=projector["size"],
        out=told["output_size"],
    )


def read_head(checkpoint: Checkpoint, language: Shape, placement: Placement) -> Linear:
    """From states of the language model to scores of tokens; those that were added behind the others may have none.

    Raises:
        CheckpointError: there is none, or it scores tokens that have no embedding.
    """
    name = f"{HEAD}.weight"
    n_scores = checkpoint.shape(name)[0] if name in checkpoint.names else 0
    if n_scores > language.vocab:
        raise CheckpointError(f"{name} scores {n_scores} tokens, and there are embeddings of {language.vocab}")
    read = checkpoint.read(
        {"head.weight": (n_scores, language.hidden)},
        {"head": HEAD},
        placement,
        ignored=rf"(?!{HEAD}\.).*",
    )
    return Linear(read["head.weight"])


def read_tokens(checkpoint: Checkpoint, tokenizer: TextTokenizer, n_embeddings: int) -> ChatTokens:
    """The ids with a meaning; all of them must have embeddings.

    Raises:
        CheckpointError: one that is missing, or that is no token of the language model.
    """
    told = checkpoint.json("tokenizer_config.json", default={})
    generation = checkpoint.json("generation_config.json", default={})
    ends = generation.get("eos_token_id") or checkpoint.config.get("eos_token_id") or ()
    last = {ends} if isinstance(ends, int) else set(ends)
    last |= {found for found in (tokenizer.id_of(TURN_END),) if found is not None}
    first = next((_token(told[key]) for key in ("bos_token", "eos_token") if told.get(key)), None)
    first_id = None if first is None else tokenizer.id_of(first)
    found = {mark: tokenizer.id_of(mark) for mark in (PICTURE, *MARKS)}
    if missing := [mark for mark, number in found.items() if number is None]:
        raise CheckpointError(f"tokenizer.json lacks {', '.join(missing)}")
    if first_id is None or not last:
        raise CheckpointError("tokenizer_config.json and config.json do not say which tokens begin and end a text")
    patch, column, start, stop = (found[mark] or 0 for mark in MARKS)
    if (highest := max(first_id, *last, patch, column, start, stop, tokenizer.n_vocab - 1)) >= n_embeddings:
        raise CheckpointError(f"there is a token {highest}, and the language model has {n_embeddings} embeddings")
    return ChatTokens(first_id, frozenset(last), (patch, column, start, stop))


def read_template(checkpoint: Checkpoint, tokenizer: TextTokenizer, tokens: ChatTokens) -> ChatTemplate:
    """The checkpoint's chat template.

    Raises:
        CheckpointError: there is none, or it does not read pictures.
    """
    processor = checkpoint.json("processor_config.json", default={})
    return ChatTemplate(
        read_chat_template(checkpoint),
        picture=PICTURE,
        marks=[*tokenizer.special_tokens(), PICTURE, *MARKS, *OTHERS],
        always_start_with_space=processor.get("always_start_with_space", False),
        bos_token=tokenizer.token_of(tokens.first),
        eos_token=tokenizer.token_of(min(tokens.last)),
    )


def _block(told: Config) -> tuple[Config, Config, Config]:
    """The settings of a layer's attention, its MLP and its norms."""
    block = Config(told["block_config"], f"block_config in {told.where}")
    _check(block, _BLOCK_SETTINGS, _BLOCK_SETTINGS)
    attention, inner, norm = (
        Config(block[key], f"{key} in {told.where}") for key in ("attn_config", "ffn_config", "lnorm_config")
    )
    _check(attention, _ATTENTION_SETTINGS, _ATTENTION_SETTINGS)
    return attention, inner, norm


def _check(told: Config, served: dict[str, Any], usual: dict[str, Any]) -> None:
    """Refuse settings that are not served; `usual` is what the publishers' classes do where they are left out.

    Raises:
        CheckpointError: with all of them.
    """
    asked = {key: told.get(key, usual.get(key, False)) for key in served}
    if others := {key: value for key, value in asked.items() if value != served[key]}:
        raise CheckpointError(f"{told.where} asks for what is not served: {others}")


def _token(told: str | dict[str, Any]) -> str:
    return told if isinstance(told, str) else str(told["content"])
