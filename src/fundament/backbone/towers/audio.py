"""The audio tower of Qwen2.5-Omni (Xu et al. 2025, section 2.2): Whisper's encoder, piece by piece of a sound."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fundament.backbone.checkpoint import Checkpoint, Config, Source
from fundament.backbone.device import Placement
from fundament.backbone.linear import read_activation
from fundament.backbone.packed import padded, rows_of
from fundament.backbone.towers.projections import apart, together
from fundament.backbone.towers.sounds import Frames
from fundament.backbone.transformer import Shape, Transformer

PREFIXES = ("audio_tower.", "model.audio_tower.")
IGNORED = r"(model\.)?audio_tower\.(audio_bos_eos_token\.weight|positional_embedding\..*)"
"""Two rows that this use of the tower never reads, and a table that is computed here."""

LAYOUT: dict[str, Source] = {
    "conv1": "conv1",
    "conv2": "conv2",
    "layers.{i}.q": "layers.{i}.self_attn.q_proj",
    "layers.{i}.k": "layers.{i}.self_attn.k_proj",
    "layers.{i}.v": "layers.{i}.self_attn.v_proj",
    "layers.{i}.out": "layers.{i}.self_attn.out_proj",
    "layers.{i}.attention_norm": "layers.{i}.self_attn_layer_norm",
    "layers.{i}.up": "layers.{i}.fc1",
    "layers.{i}.down": "layers.{i}.fc2",
    "layers.{i}.mlp_norm": "layers.{i}.final_layer_norm",
    "norm": "ln_post",
}


def n_audio_tokens(n_frames: int) -> int:
    """Tokens of so many frames; a sound of less than three has none."""
    return ((n_frames - 1) // 2 + 1) // 2


def read_shape(config: Config) -> Shape:
    """The transformer that an `audio_config` describes."""
    n_heads = config["encoder_attention_heads"]
    return Shape(
        vocab=0,
        hidden=config["d_model"],
        intermediate=config["encoder_ffn_dim"],
        n_layers=config["encoder_layers"],
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=config["d_model"] // n_heads,
        norm_eps=1e-5,
        pre_norm=True,
        final_norm=False,
        positions=None,  # places are added to the states
        activation=read_activation(config.get("activation_function", "gelu")),
    )


class AudioTower:
    """Sounds to states, 25 per second.

    Args:
        shape: of the transformer.
        weights: `conv1.*`, `conv2.*`, `norm.*`, and what the transformer names.
        window: frames of a piece; attention does not reach from one into the next.
    """

    def __init__(self, shape: Shape, weights: Mapping[str, Tensor], *, window: int) -> None:
        self.window = window
        self.convolutions = [(weights[f"conv{i}.weight"], weights[f"conv{i}.bias"]) for i in (1, 2)]
        self.norm = weights["norm.weight"], weights["norm.bias"]
        self.transformer = Transformer(shape, weights)
        own = [tensor for pair in (*self.convolutions, self.norm) for tensor in pair]
        self.n_bytes = self.transformer.n_bytes + sum(tensor.nbytes for tensor in own)
        half = shape.hidden // 2
        scales = torch.exp(-np.log(10_000) / (half - 1) * torch.arange(half).float())
        angles = torch.arange(window).float()[:, None] * scales
        self.places = torch.cat((angles.sin(), angles.cos()), dim=1).to(self.norm[0].device)

    @torch.inference_mode()
    def __call__(self, sounds: Sequence[Frames]) -> list[Tensor]:
        """The states of each sound after the last norm, `[tokens, hidden]`."""
        weight = self.norm[0]
        pieces = [
            torch.from_numpy(sound[:, start : start + self.window])
            for sound in sounds
            for start in range(0, sound.shape[1], self.window)
        ]
        lengths = [piece.shape[1] for piece in pieces]
        whole = torch.stack([F.pad(piece, (0, self.window - piece.shape[1])) for piece in pieces])
        seen = torch.from_numpy(np.arange(self.window) < np.array(lengths)[:, None])[:, None].to(weight.device)
        x = F.gelu(F.conv1d(whole.to(weight.device, weight.dtype), *self.convolutions[0], padding=1)) * seen
        x = F.gelu(F.conv1d(x, *self.convolutions[1], stride=2, padding=1)).mT
        x = x + self.places[: x.shape[1]].to(x.dtype)
        halves = [(length - 1) // 2 + 1 for length in lengths]
        packed = rows_of(halves, x.device)
        x = torch.cat([part[:n] for part, n in zip(x, halves, strict=True)])
        x = self.transformer.run(padded(x, packed), [packed] * len(self.transformer.layers), None)
        found, start = [], 0
        for sound in sounds:
            n, n_states = n_audio_tokens(sound.shape[1]), (sound.shape[1] - 1) // 2 + 1
            pairs = x[start : start + 2 * n].view(n, 2, -1)
            start += n_states
            found.append(F.layer_norm((pairs[:, 0] + pairs[:, 1]) / 2, weight.shape, *self.norm, 1e-5))
        return found


def load_audio_tower(checkpoint: Checkpoint, config: Config, placement: Placement, *, ignored: str) -> AudioTower:
    """Read a tower, strictly; `ignored` is a pattern of names that are not its own.

    Raises:
        CheckpointError: it does not fit.
    """
    shape = read_shape(config)
    named = apart(shape)
    for name, n_in in (("conv1", config["num_mel_bins"]), ("conv2", shape.hidden)):
        named |= {f"{name}.weight": (shape.hidden, n_in, 3), f"{name}.bias": (shape.hidden,)}
    named |= {"norm.weight": (shape.hidden,), "norm.bias": (shape.hidden,)}
    read = checkpoint.read(
        named,
        LAYOUT,
        placement,
        prefixes=PREFIXES,
        ignored=rf"{ignored}|{IGNORED}",
    )
    return AudioTower(shape, together(shape, read), window=2 * config["n_window"])
