"""What would stop a start is found before it, with the way out."""

import json
import os
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from redis import Redis

from fundament import buckets, doctor
from fundament.backbone import device
from fundament.backbone.device import Dtype, Placement
from fundament.catalog import CATALOG, EMBEDDED
from fundament.config import Settings
from fundament.doctor import (
    Finding,
    check_buckets,
    check_cores,
    check_data_dir,
    check_device,
    check_files,
    check_memory,
    check_models,
    check_open_files,
    check_port,
    check_redis,
    check_store,
    check_weights,
    examine,
)
from fundament.engine import weights
from fundament.engine.loading import needed_bytes
from fundament.engine.weights import WITHOUT_SAFETENSORS, FileRecord, Local, Receipt
from fundament.errors import CheckpointError
from fundament.store import migrate
from fundament.store.database import locate
from tests.accounts.keys import make_key
from tests.checkpoints.bge_m3 import bge_m3
from tests.hub import make_bert
from tests.servers import bucket_on

SPEC = CATALOG["jina-embedding-t-en-v1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("made"))


@pytest.fixture
def directory(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "models" / SPEC.id))


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def with_receipt(directory: Path, revision: str = "1" * 40) -> Local:
    files = {"model.safetensors": FileRecord((directory / "model.safetensors").stat().st_size, "0" * 64)}
    Receipt(repo=SPEC.repo, revision=revision, pulled="2030-01-01T00:00:00+00:00", files=files).write(directory)
    return Local(SPEC, directory)


def test_a_machine_that_can_serve_has_no_problem(tmp_path: Path) -> None:
    findings = examine(Settings(data_dir=tmp_path, port=0))
    assert [finding.subject for finding in findings] == [
        "device",
        "cores",
        f"model {EMBEDDED.id}",
        "memory",
        "data",
        "store",
        "keys",
        "port",
    ]
    assert [finding for finding in findings if finding.level == "problem"] == []


def test_every_problem_is_found_in_one_go(tmp_path: Path, taken: int) -> None:
    settings = Settings(data_dir=tmp_path, port=taken, device="abacus", models=["nobody-knows-it"])
    problems = [finding.subject for finding in examine(settings) if finding.level == "problem"]
    assert problems == ["device", "model nobody-knows-it", "port"]


BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("found", "dtype", "level", "words"),
    [
        ({BFLOAT16: 2.04}, "auto", "ok", "cpu in bfloat16: times as fast as float32 on this CPU: bfloat16 2.0"),
        (
            {BFLOAT16: 2.04, FLOAT16: 1},
            "float32",
            "ok",
            "times as fast as float32 on this CPU: bfloat16 2.0, float16 1.0",
        ),
        ({BFLOAT16: 0.52}, "auto", "ok", "cpu in float32: times as fast as float32 on this CPU: bfloat16 0.5"),
        ({BFLOAT16: 0.52}, "bfloat16", "warning", "bfloat16 0.5; --dtype float32 is faster"),
        ({FLOAT16: 1.13}, "auto", "ok", "cpu in float16: times as fast as float32 on this CPU: float16 1.1"),
        ({FLOAT16: 1.13}, "bfloat16", "warning", "float16 1.1; --dtype float16 is faster"),
        ({}, "auto", "ok", "cpu in float32: this CPU multiplies nothing else"),
        ({}, "bfloat16", "warning", "--dtype float32 is faster"),
        ({}, "float16", "problem", "use --dtype bfloat16 or float32"),
    ],
)
def test_the_number_format_is_explained(
    monkeypatch: pytest.MonkeyPatch, found: Mapping[torch.dtype, float], dtype: Dtype, level: str, words: str
) -> None:
    monkeypatch.setattr(device, "multiplies_halves", lambda: FLOAT16 in found)
    for module in (device, doctor):
        monkeypatch.setattr(module, "speeds", lambda: found)
    finding = check_device("cpu", dtype)
    assert finding.level == level
    assert words in finding.detail


def test_a_gpu_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("cuda:2", "float32") == Finding(
        "problem",
        "device",
        "device 'cuda:2' is not there: this PyTorch sees 2 of them, the last 'cuda:1'",
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert check_device("cuda:1", "float32") == Finding("ok", "device", "cuda:1 (GPU 1) in float32")


def test_more_threads_than_cores_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "n_cores", lambda: 4)
    assert check_cores(0) == Finding("ok", "cores", "4 of 4")
    assert check_cores(3) == Finding("ok", "cores", "3 of 4")
    assert check_cores(5).level == "warning"


