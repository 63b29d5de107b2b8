"""The command `fundament` with models whose threads die over the text `die`: `python mortal.py serve`."""

from collections.abc import Sequence

import numpy as np

from fundament.cli import app
from fundament.core import Array, Call, Item, Model
from fundament.engine import local


def die_over(model: Model) -> Model:
    """The model, with a fault that leaves its thread no way to go on."""
    prepare, forward = model.prepare, model.forward

    def prepared(call: Call) -> Sequence[Item]:
        items = prepare(call)
        for item, text in zip(items, call.texts, strict=True):
            if text == "die":
                item.features["deadly"] = np.array(True)
        return items

    def forwarded(items: Sequence[Item]) -> list[Array]:
        if any("deadly" in item.features for item in items):
            raise SystemExit("the driver has gone")
        return forward(items)

    model.prepare, model.forward = prepared, forwarded
    return model


if __name__ == "__main__":
    load_model = local.load_model
    local.load_model = lambda *arguments: die_over(load_model(*arguments))
    app()
