"""Sounds as an audio tower reads them: a logarithmic mel spectrogram (Whisper, Radford et al. 2022, section 2.2)."""

import numpy as np
import torch
from numpy.typing import NDArray

RATE = 16_000  # samples per second
SECONDS = 30  # what is read of a sound; a shorter one is followed by silence
_WINDOW, _HOP = 400, 160  # samples of a frame, and from one frame to the next
_TOP_HZ = 8_000.0

Frames = NDArray[np.float32]
"""`[mels, frames]`, 100 frames per second."""


def log_mel(samples: NDArray[np.float32], n_mels: int) -> Frames:
    """The frames of a sound of at most `SECONDS`, scaled to about one; louder samples than one are scaled down.

    The scale depends on the loudest frame, the silence behind it included.

    Args:
        samples: mono, at `RATE`.
        n_mels: bands of frequencies.
    """
    read = torch.from_numpy(samples[: RATE * SECONDS].astype(np.float32, copy=True))
    if (peak := read.abs().max()) > 1:
        read = read / peak
    n_frames = -(-len(read) // _HOP)
    whole = torch.nn.functional.pad(read, (0, RATE * SECONDS - len(read)))
    window = torch.hann_window(_WINDOW)
    power = torch.stft(whole, _WINDOW, _HOP, window=window, return_complex=True)[:, :-1].abs() ** 2
    found = (torch.from_numpy(mel_bands(n_mels)) @ power.contiguous()).clamp(min=1e-10).log10()
    return ((found.maximum(found.max() - 8) + 4) / 4)[:, :n_frames].contiguous().numpy()


def mel_bands(n_mels: int) -> NDArray[np.float32]:
    """How much of each frequency is in each band: triangles of equal area, float32 `[mels, frequencies]`."""
    top = _mels(np.array(_TOP_HZ))
    corners = _hertz(np.linspace(0, top, n_mels + 2))
    frequencies = np.linspace(0, RATE // 2, _WINDOW // 2 + 1)
    widths = np.diff(corners)
    slopes = corners[:, None] - frequencies
    rising, falling = -slopes[:-2] / widths[:-1, None], slopes[2:] / widths[1:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return (triangles * (2 / (corners[2:] - corners[:-2]))[:, None]).astype(np.float32)


def _mels(hertz: NDArray[np.float64]) -> NDArray[np.float64]:
    """Even up to 1,000 Hz, logarithmic above."""
    return np.where(hertz < 1000, 3 * hertz / 200, 15 + 27 * np.log(np.maximum(hertz, 1000) / 1000) / np.log(6.4))


def _hertz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(mels < 15, 200 * mels / 3, 1000 * np.exp(np.log(6.4) / 27 * (mels - 15)))