def test_a_flipped_byte_of_the_embedded_model_is_a_problem(
    minilm: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(minilm.directory, tmp_path / "model"))
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    for module in (weights, doctor):
        monkeypatch.setattr(module, "embedded", lambda: Local(EMBEDDED, copy))
    findings, fine = check_models([], tmp_path)
    assert fine == []
    assert (findings[0].level, findings[0].subject) == ("problem", f"model {EMBEDDED.id}")
    assert "Reinstall it" in findings[0].detail


def test_a_pulled_model_is_compared_with_its_receipt(directory: Path) -> None:
    local = with_receipt(directory)
    assert check_weights(local).level == "ok"
    (directory / "model.safetensors").write_bytes(b"short")
    findings, fine = check_models([SPEC.id], directory.parents[1])
    assert fine == []
    assert findings[0].level == "problem"
    assert f"Mend it: fundament pull {SPEC.id}" in findings[0].detail


def test_models_that_were_pulled_are_looked_at_besides(directory: Path) -> None:
    with_receipt(directory)
    findings, fine = check_models([], directory.parents[1])
    assert [(finding.level, finding.subject) for finding in findings] == [
        ("ok", f"model {EMBEDDED.id}"),
        ("ok", f"model {SPEC.id}"),
    ]
    assert [local.spec.id for local in fine] == [EMBEDDED.id], "only what is loaded at start counts as memory"
    (directory / "pulled.json").write_text("{}")
    findings, _ = check_models([], directory.parents[1])
    assert findings[1].level == "problem"


def test_another_commit_than_the_tested_one_is_warned_of(directory: Path) -> None:
    local = with_receipt(directory)
    assert check_weights(replace(local, spec=replace(SPEC, revision="1" * 40))).level == "ok"
    finding = check_weights(replace(local, spec=replace(SPEC, revision="2" * 40)))
    assert finding.level == "warning"
    assert f"fundament pull {SPEC.id}" in finding.detail


def test_a_directory_of_ones_own_is_opened(directory: Path, tmp_path: Path) -> None:
    findings, _ = check_models([f"mine={directory}"], tmp_path / "data")
    assert (findings[0].level, findings[0].subject) == ("ok", "model mine")
    (directory / "model.safetensors").write_bytes(b"not safetensors at all")
    findings, _ = check_models([f"mine={directory}"], tmp_path / "data")
    assert findings[0].level == "problem"
    assert "not a whole safetensors file" in findings[0].detail


def test_a_directory_that_would_not_load_is_a_problem(directory: Path, tmp_path: Path) -> None:
    def told() -> str:
        [finding], fine = check_models([f"mine={directory}"], tmp_path / "data")
        assert (finding.level, fine) == ("problem", [])
        return finding.detail

    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "does not fit the model: not in the checkpoint: encoder.layer.1." in told()
    (directory / "config.json").write_text(json.dumps(config | {"hidden_size": 2 * config["hidden_size"]}))
    assert "does not fit its config.json" in told()
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").unlink()
    assert "tokenizer" in told()


def test_a_directory_of_another_family_is_a_problem(directory: Path, tmp_path: Path) -> None:
    findings, fine = check_models([f"jina-embeddings-v2-base-en={directory}"], tmp_path / "data")
    assert fine == []
    assert findings[0].level == "problem"
    assert "that is family bert. Serve it under a name of its own" in findings[0].detail


def test_memory_is_compared_with_the_weights(directory: Path) -> None:
    local = Local(SPEC, directory)
    other = replace(local, spec=replace(SPEC, id="other"))
    for dtype in (torch.float32, torch.bfloat16):
        placement = Placement(torch.device("cpu"), dtype)
        n_bytes = needed_bytes(local, placement)
        assert check_memory([local, other], placement, 2 * n_bytes).level == "ok"
        assert check_memory([local, other], placement, 2 * n_bytes - 1).level == "warning"
        finding = check_memory([local], placement, n_bytes - 1)
        assert finding.level == "problem"
        assert f"no room for {SPEC.id}; raise --memory-gb" in finding.detail


