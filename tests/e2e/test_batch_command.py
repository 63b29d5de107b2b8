"""`fundament batch` against a started server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tests.served import Served


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    (tmp_path / "b.csv").write_text('id,text\nx,hello\ny,"a, b"\n')
    parquet.write_table(pyarrow.table({"id": [7, 8], "text": ["p", None]}), tmp_path / "c.parquet")
    return tmp_path


def batch(server: Served, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fundament", "batch", *arguments],
        env={**os.environ, "FUNDAMENT_URL": server.url},
        cwd=folder,
        capture_output=True,
        check=False,
        text=True,
    )


def test_files_become_vectors(server: Served, folder: Path) -> None:
    files = ["a.txt", "b.csv", "c.parquet"]
    submitted = batch(server, folder, "submit", *files, "--embedding-type", "base64")
    assert submitted.returncode == 0, submitted.stderr
    assert submitted.stdout.split() == [(folder / f"{name}.job").read_text().strip() for name in files]
    waited = batch(server, folder, "wait", *files)
    assert waited.returncode == 0, waited.stderr
    assert "c.parquet: completed, 1 of 2 lines, 1 failed" in waited.stdout
    assert batch(server, folder, "fetch", *files).returncode == 0
    ids = [
        [json.loads(line)["custom_id"] for line in (folder / f"{name}.output.jsonl").read_text().splitlines()]
        for name in files
    ]
    assert ids == [["0", "1", "2"], ["x", "y"], ["7"]]
    [error] = (folder / "c.parquet.errors.jsonl").read_text().splitlines()
    assert json.loads(error)["custom_id"] == "8"
    cancelled = batch(server, folder, "cancel", "a.txt")
    assert (cancelled.returncode, "has ended already" in cancelled.stderr) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("submit", "none.txt"), "cannot be read"),
        (("submit", "a.bin"), "give .jsonl, .csv, .parquet or .txt"),
        (("submit", "a.txt", "--model", "no-such-model"), "not found"),
        (("status", "a.txt"), "has not been handed in"),
        (("status", "batch_none"), "not found or access denied"),
        (("status", "batch_none", "--url", "http://127.0.0.1:9"), "does not answer"),
    ],
)
def test_what_goes_wrong_is_said_in_a_line(server: Served, folder: Path, arguments: list[str], said: str) -> None:
    ran = batch(server, folder, *arguments)
    assert ran.returncode == 1
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr
