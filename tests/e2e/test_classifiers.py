"""Classifiers outlive the process that trained them, however it ends."""

import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from fundament.store import classifiers
from fundament.store.database import connected, locate
from tests.served import MODEL, Served, serving

EXAMPLES = [
    {"text": "a cat sleeps on the sofa", "label": "animal"},
    {"text": "the dog barks at the postman", "label": "animal"},
    {"text": "shares fell sharply", "label": "money"},
    {"text": "the bank raises its interest rate", "label": "money"},
]
MORE = [{"text": "a red rose", "label": "plant"}, {"text": "the oak sheds its leaves", "label": "plant"}]


def train(server: Served, given: list[dict[str, str]], **fields: Any) -> httpx.Response:
    return server.http.post("/v1/train", json={"input": given, **fields})


def classified(server: Served, classifier_id: str) -> Any:
    response = server.http.post("/v1/classify", json={"classifier_id": classifier_id, "input": ["puppies", "tulips"]})
    assert response.status_code == 200, response.text
    return response.json()["data"]


def mark(folder: Path, until: datetime) -> None:
    """Leave what an update leaves whose process was killed."""
    with connected(locate("", folder)) as connection:
        connection.execute(classifiers.classifiers.update().values(held_by="a dead process", held_until=until))


def test_a_killed_server_loses_nothing_that_it_has_answered(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        classifier_id = train(server, EXAMPLES, model=MODEL).json()["classifier_id"]
        assert train(server, MORE, classifier_id=classifier_id).status_code == 200
        learned = classified(server, classifier_id)
        server.signal(signal.SIGKILL)
        server.exit_code()
    mark(tmp_path, datetime.now(UTC) + timedelta(hours=1))
    with serving(tmp_path) as server:
        assert [item["prediction"] for item in learned] == ["animal", "plant"]
        assert classified(server, classifier_id) == learned
        assert train(server, MORE, classifier_id=classifier_id).status_code == 409
        mark(tmp_path, datetime.now(UTC) - timedelta(seconds=1))
        assert train(server, MORE, classifier_id=classifier_id).status_code == 200
