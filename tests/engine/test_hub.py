"""Pulling from a hub that speaks HTTP on this machine: whole, interrupted, lying, closed."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from transformers import BertModel, PreTrainedTokenizerFast

from fundament.catalog import CATALOG, ModelSpec
from fundament.core import Embed
from fundament.engine import hub as hub_module
from fundament.engine.hub import pull, refuse_unpullable, sha256_of
from fundament.engine.local import EngineOptions, LocalEngine
from fundament.engine.weights import damage, directory_of, pulled, read_receipt, where_whole
from fundament.errors import FundamentError
from fundament.telemetry import Metrics
from tests.hub import COMMIT, Hub, hub_of, make_bert
from tests.served import PATIENCE_SECONDS

SPEC = CATALOG["jina-embedding-t-en-v1"]
WEIGHTS = "model.safetensors"
MEBIBYTE = 1024**2


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_bert(tmp_path_factory.mktemp("published"))
    for name in ("pytorch_model.bin", "modeling_bert.py", "onnx/config.json", "README.md", "images/logo.png"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("not for us")
    return directory


@pytest.fixture
def hub(published: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub of one test; nothing of this machine's own settings reaches it."""
    for name in ("HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub_of(published) as hub:
        yield hub
        huggingface_hub.close_session()


def embed(data_dir: Path, texts: list[str]) -> np.ndarray:
    async def ask() -> np.ndarray:
        engine = LocalEngine(pulled(data_dir), EngineOptions(dtype="float32"), Metrics())
        try:
            return (await engine.run(SPEC.id, Embed(inputs=texts))).vectors
        finally:
            await engine.close()

    return asyncio.run(ask())


def test_a_pulled_model_answers_like_the_published_one(hub: Hub, published: Path, tmp_path: Path) -> None:
    said = []
    local = pull(SPEC, tmp_path, endpoint=hub.url, progress=lambda here, whole: said.append((here, whole)))

    assert local == pulled(tmp_path)[SPEC.id]
    assert local.n_bytes == len(hub.files[WEIGHTS])
    assert said[-1][0] == said[-1][1] == sum(f.size for f in read_receipt(local.directory).files.values())
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(published / "tokenizer.json"))
    inputs = tokenizer("a small cat", return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        expected = BertModel.from_pretrained(published)(**inputs).last_hidden_state.mean(1).numpy()
    np.testing.assert_allclose(embed(tmp_path, ["a small cat"]), expected, atol=1e-5)


def test_only_what_is_served_is_taken_and_the_receipt_says_what(hub: Hub, tmp_path: Path) -> None:
    directory = pull(SPEC, tmp_path, endpoint=hub.url).directory

    receipt = read_receipt(directory)
    assert (receipt.repo, receipt.revision) == (SPEC.repo, COMMIT)
    assert set(receipt.files) == {"1_Pooling/config.json", "config.json", WEIGHTS, "tokenizer.json"}
    on_disk = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert on_disk == {*receipt.files, "pulled.json"}
    for name, file in receipt.files.items():
        assert (file.size, file.sha256) == (len(hub.files[name]), sha256_of(directory / name))
    assert [path.name for path in (tmp_path / "models").iterdir()] == [SPEC.id]


def test_a_token_goes_to_the_hub_and_not_to_the_host_of_the_large_files(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull(SPEC, tmp_path, endpoint=hub.url)
    elsewhere = [headers.get("authorization") for _, path, headers in hub.seen if path.startswith("/cdn/")]
    at_the_hub = {headers.get("authorization") for _, path, headers in hub.seen if not path.startswith("/cdn/")}
    assert at_the_hub == {"Bearer hf_secret"}
    assert elsewhere == [None]


def test_a_pull_that_ends_before_it_is_in_its_place_is_not_repeated(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hub_module, "_replace", ends)
        pull(SPEC, tmp_path, endpoint=hub.url)
    n_before = len([path for _, path, _ in hub.seen if path.startswith("/cdn/")])
    assert pull(SPEC, tmp_path, endpoint=hub.url) == pulled(tmp_path)[SPEC.id]
    assert len([path for _, path, _ in hub.seen if path.startswith("/cdn/")]) == n_before > 0


def test_a_killed_pull_leaves_no_model_and_the_next_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.stalls[WEIGHTS] = 2 * MEBIBYTE + 5
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fundament", "pull", SPEC.id, "--data-dir", str(tmp_path)],
        env={**environment, "HF_ENDPOINT": hub.url},
        stdout=subprocess.DEVNULL,
    )
    try:
        assert hub.stalled.wait(PATIENCE_SECONDS)
        part = directory_of(SPEC, tmp_path).with_name(f".{SPEC.id}.partial") / WEIGHTS
        # What the hub has sent, the puller may not have written yet, nor even opened the file for.
        while not part.exists() or part.stat().st_size < 2 * MEBIBYTE:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    n_here = part.stat().st_size
    assert pulled(tmp_path) == {}
    assert where_whole(SPEC, tmp_path) is None

    hub.stalls.clear()
    hub.fetched.clear()
    directory = pull(SPEC, tmp_path, endpoint=hub.url).directory
    fetched = dict(hub.fetched)
    assert fetched[WEIGHTS] == f"bytes={n_here}-"
    assert "config.json" not in fetched, "a file that was whole is not fetched again"
    assert (directory / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert SPEC.id in pulled(tmp_path)


def test_a_pull_that_goes_on_stays_with_its_commit(hub: Hub, tmp_path: Path) -> None:
    hub.lies.add("config.json")
    with pytest.raises(FundamentError):
        pull(SPEC, tmp_path, endpoint=hub.url)
    hub.lies.clear()
    hub.seen.clear()
    pull(SPEC, tmp_path, endpoint=hub.url)
    assert hub.seen[0][1].endswith(f"/revision/{COMMIT}")


def test_files_of_another_commit_do_not_stay(hub: Hub, tmp_path: Path) -> None:
    hub.lies.add("tokenizer.json")  # comes last: the weights are there when the pull fails
    with pytest.raises(FundamentError):
        pull(SPEC, tmp_path, endpoint=hub.url)
    hub.lies.clear()
    hub.commit = COMMIT[::-1]
    hub.files = {**hub.files, "other.safetensors": hub.files[WEIGHTS]}
    del hub.files[WEIGHTS]
    directory = pull(replace(SPEC, revision=hub.commit), tmp_path, endpoint=hub.url).directory
    assert [path.name for path in directory.glob("*.safetensors")] == ["other.safetensors"]


def test_a_broken_connection_is_made_anew(hub: Hub, tmp_path: Path) -> None:
    hub.cuts[WEIGHTS] = 2 * MEBIBYTE
    directory = pull(SPEC, tmp_path, endpoint=hub.url).directory
    assert [asked for name, asked in hub.fetched if name == WEIGHTS] == [None, f"bytes={2 * MEBIBYTE}-"]
    assert (directory / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


def test_the_little_that_came_before_a_connection_broke_is_kept(hub: Hub, tmp_path: Path) -> None:
    hub.cuts[WEIGHTS] = 300_000
    directory = pull(SPEC, tmp_path, endpoint=hub.url).directory
    assert [asked for name, asked in hub.fetched if name == WEIGHTS] == [None, "bytes=300000-"]
    assert (directory / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


@pytest.mark.parametrize("note", [b"", b"[]", b"{}"])
def test_a_note_that_a_crash_left_empty_is_as_none(hub: Hub, tmp_path: Path, note: bytes) -> None:
    partial = tmp_path / "models" / f".{SPEC.id}.partial"
    partial.mkdir(parents=True)
    (partial / "pulling.json").write_bytes(note)
    assert pull(replace(SPEC, revision=None), tmp_path, endpoint=hub.url).directory.is_dir()


def test_a_hub_without_ranges_sends_the_file_again(hub: Hub, tmp_path: Path) -> None:
    hub.cuts[WEIGHTS] = 2 * MEBIBYTE
    hub.ranges = False
    said = []
    directory = pull(SPEC, tmp_path, endpoint=hub.url, progress=lambda *now: said.append(now)).directory
    assert (directory / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert said[-1][0] == said[-1][1]


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_file_with_another_digest_is_refused_and_deleted(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.lies.add(name)
    with pytest.raises(FundamentError, match=f"{name} is not what the hub announced"):
        pull(SPEC, tmp_path, endpoint=hub.url)
    assert pulled(tmp_path) == {}
    assert not (tmp_path / "models" / f".{SPEC.id}.partial" / name).exists()


def test_what_an_interrupted_pull_left_damaged_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    hub.lies.add("tokenizer.json")
    with pytest.raises(FundamentError):
        pull(SPEC, tmp_path, endpoint=hub.url)
    hub.lies.clear()
    part = tmp_path / "models" / f".{SPEC.id}.partial" / WEIGHTS
    part.write_bytes(b"\0" * (len(hub.files[WEIGHTS]) - 7))
    directory = pull(SPEC, tmp_path, endpoint=hub.url).directory
    assert (directory / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


def test_a_damaged_model_is_replaced(hub: Hub, tmp_path: Path) -> None:
    directory = pull(SPEC, tmp_path, endpoint=hub.url).directory
    (directory / WEIGHTS).write_bytes(b"short")
    assert damage(directory, read_receipt(directory)) == [WEIGHTS]
    assert where_whole(SPEC, tmp_path) is None
    pull(SPEC, tmp_path, endpoint=hub.url)
    assert where_whole(SPEC, tmp_path) == directory
    assert [path.name for path in (tmp_path / "models").iterdir()] == [SPEC.id]


def test_a_model_of_another_commit_than_this_release_pulls_is_not_the_right_one(hub: Hub, tmp_path: Path) -> None:
    pull(SPEC, tmp_path, endpoint=hub.url)
    assert where_whole(replace(SPEC, revision=COMMIT), tmp_path) is not None
    assert where_whole(replace(SPEC, revision=COMMIT[::-1]), tmp_path) is None


def test_a_model_without_safetensors_is_pulled_by_its_list(hub: Hub, tmp_path: Path) -> None:
    spec = CATALOG["bge-m3"]
    del hub.files[WEIGHTS]
    with pytest.raises(FundamentError, match=r"has no sparse_linear\.pt, colbert_linear\.pt"):
        pull(replace(spec, revision=None), tmp_path, endpoint=hub.url)
    hub.files |= {"sparse_linear.pt": b"s", "colbert_linear.pt": b"c"}
    local = pull(replace(spec, revision=None), tmp_path, endpoint=hub.url)
    assert {"pytorch_model.bin", "sparse_linear.pt", "colbert_linear.pt"} <= set(read_receipt(local.directory).files)
    assert local.n_bytes == len(b"not for us") + 2


def test_a_late_interaction_model_is_pulled_with_how_it_reads_texts(hub: Hub, tmp_path: Path) -> None:
    hub.files |= {"artifact.metadata": b'{"query_maxlen": 48}'}
    directory = pull(replace(CATALOG["jina-colbert-v2"], revision=None), tmp_path, endpoint=hub.url).directory
    assert (directory / "artifact.metadata").read_bytes() == hub.files["artifact.metadata"]


def test_two_pulls_of_one_model_do_not_meet(hub: Hub, tmp_path: Path) -> None:
    partial = tmp_path / "models" / f".{SPEC.id}.partial"
    with (
        hub_module._alone(SPEC, partial),
        pytest.raises(FundamentError, match="being pulled by another process"),
    ):
        pull(SPEC, tmp_path, endpoint=hub.url)
    pull(SPEC, tmp_path, endpoint=hub.url)


def listing(status: int, **headers: str) -> dict[str, object]:
    return {"listing_status": (status, headers)}


@pytest.mark.parametrize(
    ("misbehaviour", "sentence"),
    [
        (listing(404, **{"X-Error-Code": "RepoNotFound"}), r"has no jinaai/.*set HF_TOKEN"),
        (listing(401), r"does not let you read jinaai/.*HF_TOKEN"),
        (listing(503), r"answered 503 for jinaai/.*pull again later"),
        (listing(200), r"does not answer like a model hub; check HF_ENDPOINT"),
        (
            {"file_status": (403, {"X-Error-Code": "GatedRepo"})},
            r"asks for consent: accept its terms at http.*HF_TOKEN",
        ),
        ({"file_status": (200, {"Content-Length": "4"})}, r"no size and digest for .*--model NAME=DIR"),
        ({"content_status": (503, {})}, r"answered 503 for jinaai/.*what arrived is kept"),
        ({"commit": "not a commit"}, r"gives no commit of jinaai/.* but 'not a commit'"),
        ({"files": {"config.json": b"{}"}}, r"has no \*\.safetensors; nothing is pulled"),
        ({"files": {WEIGHTS: b"", "../../evil.json": b"{}"}}, r"names a file '\.\./\.\./evil\.json'"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    hub: Hub, tmp_path: Path, misbehaviour: dict[str, object], sentence: str
) -> None:
    for name, value in misbehaviour.items():
        setattr(hub, name, value)
    with pytest.raises(FundamentError, match=sentence) as caught:
        pull(SPEC, tmp_path, endpoint=hub.url)
    assert "\n" not in caught.value.detail
    assert pulled(tmp_path) == {}


def test_a_commit_that_is_gone_is_said(hub: Hub, tmp_path: Path) -> None:
    sentence = rf"no longer has commit {COMMIT[::-1]} of jinaai/.*; delete .*partial and pull again"
    with pytest.raises(FundamentError, match=sentence):
        pull(replace(SPEC, revision=COMMIT[::-1]), tmp_path, endpoint=hub.url)


def test_a_hub_that_is_not_there_is_said(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(FundamentError, match=r"http://127\.0\.0\.1:9 cannot be reached .*HF_ENDPOINT.*HTTPS_PROXY"):
        pull(SPEC, tmp_path, endpoint="http://127.0.0.1:9")


def test_offline_is_heeded(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FundamentError, match="HF_HUB_OFFLINE is set"):
        pull(SPEC, tmp_path, endpoint=hub.url)
    assert hub.seen == []


def test_a_disk_without_room_is_said_before_the_download(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = hub_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(FundamentError, match=r"are still to come and .* has room for 0\.0 GB.*--data-dir"):
        pull(SPEC, tmp_path, endpoint=hub.url)
    assert hub.fetched == []


def test_a_disk_that_fills_up_is_said(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hub_module.os, "fsync", full)
    with pytest.raises(FundamentError, match=r"The disk of .* is full; make room and pull again to go on"):
        pull(SPEC, tmp_path, endpoint=hub.url)


def test_a_data_directory_that_cannot_be_made_is_said(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FundamentError, match=r"file/models.*: Not a directory; choose another place: --data-dir"):
        pull(SPEC, tmp_path / "file", endpoint=hub.url)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (replace(SPEC, repo=""), "None are public"),
        (replace(SPEC, family="of_another_time"), "not served by this release yet"),
        (replace(SPEC, licence="CC-BY-NC-4.0"), r"CC-BY-NC-4\.0: commercial use needs .* jinaai.* --accept-licence"),
    ],
)
def test_what_must_not_be_pulled_is_refused(spec: ModelSpec, sentence: str) -> None:
    with pytest.raises(FundamentError, match=sentence):
        refuse_unpullable(spec)


def test_an_accepted_licence_is_enough() -> None:
    refuse_unpullable(replace(SPEC, licence="CC-BY-NC-4.0"), accept_licence=True)
    refuse_unpullable(SPEC)


def test_a_running_engine_sees_a_model_that_comes(hub: Hub, tmp_path: Path) -> None:
    assert pulled(tmp_path) == {}
    engine = LocalEngine({}, EngineOptions(), Metrics())
    local = pull(SPEC, tmp_path, endpoint=hub.url)
    engine.refresh(pulled(tmp_path))
    assert engine.locals == {SPEC.id: local}
    asyncio.run(engine.close())