def test_memory_of_conversations_is_counted_too(directory: Path) -> None:
    local, placement = Local(replace(SPEC, kind="chat"), directory), Placement(torch.device("cpu"), torch.float32)
    n_bytes = needed_bytes(local, placement)
    assert check_memory([local], placement, n_bytes + 1000, cache_bytes=1000).level == "ok"
    assert check_memory([local], placement, n_bytes + 1000, cache_bytes=1001).level == "problem"
    assert check_memory([Local(SPEC, directory)], placement, n_bytes, cache_bytes=1001).level == "ok"


def test_one_name_for_two_directories_is_a_problem(directory: Path, tmp_path: Path) -> None:
    other = shutil.copytree(directory, tmp_path / "other")
    findings, fine = check_models([f"mine={directory}", f"mine={directory}", f"mine={other}"], tmp_path / "data")
    assert [finding.level for finding in findings] == ["ok", "ok", "problem"]
    assert f"--model mine is given twice, for {directory} and {other}" in findings[2].detail
    assert {local.directory for local in fine} == {directory}


def test_buckets_of_jobs_need_their_client(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_buckets(Settings()) == []
    assert check_buckets(Settings(input_buckets=["s3://corpus"]))[0].level == "ok"
    monkeypatch.setitem(sys.modules, "obstore", None)
    [finding] = check_buckets(Settings(input_buckets=["s3://corpus"]))
    assert finding.level == "problem"
    assert "fundament[cloud]" in finding.detail


def test_weights_that_cannot_be_read_are_a_problem_of_memory_too(directory: Path) -> None:
    size = (directory / "model.safetensors").stat().st_size
    (directory / "model.safetensors").write_bytes(bytes(size))
    finding = check_memory([Local(SPEC, directory)], Placement(torch.device("cpu"), torch.float32), 2**40)
    assert finding.level == "problem"
    assert "not a whole safetensors file" in finding.detail


@pytest.mark.parametrize("kind", ["jobs", "files"])
def test_a_place_of_uploads_and_jobs_that_may_not_be_written_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / kind).mkdir()
    assert check_data_dir(tmp_path).level == "ok"
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / kind and access(path, mode))
    finding = check_data_dir(tmp_path)
    assert finding.level == "problem"
    assert f"{tmp_path / kind} is not writable" in finding.detail


def test_a_store_that_may_not_be_written_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(data_dir=tmp_path)
    migrate.prepare(locate("", tmp_path))
    assert check_store(settings)[0].level == "ok"
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith(".db"))
    assert "fundament.db is not writable" in check_store(settings)[0].detail


def test_what_lies_where_this_user_may_not_look_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    exists, access = os.path.exists, os.access
    monkeypatch.setattr(os.path, "exists", lambda path: Path(path).parent != hidden and exists(path))
    monkeypatch.setattr(os, "access", lambda path, mode: path != hidden and access(path, mode))
    assert "not writable" in check_data_dir(hidden / "data").detail
    assert "not writable" in check_store(Settings(data_dir=hidden / "data"))[0].detail


def test_keys_of_an_older_schema_are_not_called_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_key(tmp_path)
    assert check_store(Settings(data_dir=tmp_path, auth=True))[-1].detail == "1 keys work"
    monkeypatch.setattr(migrate, "newest", lambda: "v9999_later")
    finding = check_store(Settings(data_dir=tmp_path, auth=True))[-1]
    assert (finding.level, "not counted" in finding.detail) == ("ok", True)


def test_the_data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_data_dir(tmp_path / "not" / "yet" / "there").level == "ok"
    (tmp_path / "file").touch()
    assert check_data_dir(tmp_path / "file").level == "problem"
    assert check_data_dir(tmp_path / "file" / "below").level == "problem"
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert "not writable" in check_data_dir(tmp_path).detail
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "_LITTLE_DISK_BYTES", 2**62)
    assert check_data_dir(tmp_path).level == "warning"


def test_a_port_that_is_taken(taken: int) -> None:
    finding = check_port("127.0.0.1", taken)
    assert finding.level == "problem"
    assert finding.detail.endswith("Choose another with --port.")
    assert check_port("127.0.0.1", 0).level == "ok"


def test_a_host_that_is_not_this_machine() -> None:
    finding = check_port("192.0.2.1", 0)  # of a network that is kept for documentation
    assert finding.level == "problem"
    assert finding.detail.endswith("Choose another with --host.")


