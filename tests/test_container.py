"""The Dockerfile names what the project has; building it needs a container engine."""

import re
import tomllib
from pathlib import Path

from fundament.config import Settings

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_the_image_has_every_extra_of_users() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.search(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, re.M)
    assert named is not None
    assert named[1].split(",") == sorted(extras.keys() - {"test", "dev"})


def test_its_variables_are_settings() -> None:
    named = [name.lower() for name in re.findall(r"\bFUNDAMENT_(\w+)=", DOCKERFILE)]
    assert named
    assert set(named) <= Settings.model_fields.keys()
