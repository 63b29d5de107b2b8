"""jina-embeddings-v5-omni (2026), small and nano: texts, images, videos and sounds.

The language model is that of the v5 text models: Qwen3 (small, causal) or EuroBERT as Llama (nano, bidirectional).
"""

from dataclasses import replace
from typing import Any

import torch

from fundament.backbone.adapters import adapters_of, read_adapters
from fundament.backbone.checkpoint import Checkpoint, Config, Source
from fundament.backbone.device import Placement
from fundament.backbone.linear import Linear
from fundament.backbone.llama import IGNORED, LAYOUT, read_shape
from fundament.backbone.omni import Merger, OmniEmbedder, TaskParts
from fundament.backbone.omni_reader import Limits, Marks, OmniReader
from fundament.backbone.tokenizing import TextTokenizer
from fundament.backbone.towers.audio import load_audio_tower
from fundament.backbone.towers.images import check_processor, levels, read_processor
from fundament.backbone.towers.qwen3_vision import load_qwen3_vision
from fundament.backbone.towers.states import CAPACITY_BYTES
from fundament.backbone.transformer import Shape, Transformer, parameters
from fundament.catalog import ModelSpec
from fundament.errors import CheckpointError

LANGUAGE: dict[str, Source] = {
    name: tuple(f"language_model.{part}" for part in source)
    if isinstance(source, tuple)
    else f"language_model.{source}"
    for name, source in LAYOUT.items()
}

# The publisher's own code sets these.
IMAGE_PIXELS = (262_144, 1_310_720)
VIDEO_PIXELS = (131_072, 12_845_056)

_LANGUAGE = r"(model\.)?language_model\..*"
_VISION = r"(model\.)?(vision_tower|visual)\..*"
_AUDIO = r"(model\.)?audio_tower\..*"
_TASKS = r"(mergers|audio_projectors|task_token_embeddings)\..*"


def recognises(config: dict[str, Any]) -> bool:
    """Both sizes by their own name."""
    return config.get("model_type") == "jina_embeddings_v5_omni"


def kept_bytes(spec: ModelSpec) -> int:
    """What the towers made of files that may come again."""
    del spec  # all have one
    return CAPACITY_BYTES


def load(checkpoint: Checkpoint, spec: ModelSpec, placement: Placement) -> OmniEmbedder:
    """Language model, towers and the tasks' own parts, strictly.

    Raises:
        CheckpointError: the checkpoint does not fit, or its config asks for what is not served.
    """
    config = checkpoint.config
    vision, audio = (Config(config[key], f"{key} of {config.where}") for key in ("vision_config", "audio_config"))
    processor = read_processor(checkpoint)
    check_processor(processor)
    shape = read_language(config)
    weights = checkpoint.read(
        parameters(shape),
        LANGUAGE,
        placement,
        prefixes=("", "model."),
        ignored=rf"{_VISION}|{_AUDIO}|{_TASKS}|{IGNORED}",
    )
    adapters, places = read_adapters(checkpoint, spec, shape, LANGUAGE, placement)
    if len(adapters) != len(adapters_of(spec)):
        raise CheckpointError(f"{checkpoint.directory} has no adapters; get the whole repository")
    marks = read_marks(config)
    if (highest := max(marks.ids)) >= shape.vocab:
        raise CheckpointError(f"config.json names token {highest}, and text_config has {shape.vocab} tokens")
    known = torch.from_numpy(levels(processor["image_mean"], processor["image_std"]))
    tokenizer = TextTokenizer(checkpoint.directory, spec.context)
    limits = Limits(
        patch=vision["patch_size"],
        factor=vision["patch_size"] * vision["spatial_merge_size"],
        image=IMAGE_PIXELS,
        video=VIDEO_PIXELS,
    )
    return OmniEmbedder(
        tokenizer,
        Transformer(shape, weights, adapters),
        load_qwen3_vision(checkpoint, vision, known, placement, ignored=rf"(?!{_VISION}).*"),
        load_audio_tower(checkpoint, audio, placement, ignored=rf"(?!{_AUDIO}).*"),
        load_parts(checkpoint, places, shape.hidden, vision, audio, len(marks.special), placement),
        OmniReader(tokenizer, marks, limits, merge=vision["spatial_merge_size"], n_mels=audio["num_mel_bins"]),
        spec,
        places,
    )


