"""The programs of measurement still run; what they print means nothing at this size."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "accounts.py --only door limits --rounds 1 --seconds 0.1",
        "adapters.py --layers 1 --rounds 1",
        "attention.py",
        "classify.py --seeds 1 --per-label 1",
        "engine.py --texts 1 --rounds 1",
        "engine.py --budget --texts 1 --rounds 1",
        "engine.py --threads --texts 1 --rounds 1 --shapes 64x1",
        "families.py --texts 1 --rounds 1",
        "images.py --layers 1 --images 1 --rounds 1",
        "jobs.py --only rate queries --lines 1 --rounds 1",
        "listwise.py --layers 2 --rounds 1 --documents 8",
        "loading.py --layers 1 --rounds 1",
        "rerank.py --documents 1 --rounds 1",
        "server.py --only crowd added gap start both --rounds 1 --seconds 0.1",
    ],
)
def test_a_program_runs_to_its_end(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUNDAMENT_DATA_DIR", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    program, *options = command.split()
    ran = subprocess.run(
        [sys.executable, str(FOLDER / program), *options], capture_output=True, text=True, check=False, timeout=600
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout
