"""Catalogue entries whose vectors have another length, so that tiny checkpoints can stand for published models.

As a program it is the command `fundament` with such entries: `python tiny.py '{"jina-clip-v2": 64}' serve`.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace

import pytest

from fundament.catalog import CATALOG
from fundament.cli import app
from fundament.engine import weights


def resize(patch: pytest.MonkeyPatch, dims: Mapping[str, int]) -> None:
    """Give catalogue entries the length of vectors that their tiny checkpoints have, by id."""
    resized = {model: replace(CATALOG[model], dim=dim) for model, dim in dims.items()}
    patch.setattr(weights, "CATALOG", {**CATALOG, **resized})


if __name__ == "__main__":
    resize(pytest.MonkeyPatch(), json.loads(sys.argv.pop(1)))
    app()