def read_language(config: Config) -> Shape:
    """The language model that `text_config` describes; what it calls itself tells whether it is causal.

    Raises:
        CheckpointError: another architecture, or a setting that is not served.
    """
    text = Config(config["text_config"], f"text_config of {config.where}")
    shape = read_shape(text)
    match text["model_type"]:
        case "qwen3":
            if text.get("use_sliding_window"):
                raise CheckpointError(f"{text.where}: use_sliding_window is not served")
            return replace(shape, causal=True, qk_norm="head")
        case "llama" | "eurobert":
            return shape
        case other:
            raise CheckpointError(f"{text.where}: model_type '{other}' is not served; known are qwen3, llama, eurobert")


def read_marks(config: Config) -> Marks:
    """The tokens for media. The nano model has one for pictures of all kinds, and none around them."""
    nano = "image_token_index" in config
    image = config["image_token_index" if nano else "image_token_id"]
    return Marks(
        image=image,
        video=image if nano else config["video_token_id"],
        before_picture=None if nano else config["vision_start_token_id"],
        after_picture=None if nano else config["vision_end_token_id"],
        audio=config["audio_token_id"],
        before_audio=config["audio_start_token_id"],
        after_audio=config["audio_end_token_id"],
        timed=not nano,
        special=tuple(config["special_token_ids"]),
    )


def load_parts(
    checkpoint: Checkpoint,
    places: dict[str, int],
    hidden: int,
    vision: Config,
    audio: Config,
    n_marks: int,
    placement: Placement,
) -> list[TaskParts]:
    """What each task has of its own, in the order of the adapters.

    Raises:
        CheckpointError: parameters that are missing, unknown or of other shapes.
    """
    n_patch = vision["hidden_size"]
    wide = n_patch * vision["spatial_merge_size"] ** 2
    sizes: dict[str, tuple[int, ...]] = {}
    layout: dict[str, Source] = {}
    for task, place in places.items():
        stem, mine = task.replace("-", "_"), f"task{place}"
        sizes |= {
            f"{mine}_norm.weight": (n_patch,),
            f"{mine}_norm.bias": (n_patch,),
            f"{mine}_inner.weight": (wide, wide),
            f"{mine}_inner.bias": (wide,),
            f"{mine}_outer.weight": (hidden, wide),
            f"{mine}_outer.bias": (hidden,),
            f"{mine}_projector.weight": (hidden, audio["d_model"]),
            f"{mine}_projector.bias": (hidden,),
            f"{mine}_marks.weight": (n_marks, hidden),
        }
        marks = f"task_token_embeddings.{stem}"
        layout |= {
            f"{mine}_norm": f"mergers.{stem}.norm",
            f"{mine}_inner": f"mergers.{stem}.linear_fc1",
            f"{mine}_outer": f"mergers.{stem}.linear_fc2",
            f"{mine}_projector": f"audio_projectors.{stem}",
            f"{mine}_marks.weight": f"{marks}.weight" if checkpoint.has(f"{marks}.weight") else marks,
        }
    read = checkpoint.read(
        sizes,
        layout,
        placement,
        prefixes=("", "model."),
        ignored=rf"{_LANGUAGE}|{_VISION}|{_AUDIO}|{IGNORED}",
    )

    def linear(name: str) -> Linear:
        return Linear(read[f"{name}.weight"], read[f"{name}.bias"])

    return [
        TaskParts(
            Merger(
                (read[f"task{place}_norm.weight"], read[f"task{place}_norm.bias"]),
                linear(f"task{place}_inner"),
                linear(f"task{place}_outer"),
                wide,
            ),
            linear(f"task{place}_projector"),
            read[f"task{place}_marks.weight"],
        )
        for place in sorted(places.values())
    ]
