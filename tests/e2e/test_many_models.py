"""A started server with more models than its memory budget holds, and clients that want them all."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from torch import bfloat16

from fundament.core import Embed
from fundament.engine.loading import load_model, needed_bytes
from fundament.engine.local import finish
from fundament.engine.weights import Local
from tests.conftest import FLOAT32
from tests.engine.berts import bert
from tests.served import Served, serving, wait_until

TEXTS = ["the search engine", "what people mean"]
# Saved in bfloat16 and served in float32: 100 MB that are copied, not mapped, so that they show.
VOCAB = 100_000

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's own count")


@pytest.fixture(scope="module")
def berts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Local]:
    folder = tmp_path_factory.mktemp("many")
    names = [f"model-{seed}" for seed in range(4)]
    return {name: bert(folder / name, seed, vocab=VOCAB, dtype=bfloat16) for seed, name in enumerate(names)}


@pytest.fixture(scope="module")
def alone(berts: dict[str, Local]) -> dict[str, np.ndarray]:
    """What each model answers where there is no other."""
    found = {}
    for name, local in berts.items():
        model = load_model(local, FLOAT32)
        items = model.prepare(call := Embed(inputs=TEXTS))
        vectors = finish(model, call, items, model.forward(items)).vectors
        found[name] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return found


@pytest.fixture
def server(berts: dict[str, Local], tmp_path: Path) -> Iterator[Served]:
    """Room for two and a half."""
    room = 2.5 * needed_bytes(berts["model-0"], FLOAT32) / 1e9
    models = ",".join(f"{name}={local.directory}" for name, local in berts.items())
    settings = {"models": models, "memory_gb": room, "preload": False, "dtype": "float32", "idle_seconds": 3}
    with serving(tmp_path, **settings) as server:
        yield server


def anonymous_bytes(server: Served) -> int:
    """Memory of the server that is no file's."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_clients_that_want_more_models_than_fit_get_right_answers(
    server: Served, berts: dict[str, Local], alone: dict[str, np.ndarray]
) -> None:
    def ask(name: str) -> None:
        answer = server.http.post("/v1/embeddings", json={"model": name, "input": TEXTS})
        assert answer.status_code == 200, answer.text
        vectors = np.array([item["embedding"] for item in answer.json()["data"]])
        np.testing.assert_allclose(vectors, alone[name], atol=1e-5, err_msg=name)

    size = needed_bytes(berts["model-0"], FLOAT32)
    ask("model-0")
    with_one = anonymous_bytes(server)
    for name in [*berts] * 2:
        ask(name)
        assert anonymous_bytes(server) - with_one < 2.5 * size
    with ThreadPoolExecutor(8) as clients:
        list(clients.map(ask, [*berts] * 4))
    assert anonymous_bytes(server) - with_one < 2.5 * size  # all four would be three more than the first

    # Each was loaded once for each time that it was there.
    wait_until(lambda: Counter(loads(server)) == Counter(departures(server)), "all models to be let go")
    assert server.metrics()["fundament_model_loads_total"] == len(loads(server))
    assert set(loads(server)) == set(berts)
    wait_until(lambda: anonymous_bytes(server) < with_one - size / 4, "the memory of the last")


def loads(server: Served) -> list[str]:
    return [event["model"] for event in server.events() if event["event"] == "model loaded"]


def departures(server: Served) -> list[str]:
    words = ("model evicted", "model let go after idling")
    return [event["model"] for event in server.events() if event["event"] in words]
