"""How well classifiers learn: a CSV file of `text,label`, some of each label to learn from, the others to be tested on.

    python benchmarks/classify.py
    python benchmarks/classify.py FILE --per-label 10 --seeds 3

Beside the server's own fit stand scikit-learn's logistic regression on the same vectors, the labels' own words (what
`POST /v1/classify` does with `labels`) and the nearest mean vector.
"""

import argparse
import csv
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from contest import machine, table, verdict
from direct import DirectEngine
from fundament.classifiers import Examples, Floats, apply, fit, likeness, read_examples, write_examples
from fundament.vectors import shorten

INTENTS = Path(__file__).parents[1] / "tests" / "intents.csv"
N_PARTS = 4
N_BINS = 10

Classes = NDArray[np.int16]


def read(file: Path) -> dict[str, list[str]]:
    """The texts of each label."""
    texts: dict[str, list[str]] = defaultdict(list)
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            texts[row["label"]].append(row["text"])
    return texts


def split(texts: dict[str, list[str]], per_label: int, seed: int) -> tuple[list[str], Classes, list[str], Classes]:
    """Texts to learn from with their classes, and texts to be tested on with theirs; shuffled."""
    random = Random(seed)
    train, test = [], []
    for number, label in enumerate(texts):
        own = [(text, number) for text in random.sample(texts[label], len(texts[label]))]
        train += own[:per_label]
        test += own[per_label:]
    random.shuffle(train)
    (known, known_classes), (asked, asked_classes) = (zip(*pairs, strict=True) for pairs in (train, test))
    return list(known), np.array(known_classes, np.int16), list(asked), np.array(asked_classes, np.int16)


def ours(examples: Examples, n_classes: int, questions: Floats) -> Floats:
    """A classifier that is made of all examples at once."""
    return apply(fit(examples, n_classes), questions)


def in_parts(examples: Examples, n_classes: int, questions: Floats) -> Floats:
    """One that is made of a part and updated with the others, each kept as it is stored."""
    parts = [
        write_examples(Examples(vectors, classes))
        for vectors, classes in zip(
            np.array_split(examples.vectors, N_PARTS), np.array_split(examples.classes, N_PARTS), strict=True
        )
    ]
    return ours(read_examples(parts), n_classes, questions)


def reference(examples: Examples, n_classes: int, questions: Floats) -> Floats:
    """scikit-learn on the same vectors."""
    del n_classes
    model = LogisticRegression(C=100, max_iter=1_000).fit(examples.vectors.astype(np.float32), examples.classes)
    return model.predict_proba(questions)


def nearest_mean(examples: Examples, n_classes: int, questions: Floats) -> Floats:
    """By likeness to the middle of each class."""
    vectors = examples.vectors.astype(np.float32)
    means = np.stack([vectors[examples.classes == number].mean(axis=0) for number in range(n_classes)])
    return likeness(questions, shorten(means, None, normalized=True))


def by_words(words: Floats, examples: Examples, n_classes: int, questions: Floats) -> Floats:
    """By likeness to the labels themselves; nothing is learned."""
    del examples, n_classes
    return likeness(questions, words)


def calibration_error(likely: Floats, classes: Classes) -> float:
    """By how much a score differs from how often it is right, averaged over ten equal ranges of scores."""
    best, right = likely.max(axis=1), likely.argmax(axis=1) == classes
    bins = np.minimum((best * N_BINS).astype(int), N_BINS - 1)
    inside = [bins == number for number in np.unique(bins)]
    return float(sum(abs(best[each].mean() - right[each].mean()) * each.mean() for each in inside))


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=INTENTS, help="a CSV file with columns text and label")
    parser.add_argument("--per-label", type=int, default=24, help="texts of each label to learn from")
    parser.add_argument("--seeds", type=int, default=5, help="how many divisions of the texts")
    asked = parser.parse_args()
    print(machine())
    texts = read(asked.file)
    labels, engine = list(texts), DirectEngine()

    def embed(given: Sequence[str]) -> Floats:
        return shorten(engine.embed(given), None, normalized=True)

    contestants = {
        "Fundament": ours,
        f"the same in {N_PARTS} parts": in_parts,
        "scikit-learn, C=100": reference,
        "nearest mean": nearest_mean,
        "the labels' words": partial(by_words, embed(labels)),
    }
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for seed in range(asked.seeds):
        train, classes, test, right = split(texts, asked.per_label, seed)
        examples, questions = Examples(embed(train).astype(np.float16), classes), embed(test)
        for name, learn in contestants.items():
            started = time.perf_counter()
            likely = learn(examples, len(labels), questions)
            seconds = time.perf_counter() - started
            accuracy = float((likely.argmax(axis=1) == right).mean())
            found[name].append((accuracy, calibration_error(likely, right), seconds))
    engine.close()
    table(
        f"{asked.file.name}: {len(labels)} labels, {len(train)} texts to learn from, {len(test)} to be tested on, "
        f"means of {asked.seeds} divisions",
        ("", "accuracy", "calibration error", "seconds"),
        [
            (name, f"{100 * accuracy:.1f} %", f"{error:.3f}", f"{seconds:.3f}")
            for name, (accuracy, error, seconds) in ((name, np.mean(values, axis=0)) for name, values in found.items())
        ],
    )
    at_once, parts, theirs = (100 * float(np.mean(found[name], axis=0)[0]) for name in list(contestants)[:3])
    verdict("accuracy above scikit-learn's, in points", at_once - theirs, ">=", -1)
    verdict("accuracy in parts above that at once, in points", parts - at_once, ">=", -1)
    verdict("longest fit", max(seconds for *_, seconds in found["Fundament"]), "<", 3, " s")


if __name__ == "__main__":
    main()
