"""What a checkpoint's files take of memory while they are read."""

from pathlib import Path

import pytest
import torch

from fundament.backbone import checkpoint
from fundament.backbone.checkpoint import Checkpoint, Weights
from tests.checkpoints import random_tensors

SHAPES = {f"layers.{i}.{name}.weight": (512, 1024) for i in range(8) for name in ("a", "b", "c")}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 MiB of float32 in PyTorch's own format."""
    directory = tmp_path_factory.mktemp("pickled")
    torch.save(random_tensors(SHAPES), directory / "pytorch_model.bin")
    return directory


def read(directory: Path, dtype: torch.dtype) -> Weights:
    parameters = {f"layers.{i}.all.weight": (1024, 1024) for i in range(8)}
    parameters |= {f"layers.{i}.c.weight": (512, 1024) for i in range(8)}
    layout = {"layers.{i}.all": ("layers.{i}.a", "layers.{i}.b"), "layers.{i}.c": "layers.{i}.c"}
    return Checkpoint(directory).read(parameters, layout, device=CPU, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_read_the_same_however_often(
    directory: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_BLOCK_ELEMENTS", 100_000)  # blocks that begin and end within a page
    expected, weights = random_tensors(SHAPES), read(directory, dtype)
    for _ in range(2):
        for i in range(8):
            a, b, c = (expected[f"layers.{i}.{name}.weight"].to(dtype) for name in ("a", "b", "c"))
            torch.testing.assert_close(weights[f"layers.{i}.all.weight"], torch.cat((a, b)), atol=0, rtol=0)
            torch.testing.assert_close(weights[f"layers.{i}.c.weight"], c, atol=0, rtol=0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's own count")
def test_a_mapped_files_pages_go_as_it_is_read(directory: Path) -> None:
    def mapped_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))

    weights = read(directory, torch.bfloat16)
    before = mapped_bytes()
    for name in weights:
        weights[name]
    assert mapped_bytes() - before < 12 * 2**20
