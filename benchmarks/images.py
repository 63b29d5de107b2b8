"""Images per second of models that read images, beside a plain loop over the same random weights.

python benchmarks/images.py                     jina-clip-v2's image tower and jina-embeddings-v4, whole
python benchmarks/images.py --layers 2          with fewer layers, to see that it runs

Both sides decode the same JPEG files and end with one vector each. The plain loops run in a process of their own, as
anybody's program would. With `THP_MEM_ALLOC_ENABLE=1` in its environment, which PyTorch reads before this program could
set it, ours has huge pages as in `fundament serve`; they never have. The plain loop of clip is EVA02 as its publisher's
code computes it without xformers: scores, softmax and mix, one after the other, in the better of batches of one and
four. The same with PyTorch's fused attention stands beside it. The plain loop of v4 is transformers' class and
processor, image by image.

On a GPU with `--device cuda`. Either way the share of the device's measured matrix rate is printed beside: the
operations of the plain loop's products, in the time that ours takes for as many images.
"""

import argparse
import asyncio
import io
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2VLImageProcessorPil

import corpus
from contest import machine, matrix_rate, n_cores, rounds, table, verdict
from direct import batcher_of, effort, through
from fundament.backbone.checkpoint import Checkpoint, Weights
from fundament.backbone.device import Placement, place
from fundament.backbone.linear import Linear
from fundament.backbone.resources import use_cores
from fundament.backbone.tokenizing import TextTokenizer
from fundament.backbone.towers.eva02 import EVA02, THETA, read_shape, reordered, stored
from fundament.backbone.towers.images import PROCESSOR, levels
from fundament.backbone.towers.vision import grid_rotation
from fundament.backbone.transformer import Shape
from fundament.backbone.vision_embedder import AFTER, BEFORE, VisionEmbedder
from fundament.backbone.vision_language import load_vision_language, read_tower_of
from fundament.catalog import CATALOG
from fundament.core import Array, Embed, Media, Model
from fundament.engine.loading import load_model
from fundament.engine.local import batch_tokens_of, threads_of
from fundament.models.clip import ClipEmbedder
from fundament.models.qwen_vl import read_prompt

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZE, PATCH, GRID = 512, 14, 36
CLIP = {
    "image_size": SIZE,
    "patch_size": PATCH,
    "width": 1024,
    "head_width": 64,
    "mlp_ratio": 2.6667,
    "intp_freq": True,
    "pt_hw_seq_len": 16,
}
TEXT = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 11008,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
VISION = {
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "window_size": 112,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
IDS = {"vision_start_token_id": 151_652, "vision_end_token_id": 151_653, "image_token_id": 151_655}

FUSED = "fused attention"

Side = Callable[[Sequence[bytes]], list[Tensor]]


def files(n: int) -> list[bytes]:
    """JPEG files of photographs' sizes; what they show is noise, smoothed."""
    draw, found = np.random.default_rng(0), []
    for number in range(n):
        size = ((640, 480), (480, 640), (800, 600), (500, 500))[number % 4]
        small = Image.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize(size, Image.Resampling.BICUBIC).save(file, "jpeg")
        found.append(file.getvalue())
    return found


@contextmanager
def ours(model: Model, runner: asyncio.Runner, placement: Placement) -> Iterator[Side]:
    """The model behind the engine's threads, as a server has it; they and their helpers end with the block."""
    on_cpu = placement.device.type == "cpu"
    batcher = batcher_of(
        model,
        n_threads=threads_of(model.n_bytes, n_cores()) if on_cpu else 1,
        max_batch_tokens=batch_tokens_of(model.n_bytes, on_cpu=on_cpu),
    )

    def run(images: Sequence[bytes]) -> list[Tensor]:
        items = model.prepare(Embed(inputs=[Media("image", image) for image in images]))
        arrays, _ = runner.run(through(batcher, items))
        return [torch.from_numpy(array) for array in arrays]

    yield run
    batcher.close()


def decoded(image: bytes) -> Image.Image:
    return Image.open(io.BytesIO(image)).convert("RGB")


def eva02_weights(placement: Placement, n_layers: int | None) -> dict[str, Tensor]:
    """Random ones of jina-clip-v2's image tower, the same in every process."""
    draw = torch.Generator().manual_seed(0)
    weights = {}
    for name, size in stored(eva02_shape(n_layers), GRID**2, PATCH).items():
        numbers = torch.randn(size, generator=draw) / (size[-1] ** 0.5 if len(size) > 1 else 10)
        weights[name] = (numbers + float("norm.weight" in name)).to(placement.device, placement.dtype)
    return weights


def eva02_shape(n_layers: int | None) -> Shape:
    """The published one, or with fewer layers."""
    return read_shape(CLIP | {"layers": n_layers or 24})


def clip(placement: Placement, n_layers: int | None) -> Model:
    """jina-clip-v2 with a random image tower."""
    shape, weights = eva02_shape(n_layers), eva02_weights(placement, n_layers)
    known = torch.from_numpy(levels(MEAN, STD))
    tower = EVA02(shape, reordered(shape, Weights(weights, weights.__getitem__)), known, grid=GRID, grid_trained=16)
    text = load_model(corpus.model(), placement)
    return ClipEmbedder(text, tower, size=SIZE, patch=PATCH)  # type: ignore[arg-type]


def plain_clip(placement: Placement, n_layers: int | None) -> dict[str, Side]:
    """The plain loops over the same tower."""
    shape, weights = eva02_shape(n_layers), eva02_weights(placement, n_layers)
    plain = partial(plain_eva02, weights, n_layers=shape.n_layers, n_heads=shape.n_heads)
    kinds = {"plain": plain_attention, FUSED: F.scaled_dot_product_attention}
    return {
        f"{kind}, {n} at a time": partial(plain, batch=n, attention=attention)
        for kind, attention in kinds.items()
        for n in (1, 4)
    }


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention step by step, `[images, heads, tokens, head_dim]`."""
    return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1) @ v


def plain_eva02(
    weights: Mapping[str, Tensor],
    images: Sequence[bytes],
    *,
    n_layers: int,
    n_heads: int,
    batch: int,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> list[Tensor]:
    """EVA02 in PyTorch's own layers, on batches of equal images."""
    like = weights["cls.weight"]
    steps = torch.arange(GRID, dtype=torch.float32) / GRID * 16
    cosines, sines = grid_rotation(torch.cartesian_prod(steps, steps).to(like.device), 64, THETA, like.dtype)
    cosines, sines = (
        part.transpose(0, 1).chunk(2, dim=-1)[1].repeat_interleave(2, dim=-1) for part in (cosines, sines)
    )

    def turned(x: Tensor) -> Tensor:
        rest = x[:, :, 1:]
        half = torch.stack((-rest[..., 1::2], rest[..., ::2]), dim=-1).flatten(-2)
        return torch.cat((x[:, :, :1], rest * cosines + half * sines), dim=2)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    found: list[Tensor] = []
    for first in range(0, len(images), batch):
        pixels = torch.stack([processed(decoded(image), SIZE) for image in images[first : first + batch]]).to(like)
        with torch.inference_mode():
            patches = F.conv2d(pixels, weights["patches.weight"], weights["patches.bias"], PATCH).flatten(2).mT
            x = torch.cat((weights["cls.weight"].expand(len(pixels), 1, -1), patches), dim=1) + weights["table.weight"]
            for i in range(n_layers):
                layer = f"layers.{i}"
                y = norm(x, f"{layer}.attention_norm")
                q, k, v = (linear(y, f"{layer}.{part}").unflatten(-1, (n_heads, -1)).transpose(1, 2) for part in "qkv")
                mixed = attention(turned(q), turned(k), v).transpose(1, 2).flatten(2)
                x = x + linear(norm(mixed, f"{layer}.mixed_norm"), f"{layer}.out")
                y = norm(x, f"{layer}.mlp_norm")
                inner = F.silu(linear(y, f"{layer}.gate")) * linear(y, f"{layer}.up")
                x = x + linear(norm(inner, f"{layer}.up_norm"), f"{layer}.down")
            found += norm(x, "final_norm")[:, 0].float().cpu().unbind()
    return found


def processed(image: Image.Image, size: int) -> Tensor:
    """An image as float32 `[3, size, size]`."""
    width, height = image.size
    short = min(width, height)
    wide, tall = (size if side == short else int(size * side / short) for side in (width, height))
    left, top = round((wide - size) / 2), round((tall - size) / 2)
    square = image.resize((wide, tall), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    numbers = torch.from_numpy(np.array(square)).permute(2, 0, 1).float().div(255)
    return (numbers - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def write_v4(placement: Placement, n_layers: int | None, scratch: Path) -> None:
    """A checkpoint of jina-embeddings-v4's shape without its adapters, of random weights."""
    depth = n_layers or 32
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"num_hidden_layers": n_layers or 36},
        vision_config=VISION | {"depth": depth, "fullatt_block_indexes": [i for i in range(depth) if i % 8 == 7]},
        **IDS,
    )
    torch.manual_seed(0)
    dtype_before = torch.get_default_dtype()
    torch.set_default_dtype(placement.dtype)
    Qwen2_5_VLModel(config).save_pretrained(scratch)
    torch.set_default_dtype(dtype_before)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 3_136, "longest_edge": 602_112}).save_pretrained(scratch)
    assert (scratch / PROCESSOR).exists()


