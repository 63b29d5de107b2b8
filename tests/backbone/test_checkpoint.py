"""What a checkpoint's files are: whole, one model's, with settings that can be meant; and what they take of memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fundament.backbone import checkpoint
from fundament.backbone.checkpoint import Checkpoint, Config, Weights
from fundament.backbone.device import Placement
from fundament.errors import CheckpointError
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
    return Checkpoint(directory).read(parameters, layout, Placement(CPU, dtype))


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in PyTorch's older format, which is not mapped."""
    directory = tmp_path_factory.mktemp("older")
    torch.save(random_tensors(SHAPES), directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("written", ["directory", "older"])
def test_tensors_are_read_the_same_however_often(
    written: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(written)
    monkeypatch.setattr(checkpoint, "_BLOCK_ELEMENTS", 100_000)  # blocks that begin and end within a page
    expected, weights = random_tensors(SHAPES), read(directory, dtype)
    for _ in range(2):
        for i in range(8):
            a, b, c = (expected[f"layers.{i}.{name}.weight"].to(dtype) for name in ("a", "b", "c"))
            torch.testing.assert_close(weights[f"layers.{i}.all.weight"], torch.cat((a, b)), atol=0, rtol=0)
            torch.testing.assert_close(weights[f"layers.{i}.c.weight"], c, atol=0, rtol=0)


def resident_bytes(kind: str) -> int:
    """Pages of files, `RssFile`, or of this process's own, `RssAnon`."""
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def test_a_mapped_files_pages_go_as_it_is_read(directory: Path) -> None:
    weights = read(directory, torch.bfloat16)
    before = resident_bytes("RssFile")
    for name in weights:
        weights[name]
    assert resident_bytes("RssFile") - before < 12 * 2**20


def test_safetensors_are_mapped_and_not_copied(tmp_path: Path) -> None:
    tensors = random_tensors(SHAPES)
    save_file(tensors, tmp_path / "model.safetensors")
    names = {"out": "a", "up": "b", "down": "c"}
    parameters = {f"layers.{i}.{name}.weight": (512, 1024) for i in range(8) for name in names}
    layout = {f"layers.{{i}}.{name}": f"layers.{{i}}.{theirs}" for name, theirs in names.items()}
    weights = Checkpoint(tmp_path).read(parameters, layout, Placement(CPU, torch.float32))
    before = resident_bytes("RssAnon")
    kept = {name: weights[name] for name in weights}
    for name, tensor in kept.items():
        layer, part = name.removesuffix(".weight").rsplit(".", 1)
        assert torch.equal(tensor, tensors[f"{layer}.{names[part]}.weight"])
    assert resident_bytes("RssAnon") - before < 12 * 2**20


@pytest.mark.parametrize("n_rows", [3, 1000])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_what_is_kept_does_not_change_with_its_file(file: str, n_rows: int, tmp_path: Path) -> None:
    save = save_file if file.endswith("safetensors") else torch.save
    save({"table.weight": torch.ones(n_rows, 512)}, tmp_path / file)
    layout = {"tokens": "table"}
    weights = Checkpoint(tmp_path).read({"tokens.weight": (n_rows, 512)}, layout, Placement(CPU, torch.float32))
    table = weights["tokens.weight"]
    with (tmp_path / file).open("r+b") as written:
        written.write(bytes((tmp_path / file).stat().st_size))
    assert torch.equal(table, torch.ones(n_rows, 512))


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("model", "model_old"):
        save_file({"a.weight": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"model_old\.safetensors and model\.safetensors both hold a\.weight"):
        list(Checkpoint(tmp_path).names)


def test_a_tensor_in_two_files_of_pytorchs_is_refused(tmp_path: Path) -> None:
    for name in ("pytorch_model", "pytorch_model_old"):
        torch.save({"a.weight": torch.ones(2)}, tmp_path / f"{name}.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model_old\.bin and pytorch_model\.bin both hold a\.weight"):
        list(Checkpoint(tmp_path).names)


@pytest.mark.parametrize("written", [False, True])
def test_rows_that_are_one_row_in_the_file_are_read_and_nothing_else_is_let_go(
    written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their bytes, counted, reach far behind what the file holds."""
    let_go: list[torch.Tensor] = []
    monkeypatch.setattr(checkpoint, "_let_go", let_go.append)
    row = torch.randn(1, 64)
    table = row.expand(8_192, 64)
    torch.save({"a.weight": table.contiguous() if written else table}, tmp_path / "pytorch_model.bin")
    read = Checkpoint(tmp_path).read({"a.weight": (8_192, 64)}, {"a": "a"}, Placement(CPU, torch.bfloat16))
    assert torch.equal(read["a.weight"], table.bfloat16())
    assert bool(let_go) == written


@pytest.mark.parametrize("n_rows", [3, 1000])
def test_quantized_weights_are_refused(n_rows: int, tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(n_rows, 512, dtype=torch.int8)}, tmp_path / "model.safetensors")
    weights = Checkpoint(tmp_path).read({"a.weight": (n_rows, 512)}, {"a": "a"}, Placement(CPU, torch.float32))
    with pytest.raises(CheckpointError, match=r"a\.weight holds whole numbers \(torch\.int8\): quantized weights"):
        weights["a.weight"]


def test_a_file_that_the_index_names_is_missed(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    shards = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(CheckpointError, match=r"has no model-00002-of-00002\.safetensors, which .*index\.json names"):
        list(Checkpoint(tmp_path).names)


def test_the_older_format_of_pytorch_is_read(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(2)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(Checkpoint(tmp_path).tensor("a.weight"), torch.ones(2))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", "4"),
        ("num_attention_heads", 0),
        ("num_hidden_layers", "six"),
        ("num_hidden_layers", True),
        ("hidden_size", 48.0),
        ("layer_norm_eps", "1e-6"),
        ("rms_norm_eps", -1e-6),
        ("rope_theta", "abc"),
        ("pad_token_id", "1"),
        ("pad_token_id", 1.0),
        ("pad_token_id", -1),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(key: str, value: Any) -> None:
    wanted = r"a (whole )?number( above 0|, 0 or more)"
    with pytest.raises(CheckpointError, match=rf"^config\.json says {key} .*; it should be {wanted}$"):
        Config({key: value})


def test_a_size_that_is_null_is_not_told() -> None:
    with pytest.raises(CheckpointError, match="does not say hidden_size"):
        Config({"hidden_size": None})["hidden_size"]
