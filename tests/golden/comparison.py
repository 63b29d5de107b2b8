"""Comparing a loaded model with the cases of a golden file."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fundament.core import Embed, Embeddings, Media, Model, MultiVectors, Ranking, Rerank, SparseVectors
from fundament.engine.local import finish
from tests.golden.cases import Case

TOLERANCE = 1e-4  # of the numbers of unit vectors, scores and weights; both sides run in float32


def differences(model: Model[Any, Any], cases: Sequence[Case]) -> list[str]:
    """The inputs that the model answers otherwise than its publisher's code, each in words."""
    found = []
    for case in cases:
        asked = ", ".join(f"{name} {case[name]}" for name in ("output", "task", "role") if case.get(name)) or "ranking"
        for place, (ours, theirs) in enumerate(zip(answer(model, case), case["answer"], strict=True)):
            if (far := distance(ours, theirs)) > TOLERANCE:
                found.append(f"{asked}: input {place} differs by {far:.3g}")
    return found


def answer(model: Model[Any, Any], case: Case) -> Sequence[Any]:
    """What the model makes of a case, per input: a score, a unit vector, unit vectors of tokens, or weights."""
    call = _call(case)
    items = model.prepare(call)
    match finish(model, call, items, model.forward(items)):
        case Ranking(scores=scores):
            return list(scores)
        case Embeddings(vectors=vectors) | MultiVectors(vectors=vectors):
            return [vector / np.linalg.norm(vector, axis=-1, keepdims=True) for vector in vectors]
        case SparseVectors(weights=weights):
            return weights
        case other:
            raise TypeError(f"no answer to a case: {type(other).__name__}")


def distance(ours: Any, theirs: Any) -> float:
    """The largest difference of a number; a token that has no weight weighs nothing."""
    if isinstance(theirs, Mapping):
        return max((abs(ours.get(token, 0) - theirs.get(token, 0)) for token in {*ours, *theirs}), default=0.0)
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf")


def _call(case: Case) -> Embed | Rerank:
    if "query" in case:
        return Rerank(query=_read(case["query"]), documents=[_read(value) for value in case["documents"]])
    inputs = [_read(value) for value in case["input"]]
    return Embed(inputs=inputs, output=case["output"], task=case["task"], role=case["role"])


def _read(value: Any) -> str | Media:
    return value if isinstance(value, str) else Media("image", base64.b64decode(value["image"]))