def v4(placement: Placement, scratch: Path) -> Model:
    """The checkpoint as it is served."""
    checkpoint = Checkpoint(scratch)
    spec = replace(CATALOG["jina-embeddings-v4"], tasks={})
    tokenizer = TextTokenizer(corpus.model().directory, spec.context)
    return VisionEmbedder(
        tokenizer,
        load_vision_language(checkpoint, placement, read_tower_of(checkpoint), others="(?!)"),
        Linear(torch.zeros(128, TEXT["hidden_size"]).to(placement.device, placement.dtype)),  # type: ignore[call-overload]
        read_prompt(checkpoint, tokenizer, pixels=None),
        spec,
        {},
    )


def plain_v4(placement: Placement, scratch: Path) -> dict[str, Side]:
    """Transformers' class and processor over the same checkpoint."""
    network = Qwen2_5_VLModel.from_pretrained(scratch, dtype=placement.dtype).to(placement.device).eval()
    processor = Qwen2VLImageProcessorPil.from_pretrained(scratch)
    tokenizer = TextTokenizer(corpus.model().directory, CATALOG["jina-embeddings-v4"].context)
    before, after = (tokenizer.pieces([text])[0].tolist() for text in (BEFORE, AFTER))

    def plain(images: Sequence[bytes]) -> list[Tensor]:
        found = []
        for image in images:
            read = processor(images=[decoded(image)], return_tensors="pt")
            n = int(read["image_grid_thw"].prod()) // 4
            start, stop, pad = IDS.values()
            ids = torch.tensor([[*before, start, *[pad] * n, stop, *after]], device=placement.device)
            with torch.inference_mode():
                hidden = network(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    mm_token_type_ids=(ids == pad).long(),
                    pixel_values=read["pixel_values"].to(placement.device, placement.dtype),
                    image_grid_thw=read["image_grid_thw"].to(placement.device),
                    use_cache=False,
                ).last_hidden_state[0]
            found.append(hidden[len(before) : len(before) + n + 2].float().mean(0).cpu())
        return found

    return {"transformers": plain}


