"""Make `MODEL-ID.json`: what a model answers by its publisher's code, for `tests/parity/test_weights.py`.

    python -m tests.golden.make jina-embeddings-v3
    python -m tests.golden.make jina-embeddings-v3=/models/jina-embeddings-v3

Run by hand in the root of the repository, where a hub is reachable. It executes code out of the model's repository
(`trust_remote_code`), which the server never does; some repositories want an older transformers than the tests have,
and bge-m3 wants FlagEmbedding, so give it an environment of its own. `elser-v2` is on no hub: name a directory of a
SPLADE model that is served under that name.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fundament.catalog import CATALOG, ModelSpec
from tests.golden.cases import cases
from tests.golden.publishers import publisher_of

_NOT_NEEDED = ["onnx/*", "openvino/*", "*.onnx", "*.onnx_data", "*.gguf", "coreml/*"]


def make(spec: ModelSpec, directory: str) -> dict[str, Any]:
    """All cases of a model with the publisher's answers, in 5 decimals."""
    answer = publisher_of(spec)(spec, directory)
    return {
        "model": spec.id,
        "revision": spec.revision,
        "made_with": {name: version(name) for name in ("torch", "transformers")},
        "cases": [{**case, "answer": [_plain(value) for value in answer(case)]} for case in cases(spec)],
    }


def _plain(value: Any) -> Any:
    """A score, a vector, vectors or weights as JSON has them."""
    if isinstance(value, dict):
        return {token: round(float(weight), 5) for token, weight in value.items()}
    return np.asarray(value, dtype=np.float64).round(5).tolist()


def _download(spec: ModelSpec) -> str:
    from huggingface_hub import snapshot_download

    if not spec.repo:
        raise SystemExit(f"{spec.id} is on no hub: python -m tests.golden.make {spec.id}=DIR")
    return str(snapshot_download(spec.repo, revision=spec.revision, ignore_patterns=_NOT_NEEDED))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        model, _, directory = argument.partition("=")
        made = make(CATALOG[model], directory or _download(CATALOG[model]))
        (Path(__file__).parent / f"{model}.json").write_text(json.dumps(made, ensure_ascii=False))
