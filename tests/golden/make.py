"""Make `MODEL-ID.json`: a model's vectors by the publisher's own code, for `tests/parity/test_weights.py`.

    python tests/golden/make.py jina-embeddings-v3
    python tests/golden/make.py jina-embeddings-v3=/models/jina-embeddings-v3

Run by hand where a hub is reachable. It executes code out of the model's repository (`trust_remote_code`), which the
server never does; some repositories want an older transformers than the tests have, so give it an environment of its
own. Prompts and adapters are put to the publisher's code by the names of the catalogue.
"""

import json
import sys
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

from fundament.catalog import CATALOG, Task

TEXTS = [
    "What is the capital of Germany?",
    "Berlin is the capital and largest city of Germany.",
    "東京は日本の首都です。",
    "def square(x): return x * x",
    "naïve café 🙂",
]


def make(model: str, directory: str) -> None:
    spec = CATALOG[model]
    network = SentenceTransformer(
        directory or spec.repo,
        revision=None if directory else spec.revision,
        trust_remote_code=True,
        device="cpu",
        model_kwargs={"dtype": torch.float32},
    )
    cases = []
    for name, task in {None: Task(), **spec.tasks}.items():
        if name is None and spec.default_task is not None:
            continue  # such a model has no vectors without a task
        chosen = {"task": task.adapter} if task.adapter else {}
        vectors = network.encode(TEXTS, prompt=task.prompt or None, normalize_embeddings=True, **chosen)
        cases.append({"task": name, "texts": TEXTS, "vectors": vectors.astype(float).round(6).tolist()})
    made = {"model": model, "revision": spec.revision, "torch": torch.__version__, "cases": cases}
    (Path(__file__).parent / f"{model}.json").write_text(json.dumps(made, ensure_ascii=False))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        model, _, directory = argument.partition("=")
        make(model, directory)