def test_a_port_that_is_free() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    assert check_port("127.0.0.1", free).level == "ok"


@pytest.mark.parametrize(
    ("host", "auth", "level", "words"),
    [
        ("127.0.0.1", None, "ok", "only this machine's users"),
        ("localhost", False, "ok", "only this machine's users"),
        ("::1", None, "ok", "only this machine's users"),
        ("0.0.0.0", None, "problem", "--auth"),
        ("::", None, "problem", "--no-auth"),
        ("", None, "problem", "--auth"),
        ("0.0.0.0", False, "warning", "as asked"),
        ("0.0.0.0", True, "warning", "fundament keys create"),
    ],
)
def test_whoever_can_call_needs_a_key_or_a_word(
    tmp_path: Path, host: str, auth: bool | None, level: str, words: str
) -> None:
    findings = check_store(Settings(data_dir=tmp_path, host=host, auth=auth))
    assert [finding.subject for finding in findings] == ["store", "keys"]
    assert findings[1].level == level
    assert words in findings[1].detail


def test_keys_that_work_are_counted(tmp_path: Path) -> None:
    make_key(tmp_path)
    make_key(tmp_path, expires_at=datetime.now(UTC))
    store, keys = check_store(Settings(data_dir=tmp_path, auth=True))
    assert "schema v" in store.detail
    assert keys == Finding("ok", "keys", "1 keys work")


def test_a_store_that_cannot_be_used_is_a_problem(tmp_path: Path) -> None:
    for url in ("postgresql://127.0.0.1:1/x", "mysql://x/y"):
        assert check_store(Settings(data_dir=tmp_path, store_url=url))[0].level == "problem"


def test_the_bucket_of_the_files_is_tried(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_files(Settings(data_dir=tmp_path)) == []
    monkeypatch.setitem(buckets._RETRIES, "max_retries", 0)  # type: ignore[misc]
    with bucket_on(s3_url) as url:
        assert check_files(Settings(files_url=f"{url}/x")) == [Finding("ok", "files", f"{url}/x answers")]
        [missing] = check_files(Settings(files_url=f"{url}-not"))
        assert (missing.level, "404" in missing.detail) == ("problem", True)
        with monkeypatch.context() as patch:  # a read-only root
            patch.setattr(tempfile, "tempdir", None)
            patch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "not")])
            [nowhere] = check_files(Settings(files_url=f"{url}/x"))
            assert (nowhere.level, "Set TMPDIR" in nowhere.detail) == ("problem", True)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        [silent] = check_files(Settings(files_url=url))
        assert (silent.level, "does not answer" in silent.detail) == ("problem", True)
        monkeypatch.setitem(sys.modules, "obstore", None)
        [absent] = check_files(Settings(files_url=url))
        assert (absent.level, "fundament[cloud]" in absent.detail) == ("problem", True)


def test_few_open_files_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for most, findings in ((64, 1), (4096, 0), (resource.RLIM_INFINITY, 0)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, most=most: (most, most))
        assert [finding.level for finding in check_open_files()] == ["warning"] * findings


def test_the_redis_of_the_limits_is_asked(redis_url: str) -> None:
    assert check_redis("") == []
    assert check_redis(redis_url) == [Finding("ok", "limits", "Redis answers and can be written")]
    with Redis.from_url(redis_url) as client:
        client.config_set("maxmemory", 1)
        try:
            [full] = check_redis(redis_url)
        finally:
            client.config_set("maxmemory", 0)
    assert full.level == "problem"
    assert "maxmemory" in full.detail
    for url in ("redis://127.0.0.1:1/0", "nonsense"):
        assert [finding.level for finding in check_redis(url)] == ["problem"]


def test_a_store_that_cannot_be_made_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: Path(path) != tmp_path)
    [store, *_] = check_store(Settings(data_dir=tmp_path / "data"))
    assert store.level == "problem"
    assert "is not writable" in store.detail


@pytest.mark.parametrize("name", WITHOUT_SAFETENSORS["bge-m3"])
def test_a_file_of_bge_m3_that_is_not_there_is_a_problem(name: str, tmp_path: Path) -> None:
    directory = bge_m3(tmp_path / "bge")
    for other in WITHOUT_SAFETENSORS["bge-m3"]:
        (directory / other).touch()
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}$"):
        check_weights(Local(CATALOG["bge-m3"], directory))
