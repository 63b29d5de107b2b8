"""Other people's rerank clients, unchanged, against a started server."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.served import MODEL, Served

PROGRAM = Path(__file__).with_name("rerank_clients.py")
QUERY = "Which planet has rings?"
TEXTS = ["Bread is baked in an oven.", "Saturn is known for its rings.", "Mars is a red planet."]
OBJECTS = [{"text": text, "id": str(place)} for place, text in enumerate(TEXTS)]
ORDER = [1, 2, 0]
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false"}  # nothing is fetched or sent elsewhere


def ask(client: str, server: Served, *requests: dict[str, Any]) -> Any:
    """What a client of that name shows for each request: `[index, score, document]` of each result, or its error."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), client, server.url],
        input=json.dumps([{"model": MODEL, "query": QUERY, **fields} for fields in requests]),
        env={**os.environ, **QUIET},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_litellm(server: Served) -> None:
    whole, best, bare = ask(
        "litellm",
        server,
        {"documents": TEXTS},
        {"documents": OBJECTS, "top_n": 1},
        {"documents": TEXTS, "top_n": 2, "return_documents": False},
    )
    assert [(index, document) for index, _, document in whole] == [(place, {"text": TEXTS[place]}) for place in ORDER]
    assert best == whole[:1]
    assert bare == [[index, score, None] for index, score, _ in whole[:2]]


def test_langchain(server: Served) -> None:
    found, refused = ask("langchain", server, {"documents": TEXTS, "top_n": 2}, {"documents": TEXTS, "model": "other"})
    assert [(index, document) for index, _, document in found] == [(place, TEXTS[place]) for place in ORDER[:2]]
    assert found[0][1] > found[1][1]
    assert "Model 'other' not found" in refused["error"]


def test_cohere(server: Served) -> None:
    texts, objects, best, refused = ask(
        "cohere",
        server,
        {"documents": TEXTS, "return_documents": True, "max_chunks_per_doc": 5},
        {"documents": OBJECTS, "return_documents": True},
        {"documents": OBJECTS, "top_n": 1, "rank_fields": ["text"]},
        {"documents": OBJECTS, "rank_fields": ["id"]},
    )
    assert [(index, document) for index, _, document in texts] == [(place, TEXTS[place]) for place in ORDER]
    assert [(index, document) for index, _, document in objects] == [(place, OBJECTS[place]) for place in ORDER]
    assert best == objects[:1]
    assert 1 > texts[0][1] > texts[1][1] > 0
    assert "rank_fields" in refused["error"]


def test_cohere_v2(server: Served) -> None:
    whole, best, refused = ask(
        "cohere_v2",
        server,
        {"documents": TEXTS},
        {"documents": TEXTS, "top_n": 1},
        {"documents": TEXTS, "model": "other"},
    )
    assert [(index, document) for index, _, document in whole] == [(place, None) for place in ORDER]
    assert best == whole[:1]
    assert "Model 'other' not found" in refused["error"]
