"""How near the embedded model's vectors are to those of sentence-transformers in float32.

    python benchmarks/quality.py
    python benchmarks/quality.py --per-length 10

Texts of every length from 1 to 256 tokens, each alone in its batch and in company that changes from round to round.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

import corpus
from contest import formats, machine, table, verdict
from direct import DirectEngine, Reference
from fundament.backbone.device import Dtype

LONGEST = 256
TARGETS: dict[Dtype, float] = {"float32": 0.99999, "float16": 0.99999, "bfloat16": 0.9998}

Vectors = NDArray[np.float32]
Cosines = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sample:
    """Texts, their lengths in tokens, and the vectors that are right."""

    texts: list[str]
    lengths: list[int]
    expected: Vectors


def sample_of(per_length: int) -> Sample:
    """`per_length` texts of each length; the shortest are one token and two special ones."""
    random = Random(5)
    lengths = [n for n in range(corpus.N_SPECIAL + 1, LONGEST + 1) for _ in range(per_length)]
    texts = [corpus.text_of(n, random) for n in lengths]
    return Sample(texts, lengths, Reference().embed(texts))


def cosines(a: Vectors, b: Vectors) -> Cosines:
    """Of each row of `a` with the same row of `b`."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    return (a64 * b64).sum(axis=1) / np.linalg.norm(a64, axis=1) / np.linalg.norm(b64, axis=1)


def alone(engine: DirectEngine, texts: list[str]) -> Vectors:
    """Each text in a call of its own, one after the other."""
    return np.concatenate([engine.embed([text]) for text in texts])


def in_company(engine: DirectEngine, texts: list[str], n_rounds: int) -> Iterator[Vectors]:
    """All texts in calls of 50, shuffled anew in each round; vectors in the order of `texts`."""
    random = Random(6)
    for _ in range(n_rounds):
        order = random.sample(range(len(texts)), len(texts))
        calls = [order[start : start + 50] for start in range(0, len(order), 50)]
        shuffled = np.concatenate([engine.embed([texts[place] for place in call]) for call in calls])
        vectors = np.empty_like(shuffled)
        vectors[order] = shuffled
        yield vectors


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-length", type=int, default=2, help="texts of each length")
    parser.add_argument("--rounds", type=int, default=3, help="companies that each text is put in")
    asked = parser.parse_args()
    print(machine())
    sample = sample_of(asked.per_length)
    lines, least = [], {}
    for dtype in formats():
        engine = DirectEngine(dtype)
        single = alone(engine, sample.texts)
        together = list(in_company(engine, sample.texts, asked.rounds))
        engine.close()
        found = {
            "alone": [cosines(single, sample.expected)],
            "in company": [cosines(vectors, sample.expected) for vectors in together],
            "alone with in company": [cosines(vectors, single) for vectors in together],
        }
        for name, values in found.items():
            lowest = np.min(values, axis=0)
            worst = int(lowest.argmin())
            cells = (f"{np.mean(values):.7f}", f"{lowest[worst]:.7f}", f"{1 - lowest[worst]:.1e}")
            lines.append((f"{dtype}, {name}", *cells, f"{sample.lengths[worst]}"))
        least[dtype] = min(float(np.min(found[name])) for name in ("alone", "in company"))
    table(
        f"Cosine with sentence-transformers float32, {len(sample.texts):,} texts of {sample.lengths[0]} to {LONGEST} "
        f"tokens with special ones, {asked.rounds} companies",
        ("", "mean", "least", "1 - least", "tokens there"),
        lines,
    )
    for dtype in formats():
        verdict(f"least cosine in {dtype}", least[dtype], ">=", TARGETS[dtype])


if __name__ == "__main__":
    main()
