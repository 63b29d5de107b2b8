"""From what an operator names to a directory: the embedded model, pulled ones, own ones."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fundament.catalog import CATALOG, EMBEDDED
from fundament.engine import weights
from fundament.engine.weights import (
    RECEIPT,
    FileRecord,
    Local,
    Receipt,
    damage,
    from_argument,
    pulled,
    read_receipt,
    verify_embedded,
    where_whole,
)
from fundament.errors import CheckpointError

SPEC = CATALOG["jina-embedding-t-en-v1"]


def test_the_embedded_model_is_whole(minilm: Local) -> None:
    verify_embedded(minilm)
    assert from_argument(EMBEDDED.id, Path("/nowhere")) == minilm


def test_one_wrong_byte_of_the_embedded_model_is_seen(minilm: Local, tmp_path: Path) -> None:
    content = bytearray((minilm.directory / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"SHA-256 is .* Reinstall it: pip install"):
        verify_embedded(Local(EMBEDDED, tmp_path))


def test_embedded_weights_that_are_gone_are_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors\. Reinstall it"):
        verify_embedded(Local(EMBEDDED, tmp_path))


def test_without_the_package_the_embedded_model_is_pulled_like_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(weights, "EMBEDDED_PACKAGE", "a_package_that_is_not_installed")
    with pytest.raises(CheckpointError, match=f"Get them: fundament pull {EMBEDDED.id}"):
        from_argument(EMBEDDED.id, tmp_path)


def test_a_directory_under_a_catalogue_id_is_that_model(own: Path, tmp_path: Path) -> None:
    assert from_argument(f"{SPEC.id}={own}", tmp_path) == Local(SPEC, own)


@pytest.mark.parametrize("name", [SPEC.repo, f"jina-ai/{SPEC.id}", SPEC.repo.upper()])
def test_a_long_id_is_that_model_too(own: Path, tmp_path: Path, name: str) -> None:
    assert from_argument(f"{name}={own}", tmp_path) == Local(SPEC, own)
    with pytest.raises(CheckpointError, match=f"The weights of '{SPEC.id}' are not in .* fundament pull {SPEC.id}"):
        from_argument(name, tmp_path)
    directory = put(own, SPEC.id, tmp_path)
    assert from_argument(name, tmp_path) == Local(SPEC, directory)


def test_the_embedded_model_has_a_long_id(minilm: Local) -> None:
    assert from_argument(EMBEDDED.repo, Path("/nowhere")) == minilm


def test_a_name_with_another_owner_is_ones_own(own: Path, tmp_path: Path) -> None:
    assert from_argument(f"team/{SPEC.id}={own}", tmp_path).spec.id == f"team/{SPEC.id}"
    with pytest.raises(CheckpointError, match="not in the catalogue"):
        from_argument(f"team/{SPEC.id}", tmp_path)


def test_pulled_models_that_may_not_be_read_are_said(tmp_path: Path) -> None:
    directory = tmp_path / "models" / SPEC.id
    (directory / RECEIPT).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=rf"{RECEIPT} cannot be read: Is a directory"):
        read_receipt(directory)
    assert where_whole(SPEC, tmp_path) is None


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("nobody-knows-it", r"not in the catalogue \(see `fundament models`\).*--model nobody-knows-it=/path"),
        (SPEC.id, f"are not in .*Get them: fundament pull {SPEC.id}"),
        ("mine=/nowhere/at/all", "/nowhere/at/all is not a directory"),
        ("=/tmp", "give it a name, as in --model my-model=/tmp"),
    ],
)
def test_what_cannot_be_served_is_said_with_the_way_out(tmp_path: Path, argument: str, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        from_argument(argument, tmp_path)


def test_a_family_of_the_catalogue_without_a_module_is_not_served(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "CATALOG", {"later": replace(SPEC, id="later", family="of_another_time")})
    put(own, "later", tmp_path)
    assert pulled(tmp_path) == {}
    with pytest.raises(CheckpointError, match="does not serve its family yet"):
        from_argument("later", tmp_path)


def put(source: Path, model: str, data_dir: Path) -> Path:
    """What a pull does at its end: a receipt, then a rename."""
    partial = data_dir / "models" / f".{model}.partial"
    shutil.copytree(source, partial)
    files = {"model.safetensors": FileRecord((source / "model.safetensors").stat().st_size, "0" * 64)}
    Receipt(repo=SPEC.repo, revision="1" * 40, pulled="2030-01-01T00:00:00+00:00", files=files).write(partial)
    target = data_dir / "models" / model
    partial.rename(target)
    return target


def test_a_model_is_there_as_soon_as_it_is_renamed(made: Path, tmp_path: Path) -> None:
    assert pulled(tmp_path) == {}
    (tmp_path / "models" / SPEC.id).mkdir(parents=True)
    assert pulled(tmp_path) == {}, "without a receipt it is not whole"
    (tmp_path / "models" / SPEC.id).rmdir()
    directory = put(made, SPEC.id, tmp_path)
    assert pulled(tmp_path) == {SPEC.id: Local(SPEC, directory)}
    assert from_argument(SPEC.id, tmp_path) == Local(SPEC, directory)
    directory.rename(tmp_path / "gone")
    assert pulled(tmp_path) == {}


def test_nothing_is_read_again_where_nothing_changed(made: Path, tmp_path: Path) -> None:
    put(made, SPEC.id, tmp_path)
    first = pulled(tmp_path)
    hits = weights._scan.cache_info().hits
    first.clear()
    assert SPEC.id in pulled(tmp_path), "what a caller does to its answer is its own affair"
    assert weights._scan.cache_info().hits == hits + 1


def test_a_receipt_is_read_as_it_was_written(made: Path, tmp_path: Path) -> None:
    directory = put(made, SPEC.id, tmp_path)
    receipt = read_receipt(directory)
    assert receipt is not None
    assert (receipt.repo, receipt.revision) == (SPEC.repo, "1" * 40)
    assert damage(directory, receipt) == []
    (directory / "model.safetensors").unlink()
    assert damage(directory, receipt) == ["model.safetensors"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"repo": "r", "revision": "v", "pulled": "p", "files": {"a": 1}}']
)
def test_a_receipt_that_cannot_be_read_vouches_for_nothing(made: Path, tmp_path: Path, content: str) -> None:
    directory = put(made, SPEC.id, tmp_path)
    (directory / RECEIPT).write_text(content)
    with pytest.raises(CheckpointError, match="Pull the model again"):
        read_receipt(directory)
    assert where_whole(SPEC, tmp_path) is None
