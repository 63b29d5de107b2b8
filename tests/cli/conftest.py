from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory and a working directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUNDAMENT_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"
