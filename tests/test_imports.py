"""What `src` may import: references of the tests, and what they bring, stay outside."""

import ast
from collections.abc import Iterator
from pathlib import Path

import fundament

OUTSIDE = {"accelerate", "diffusers", "einops", "peft", "sentence_transformers", "timm", "torchvision", "transformers"}


def imported(file: Path) -> Iterator[str]:
    """The packages that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_no_reference_is_imported() -> None:
    files = sorted(Path(fundament.__file__).parent.rglob("*.py"))
    found = {file.name: set(imported(file)) for file in files}
    assert any("torch" in names for names in found.values())
    assert {name: names & OUTSIDE for name, names in found.items() if names & OUTSIDE} == {}
