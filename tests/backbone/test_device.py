"""Where a model may run: what is asked for and what is there."""

import pytest
import torch

from fundament.backbone import device
from fundament.backbone.device import Placement, place, speeds
from fundament.errors import FundamentError


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


def test_auto_takes_the_gpu_where_there_is_one(two_gpus: None) -> None:
    assert place("auto", "auto") == Placement(torch.device("cuda"), torch.bfloat16)


def test_auto_multiplies_in_float32_where_a_gpu_only_emulates_bfloat16(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index == 1 else (9, 0))
    assert place("cuda:1", "auto") == Placement(torch.device("cuda:1"), torch.float32)
    assert place("cuda:0", "auto") == Placement(torch.device("cuda:0"), torch.bfloat16)


def test_auto_takes_the_cpu_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert place("auto", "float32") == Placement(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:1"])
def test_every_gpu_that_is_there_may_be_named(two_gpus: None, device: str) -> None:
    assert place(device, "float16") == Placement(torch.device(device), torch.float16)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda:2", "device 'cuda:2' is not there: this PyTorch sees 2 of them, the last 'cuda:1'"),
        ("mps", "device 'mps' is not served; use 'auto', 'cpu' or 'cuda:0'"),
        ("meta", "device 'meta' is not served"),
        ("xpu:0", "device 'xpu:0' is not served"),
        ("abacus", "device 'abacus' is not a device"),
        ("", "device '' is not a device"),
    ],
)
def test_a_device_that_cannot_serve_is_refused(two_gpus: None, device: str, words: str) -> None:
    with pytest.raises(FundamentError, match=words):
        place(device, "float32")


def test_a_gpu_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FundamentError, match="sees no CUDA device; use --device cpu"):
        place("cuda:0", "float32")


def test_float16_is_refused_on_a_cpu_that_cannot_multiply_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "multiplies_halves", lambda: False)
    with pytest.raises(FundamentError, match="use --dtype bfloat16 or float32"):
        place("cpu", "float16")


@pytest.mark.parametrize(
    ("found", "dtype"),
    [
        ({torch.bfloat16: 2.0, torch.float16: 1.1}, torch.bfloat16),
        ({torch.bfloat16: 1.1, torch.float16: 1.2}, torch.float16),
        ({torch.bfloat16: 0.5, torch.float16: 0.95}, torch.float16),
        ({torch.bfloat16: 0.5, torch.float16: 0.8}, torch.float32),
        ({torch.float16: 1.1}, torch.float16),
        ({}, torch.float32),
    ],
)
def test_auto_takes_the_fastest(
    monkeypatch: pytest.MonkeyPatch, found: dict[torch.dtype, float], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(device, "speeds", lambda: found)
    assert place("cpu", "auto") == Placement(torch.device("cpu"), dtype)
    assert place("cpu", "bfloat16") == Placement(torch.device("cpu"), torch.bfloat16)


def test_only_the_layers_weights_are_halves_on_a_cpu() -> None:
    halves, gpu = Placement(torch.device("cpu"), torch.float16), Placement(torch.device("cuda"), torch.float16)
    assert (halves.states, gpu.states) == (torch.float32, torch.float16)
    assert halves.dtype_of("layers.11.qkv.weight") == torch.float16
    for name in ("layers.11.qkv.bias", "layers.11.mlp_norm.weight", "tokens.weight", "final_norm.weight"):
        assert (halves.dtype_of(name), gpu.dtype_of(name)) == (torch.float32, torch.float16)


def test_a_format_is_measured_only_where_there_are_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    monkeypatch.setattr(device, "multiplies_halves", lambda: False)
    monkeypatch.setattr(device, "Linear", None)
    assert speeds.__wrapped__() == {}


def test_speeds_are_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})
    found = speeds.__wrapped__()
    assert torch.bfloat16 in found
    assert all(speed > 0 for speed in found.values())
