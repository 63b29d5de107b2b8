"""No way across tenants: every operation of the server's own document, walked with keys that may not.

Whatever endpoint is added is walked too. Where making its resource needs a body, `MAKE` holds one, so that there is
something of another tenant's to be reached for.
"""

import http.client
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from fundament.api.auth import OPEN, is_open
from tests.accounts.keys import bearer, id_of, make_key
from tests.contract.schemas import conforms
from tests.served import MODEL, Served, serving, wait_until
from tests.servers import database_on

MARK = "belongs-to-alice"
MAKE: Mapping[str, Mapping[str, Any]] = {
    "/v1/train": {
        "model": MODEL,
        "access": "private",
        "input": [{"text": "a cat", "label": MARK}, {"text": "shares fell", "label": "other"}],
    },
    "/v1/batch/embeddings": {"model": MODEL, "input": [{"custom_id": MARK, "body": {"input": MARK}}]},
}
"""Path of an operation to a body with which Alice makes something of her own; its strings may hold `MARK`."""

REACH: Mapping[str, Mapping[str, Any]] = {
    "/v1/train": {"input": [{"text": "a cat", "label": "other"}]},
    "/v1/classify": {"input": ["a cat"]},
}
"""Path of an operation to a body in which Bob can name something of Alice's, as `classifier_id`."""

STRANGE_IDS = [
    "x",
    "' OR '1'='1",
    "1; DROP TABLE keys; --",
    "%",
    "_" * 12,
    "../admin/keys",
    "../../v1/me",
    "..%2f..%2fetc%2fpasswd",
    "%00",
    "\N{PILE OF POO}",
    "9" * 400,
]
NO_LINKS = [
    *("", "expires=9999999999", "xsignature=1", "x=signature=1", "x;signature=1", "Signature=1", "+signature=1"),
    *("signature%3D1", "signature[]=1", "signature%00=1", "#signature=1", "?signature=1"),
]
FORGED_LINKS = [
    *("signature=1", "signature=", "signature", "%73ignature=1", "xsignature=1&signature=1", "signature=%00"),
    *(f"signature=1&expires={given}" for given in ("9999999999", "9" * 5_000, "-1", "1e9", "%00", "\N{PILE OF POO}")),
]
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the server's store is, on each database in turn; empty for the file in its data directory."""
    if request.param == "sqlite":
        yield ""
        return
    template = request.getfixturevalue("postgres_template")
    with database_on(request.getfixturevalue("postgres_url"), like=template) as url:
        yield url


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, store_url: str) -> Iterator[Served]:
    settings = {"auth": True, "threads": 1, "ip_refusals_per_minute": 0, "store_url": store_url}
    tiers = json.dumps({"free": {}})
    with serving(tmp_path_factory.mktemp("tenants"), tiers=tiers, **settings) as server:
        yield server


@pytest.fixture(scope="module")
def new_key(guarded: Served, store_url: str) -> Callable[..., str]:
    """Makes keys of that server."""
    return partial(make_key, guarded.log_file.parent, store_url)


@pytest.fixture(scope="module")
def document(guarded: Served) -> dict[str, Any]:
    found: dict[str, Any] = guarded.http.get("/openapi.json").json()
    return found


