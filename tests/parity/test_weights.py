"""Real weights against known answers. Runs with `-m weights` and `FUNDAMENT_WEIGHTS=/dir`, which holds `/dir/MODEL-ID`.

A model's answers are in `tests/golden/MODEL-ID.json`, made once by `tests/golden/make.py` from the publisher's code.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fundament.backbone.embedder import TextEmbedder
from fundament.backbone.packed import BASE, pack
from fundament.catalog import CATALOG
from fundament.core import Model
from fundament.engine.loading import load_model
from fundament.engine.weights import Local, embedded
from tests.conftest import FLOAT32
from tests.golden.comparison import differences

pytestmark = pytest.mark.weights

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = [spec.id for spec in CATALOG.values() if spec.kind != "chat"]


def load(model: str) -> Model:
    root = os.environ.get("FUNDAMENT_WEIGHTS")
    if (local := embedded()) is not None and local.spec.id == model:
        return load_model(local, FLOAT32)
    if not root:
        pytest.skip("FUNDAMENT_WEIGHTS names no directory with weights")
    directory = Path(root) / model
    if not directory.is_dir():
        where = "" if CATALOG[model].repo else ", which are on no hub: put a SPLADE model there that is served as it"
        pytest.skip(f"{directory} is not there: the weights of {model}{where}")
    return load_model(Local(CATALOG[model], directory), FLOAT32)


@pytest.mark.parametrize("model", MODELS)
def test_answers_are_those_of_the_publishers_code(model: str) -> None:
    path = GOLDEN / f"{model}.json"
    if not path.exists():
        how = model if CATALOG[model].repo else f"{model}=DIR, for it is on no hub"
        pytest.skip(f"{path.name} is not made yet: python -m tests.golden.make {how}")
    assert differences(load(model), json.loads(path.read_text())["cases"]) == []


# States of tokens 1 to 3, numbers 1 to 3, as the tests of transformers have them for the port.
V3_IDS = np.array([0, 345, 232, 328, 740, 140, 1695, 69, 6078, 1588, 2])
V3_STATES = {
    None: [[-2.1561, 1.8075, -0.1943], [-2.0813, 1.9855, -0.2760], [-2.1181, 2.0043, -0.1322]],
    "retrieval.query": [[-1.5202, 2.4074, -0.9706], [-1.5279, 2.4025, -1.1237], [-1.5252, 2.6143, -0.9416]],
}


@pytest.mark.parametrize("adapter", V3_STATES)
def test_v3_has_the_states_that_its_port_is_tested_with(adapter: str | None) -> None:
    model = load("jina-embeddings-v3")
    assert isinstance(model, TextEmbedder)
    # The port's test masks the first token. Nothing sees it, and rotations tell distances only: so it is left out.
    packed = pack([V3_IDS[1:]], torch.device("cpu"), [model.adapters[adapter] if adapter else BASE])
    found = model.transformer(packed)[:3, 1:4]
    torch.testing.assert_close(found, torch.tensor(V3_STATES[adapter]), atol=1e-3, rtol=1e-3)
