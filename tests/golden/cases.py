"""What every model is asked: one list for all, from what the catalogue says that a model reads and gives.

A case is written in the words of the API, so that a golden file says by itself what its vectors are of.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from fundament.catalog import ModelSpec, Task

Case = dict[str, Any]
"""`input` with `output`, `task`, `role`, or `query` with `documents`; a picture is `{"image": <a PNG in base64>}`."""

QUERY = "What is the capital of Germany?"
TEXTS = [
    QUERY,
    "Berlin is the capital and largest city of Germany.",
    "東京は日本の首都です。",
    "def square(x): return x * x",
    "naïve café 🙂",
]


def picture() -> str:
    """A small picture of slopes, edges and a disc, drawn without chance, as base64 of a PNG."""
    height, width = 90, 120  # no multiples of any model's patches
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([2 * x, 2 * y, 255 * ((x // 15 + y // 15) % 2)], axis=-1).astype(np.uint8)
    pixels[(x - 80) ** 2 + (y - 40) ** 2 < 900] = (220, 40, 60)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def cases(spec: ModelSpec) -> Iterator[Case]:
    """What a model is asked: its outputs, tasks and sides on texts, and on a picture where it reads such."""
    pictures = [{"image": picture()}] if "image" in spec.modalities else []
    if spec.kind == "reranker":
        yield {"query": QUERY, "documents": TEXTS}
        if pictures:
            yield {"query": QUERY, "documents": pictures}
            yield {"query": pictures[0], "documents": TEXTS}
        return
    tasks = ([] if spec.default_task else [(None, Task())]) + list(spec.tasks.items())
    # Models that only give weights or vectors per token read queries and documents in two ways, whatever the task.
    roles = (None,) if "dense" in spec.outputs else ("query", "document")
    for output in spec.outputs:
        for task in _different(tasks, "prompt", "adapter"):
            for role in roles:
                yield {"input": TEXTS, "output": output, "task": task, "role": role}
        for task in _different(tasks, "adapter") if pictures else ():  # a picture is read without a prompt
            yield {"input": pictures, "output": output, "task": task, "role": None}


def _different(tasks: Sequence[tuple[str | None, Task]], *facts: str) -> list[str | None]:
    """The first task of each kind: those that differ in no fact would be asked the same twice."""
    first: dict[tuple[Any, ...], str | None] = {}
    for name, task in tasks:
        first.setdefault(tuple(getattr(task, fact) for fact in facts), name)
    return list(first.values())