@pytest.fixture(scope="module")
def operations(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Every method and path that asks for a key."""
    found = [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]
    return [(method, path) for method, path in found if not is_open(path)]


@pytest.fixture(scope="module")
def alice(guarded: Served, new_key: Callable[..., str]) -> str:
    """A tenant with something of her own."""
    key = new_key()
    for path, body in MAKE.items():
        made = guarded.http.post(path, json=body, headers=bearer(key))
        assert made.is_success, made.text
    upload = {"file": (f"{MARK}.jsonl", b"{}"), "purpose": (None, "batch")}
    assert guarded.http.post("/v1/files", files=upload, headers=bearer(key)).is_success
    return key


def paths_of(template: str, ids: list[str]) -> list[str]:
    """A path with each id in the place of its parameters, written as a URL needs it."""
    if "{" not in template:
        return [template]
    return [re.sub(r"\{[^}]+\}", lambda _, each=each: quote(each, safe="%"), template) for each in ids]


def ids_in(value: Any) -> set[str]:
    """Every id that an answer holds."""
    if isinstance(value, list):
        return set().union(*map(ids_in, value))
    if not isinstance(value, dict):
        return set()
    own = {each for name, each in value.items() if isinstance(each, str) and re.fullmatch(r"(.*_)?id", name)}
    return own.union(*map(ids_in, value.values()))


def of(server: Served, key: str, operations: list[tuple[str, str]]) -> set[str]:
    """The ids of what a tenant can list."""
    lists = [path for method, path in operations if method == "GET" and "{" not in path]
    answers = [server.http.get(path, headers=bearer(key)) for path in lists]
    return set().union(
        *(ids_in(answer.json()) for answer in answers if answer.is_success and answer.content[:1] in b"{[")
    )


def test_the_open_paths_are_these(document: dict[str, Any]) -> None:
    assert {path for path in document["paths"] if is_open(path)} == {
        *("/live", "/health", "/healthz", "/ready"),
        *("/v1/models", "/v1/models/{model_id}"),
    }
    assert is_open("/docs/static/swagger-ui.css")
    assert OPEN - set(document["paths"]) == {"/", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}


def test_no_operation_answers_without_a_key_that_works(
    guarded: Served, operations: list[tuple[str, str]], alice: str, new_key: Callable[..., str]
) -> None:
    revoked = new_key()
    admin = bearer(new_key(admin=True))
    assert guarded.http.get("/v1/me", headers=bearer(revoked)).is_success
    assert guarded.http.delete(f"/v1/admin/keys/{id_of(revoked)}", headers=admin).is_success
    wait_until(lambda: guarded.http.get("/v1/me", headers=bearer(revoked)).status_code == 401, "the key to stop")
    attempts: list[dict[str, str]] = [
        {},
        {"Authorization": "Bearer none"},
        {"X-API-Key": alice, "Cookie": f"key={alice}"},
        bearer("jina_" + "a" * 60),
        bearer(revoked),
        bearer(alice[:-1] + ("a" if alice[-1] != "a" else "b")),
    ]
    templates = sorted({path for _, path in operations})
    assert len(templates) >= 8
    for template, headers in itertools.product(templates, attempts):
        path = paths_of(template, [id_of(alice)])[0]
        for method in METHODS:
            response = guarded.http.request(method, path, headers=headers, content=b"{}")
            assert response.status_code == 401, (method, path, headers, response.text)
            conforms(response)


def test_what_is_another_tenants_is_not_reached(
    guarded: Served, operations: list[tuple[str, str]], alice: str, new_key: Callable[..., str]
) -> None:
    bob = new_key()
    alices = of(guarded, alice, operations) | {id_of(alice)}
    bobs = of(guarded, bob, operations) | {id_of(bob)}
    assert not alices & bobs
    ids = [*sorted(alices), *STRANGE_IDS]
    for method, template in operations:
        for path in paths_of(template, ids):
            response = guarded.http.request(method, path, headers=bearer(bob), content=b"{}")
            assert response.status_code < 500, (method, path, response.text)
            if "{" in template:
                assert not response.is_success, (method, path, response.text)
            for secret in (*alices, MARK):
                assert secret in path or secret not in response.text, (method, path, response.text)
    for path, body in REACH.items():
        for name in alices:
            response = guarded.http.post(path, json={**body, "classifier_id": name}, headers=bearer(bob))
            assert response.status_code == 404, (path, response.text)
            assert MARK not in response.text
    assert of(guarded, alice, operations) | {id_of(alice)} == alices  # all of it is still there
    assert guarded.http.get("/v1/me", headers=bearer(alice)).json()["key"]["state"] == "active"


def test_strange_ids_are_nobodys(
    guarded: Served, operations: list[tuple[str, str]], new_key: Callable[..., str]
) -> None:
    admin = bearer(new_key(admin=True))
    for method, template in operations:
        if "{" in template:
            for path in paths_of(template, STRANGE_IDS):
                response = guarded.http.request(method, path, headers=admin, content=b"{}")
                assert response.status_code in (404, 405, 422), (method, path, response.text)
    assert guarded.http.get("/v1/admin/keys", headers=admin).json()["data"]


def test_strange_words_in_queries_are_refused_or_find_nothing(
    guarded: Served, document: dict[str, Any], new_key: Callable[..., str]
) -> None:
    admin = bearer(new_key(admin=True))
    asked = 0
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for name in (each["name"] for each in operation.get("parameters", []) if each["in"] == "query"):
                for word in STRANGE_IDS:
                    url = f"{path}?{name}={quote(word, safe='%')}"
                    response = guarded.http.request(method, url, headers=admin)
                    assert response.is_success or response.status_code in (404, 422), (url, response.text)
                    assert word != "%00" or not response.is_success, url
                    asked += 1
    assert asked >= 8 * len(STRANGE_IDS)


@pytest.mark.parametrize(
    ("path", "field"),
    [
        *(("/v1/files", field) for field in ("file", "purpose")),
        *(("/v1/bulk-embeddings", field) for field in ("file", "model", "email")),
    ],
)
def test_a_form_with_a_nul_is_refused(guarded: Served, alice: str, path: str, field: str) -> None:
    names = {"file": "x.jsonl", "model": MODEL, "email": "me@example.com", "purpose": "batch"}
    names[field] += "\0"
    form = "".join(
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in names.items()
        if name != "file"
    )
    form += f'--b\r\nContent-Disposition: form-data; name="file"; filename="{names["file"]}"\r\n\r\n"x"\r\n--b--\r\n'
    head = {**bearer(alice), "Content-Type": "multipart/form-data; boundary=b"}
    response = guarded.http.post(path, content=form.encode(), headers=head)
    assert response.status_code == 422, response.text
    assert response.json()["detail"] == f"{field}: It holds a NUL character."


def test_a_signature_opens_only_what_it_signs(guarded: Served, alice: str) -> None:
    [job] = guarded.http.get("/v1/batches", headers=bearer(alice)).json()
    for kind in ("output", "errors"):
        for path in (f"/v1/batch/{job['batch_id']}/{kind}", f"/v1/batch/x/{kind}"):
            for query in NO_LINKS:
                assert guarded.http.get(f"{path}?{query}").status_code == 401, (path, query)
            for query in FORGED_LINKS:
                assert guarded.http.get(f"{path}?{query}").status_code == 404, (path, query)
    for path in ("/v1/me", "/v1/batches", f"/v1/batch/{job['batch_id']}", f"/v1/files/{job['batch_id']}/content"):
        assert guarded.http.get(f"{path}?signature=1").status_code == 401, path


@pytest.mark.parametrize(
    "path",
    [
        "/v1/me/",
        "//v1/me",
        "/v1//me",
        "/V1/ME",
        "/v1/me;x",
        "/v1/me%20",
        "/docs/../v1/me",
        "/docs/%2e%2e/v1/me",
        "/v1/models/../me",
        "/v1/models/../admin/keys",
        "/v1/models/%2e%2e/admin/keys",
        "/v1/models/..%2fadmin%2fkeys",
        "/v1/admin/../admin/keys",
        "/metrics/",
        "http://127.0.0.1/v1/me",
    ],
)
def test_no_spelling_of_a_path_goes_round_the_door(guarded: Served, path: str) -> None:
    url = httpx.URL(guarded.url)
    connection = http.client.HTTPConnection(url.host, url.port or 80, timeout=30)
    connection.putrequest("GET", path, skip_host=False)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    assert answer.status in (400, 401, 404), body
    assert b"jina_" not in body.replace(b"starts with 'jina_'", b"")
