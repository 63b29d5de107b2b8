"""Which pages' scripts may call the server: what a browser asks before it sends, and what it then lets them read."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fundament.config import Settings
from tests.accounts.keys import bearer, make_key
from tests.inprocess import Api, running
from tests.served import MODEL

PAGE = "https://app.example.com"
BODY = {"model": MODEL, "input": "a text"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("origins")


@pytest.fixture(scope="module")
def api(folder: Path) -> Iterator[Api]:
    with running(folder, auth=True, cors_origins=[PAGE]) as api:
        yield api


def ask_first(api: Api, origin: str) -> httpx.Response:
    """What a browser asks before it sends a request with a key."""
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    return api.run(api.client.options("/v1/embeddings", headers={"Origin": origin, **asked}))


def test_a_browser_may_send_keys_for_a_page_that_is_listed(api: Api) -> None:
    allowed = ask_first(api, PAGE)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == PAGE
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert "authorization" in allowed.headers["access-control-allow-headers"]


@pytest.mark.parametrize("with_key", [True, False])
def test_a_listed_page_reads_answers_errors_and_headers(api: Api, folder: Path, *, with_key: bool) -> None:
    headers = {"Origin": PAGE, **(bearer(make_key(folder)) if with_key else {})}
    answer = api.run(api.client.post("/v1/embeddings", json=BODY, headers=headers))
    assert answer.status_code == (200 if with_key else 401)
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert answer.headers["access-control-expose-headers"] == "*"


def test_other_pages_are_kept_out(api: Api) -> None:
    refused = ask_first(api, "https://elsewhere.example.com")
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers


def test_no_page_is_let_in_unasked(tmp_path: Path) -> None:
    with running(tmp_path) as api:
        answer = api.run(api.client.post("/v1/embeddings", json=BODY, headers={"Origin": PAGE}))
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "origin", ["app.example.com", "https://app.example.com/", "https://a b", "https://App.com", "https://a.com:443"]
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="is no origin as browsers say it"):
        Settings(cors_origins=[origin])
