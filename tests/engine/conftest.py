"""A model's directory, to be changed."""

import shutil
from pathlib import Path

import pytest

from tests.hub import make_bert


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("made"))


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """A directory of the operator's own, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "own"))