class Elsewhere:
    """Plain loops in a process of their own, which ends with the block."""

    def __init__(self, make: Callable[[], dict[str, Side]]) -> None:
        os.environ.pop("THP_MEM_ALLOC_ENABLE", None)  # huge pages, which ours may have
        self.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (make,))
        self.names = self.process.submit(_names).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.shutdown()

    def __getitem__(self, name: str) -> Side:
        return lambda images: [torch.from_numpy(row) for row in self.process.submit(_run, name, images).result()]

    def operations(self, images: Sequence[bytes]) -> int:
        """Of all products that a plain loop computes."""
        return self.process.submit(_operations, images).result()


_sides: dict[str, Side] = {}


def _begin(make: Callable[[], dict[str, Side]]) -> None:
    _sides.update(make())


def _names() -> list[str]:
    return list(_sides)


def _run(name: str, images: Sequence[bytes]) -> Array:
    return torch.stack(_sides[name](images)).numpy()


def _operations(images: Sequence[bytes]) -> int:
    with FlopCounterMode(display=False) as counter:
        next(iter(_sides.values()))(images)
    return counter.get_total_flops()


def compare(
    name: str,
    engine: Side,
    plain: Elsewhere,
    images: Sequence[bytes],
    n_rounds: int,
    placement: Placement,
    target: float = 1.3,
) -> None:
    """Images per second of all sides, ours beside the best plain one, and beside the best with fused attention."""
    sides = {"ours": engine, **{side: plain[side] for side in plain.names}}
    vectors = {side: torch.stack(work(images)) for side, work in sides.items()}
    first, *others = vectors.values()
    nearest = min(float(F.cosine_similarity(first, other).min()) for other in others)
    found = rounds({side: partial(effort, partial(work, images)) for side, work in sides.items()}, n_rounds)
    rate = {side: len(images) / median(lap.seconds for lap in laps) for side, laps in found.items()}
    table(
        f"{name} of random weights, {len(images)} images, median of {n_rounds}, cosine at least {nearest:.5f}",
        ("", "images/s"),
        [(side, f"{value:,.2f}") for side, value in rate.items()],
    )
    served, *others = (value for side, value in rate.items() if not side.startswith(FUSED))
    if fused := [value for side, value in rate.items() if side.startswith(FUSED)]:
        print(f"{name}: ours over the plain loop with {FUSED}: {served / max(fused):.2f}x")
    n_operations = plain.operations(images) / len(images)
    share = n_operations * served / matrix_rate(placement.device, placement.dtype)
    print(f"{name}: {n_operations / 1e12:.2f} T operations an image, {share:.0%} of the measured matrix rate")
    verdict(f"{name}: ours over the plain loop", served / max(others), ">=", target, "x")


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="how many")
    parser.add_argument("--layers", type=int, help="of every tower and model, in place of the published numbers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", choices=("clip", "v4"), default=("clip", "v4"))
    asked = parser.parse_args()
    print(machine())
    use_cores(1)  # of this thread, as in a server: the others say how many they have
    placement, images = place(asked.device, asked.dtype), files(asked.images)
    print(placement.device, placement.dtype_name)
    with asyncio.Runner() as runner, tempfile.TemporaryDirectory() as scratch:
        if "clip" in asked.models:
            model, make = clip(placement, asked.layers), partial(plain_clip, placement, asked.layers)
            with ours(model, runner, placement) as engine, Elsewhere(make) as plain:
                compare("jina-clip-v2", engine, plain, images, asked.rounds, placement)
        if "v4" in asked.models:
            write_v4(placement, asked.layers, Path(scratch))
            model, make = v4(placement, Path(scratch)), partial(plain_v4, placement, Path(scratch))
            with ours(model, runner, placement) as engine, Elsewhere(make) as plain:
                compare("jina-embeddings-v4", engine, plain, images, asked.rounds, placement)


if __name__ == "__main__":
    main()
