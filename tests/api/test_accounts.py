"""Keys, limits, balances and usage as a caller meets them, on a server that asks for keys."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fundament.config import TIERS
from tests.accounts.keys import bearer, id_of, make_key, read_key
from tests.contract.schemas import conforms
from tests.inprocess import running
from tests.served import MODEL, Served, serving, wait_until

TINY = {"tiny": {"requests_per_minute": 3}, "few": {"tokens_per_minute": 50}, "alone": {"concurrency": 1}}
TEXT = "hello there my friend"  # 6 tokens
UNKNOWN = "jina_" + "a" * 60


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that asks for keys."""
    with serving(tmp_path_factory.mktemp("guarded"), auth=True, tiers=json.dumps(TINY), threads=1) as server:
        server.http.event_hooks["response"].append(conforms)
        yield server


@pytest.fixture(scope="module")
def admin(guarded: Served) -> str:
    return make_key(guarded.log_file.parent, admin=True)


def new_key(server: Served, **fields: Any) -> str:
    return make_key(server.log_file.parent, **fields)


def embed(server: Served, key: str, given: object = TEXT) -> httpx.Response:
    return server.http.post("/v1/embeddings", json={"model": MODEL, "input": given}, headers=bearer(key))


def account(server: Served, key: str) -> dict[str, Any]:
    found: dict[str, Any] = server.http.get("/v1/me", headers=bearer(key)).json()
    return found


def begin_in_a_minute() -> None:
    """Wait for the next minute of the clock where this one is nearly over: tokens fade from there on."""
    wait_until(lambda: time.time() % 60 < 50, "the next minute")


def used(server: Served, key: str) -> tuple[int, int]:
    """Requests and tokens that are written, of one key."""
    lines = account(server, key)["usage"]
    return sum(line["requests"] for line in lines), sum(line["tokens"] for line in lines)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "AUTH_MISSING_API_KEY"),
        ({"Authorization": "Bearer none"}, "AUTH_INVALID_FORMAT"),
        (bearer(UNKNOWN), "AUTH_INVALID_API_KEY"),
    ],
)
def test_without_a_key_that_works_nothing_is_read(guarded: Served, headers: dict[str, str], code: str) -> None:
    response = guarded.http.post("/v1/embeddings", content=b"not even json", headers=headers)
    assert response.status_code == 401
    assert response.json()["code"] == code
    assert response.headers["www-authenticate"] == "Bearer"


def test_every_answer_says_what_is_left(guarded: Served) -> None:
    key, free = new_key(guarded), TIERS["free"]
    begin_in_a_minute()
    for n in (1, 2):
        headers = embed(guarded, key).headers
        assert int(headers["x-ratelimit-limit-requests"]) == free.requests_per_minute
        assert int(headers["x-ratelimit-remaining-requests"]) == free.requests_per_minute - n
        assert int(headers["x-ratelimit-limit-tokens"]) == free.tokens_per_minute
        assert int(headers["x-ratelimit-remaining-tokens"]) == free.tokens_per_minute - 6 * n
        assert 0 < int(headers["x-ratelimit-reset-requests"]) <= 60
        assert 60 < int(headers["x-ratelimit-reset-tokens"]) <= 120
    refused = guarded.http.post("/v1/embeddings", json={"model": MODEL}, headers=bearer(key))
    assert refused.status_code == 422
    assert int(refused.headers["x-ratelimit-remaining-requests"]) == free.requests_per_minute - 3
    assert int(refused.headers["x-ratelimit-remaining-tokens"]) == free.tokens_per_minute - 12


def test_answers_that_went_wrong_say_what_is_left_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = make_key(tmp_path)

    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr("fundament.api.me.describe_usage", fail)
    with running(tmp_path, auth=True, worker=False) as api:
        for n, (path, status) in enumerate({"/v1/me": 500, "/v1/admin/keys": 403, "/v1/none": 404}.items(), 1):
            answer = api.run(api.client.get(path, headers=bearer(key)))
            assert answer.status_code == status
            left = TIERS["free"].requests_per_minute - n
            assert answer.headers.get_list("x-ratelimit-remaining-requests") == [str(left)]
        nobody = [api.run(api.client.get("/v1/me")), api.run(api.client.get("/v1/models", headers=bearer(key)))]
        assert [answer.status_code for answer in nobody] == [401, 200]
        assert not [name for answer in nobody for name in answer.headers if name.startswith("x-ratelimit-")]


def test_too_many_requests(guarded: Served) -> None:
    key = new_key(guarded, tier="tiny")
    assert [embed(guarded, key).status_code for _ in range(3)] == [200] * 3
    refused = embed(guarded, key)
    assert refused.status_code == 429
    assert refused.json()["code"] == "RATE_REQUEST_LIMIT_EXCEEDED"
    assert refused.json()["detail"].startswith("Request rate limit exceeded: 3/3 requests per minute.")
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"


def test_too_many_tokens(guarded: Served) -> None:
    key = new_key(guarded, tier="few")
    begin_in_a_minute()
    assert embed(guarded, key, [TEXT] * 7).status_code == 200
    refused = embed(guarded, key, [TEXT] * 2)
    assert refused.status_code == 429
    assert refused.json()["code"] == "RATE_TOKEN_LIMIT_EXCEEDED"
    assert refused.json()["detail"].startswith("Token rate limit exceeded: 42/50 tokens per minute.")
    assert refused.headers["x-ratelimit-remaining-tokens"] == "8"
    assert 0 < int(refused.headers["retry-after"]) <= 120
    assert "x-should-retry" not in refused.headers
    assert embed(guarded, key).status_code == 200
    alone = embed(guarded, key, [TEXT] * 9)
    assert alone.headers["x-should-retry"] == "false"
    assert "This request alone has 54, and no wait will do. Send less at once" in alone.json()["detail"]


def test_a_balance_is_spent_to_the_last_token(guarded: Served) -> None:
    key = new_key(guarded, balance=17)
    assert [embed(guarded, key).status_code for _ in range(3)] == [200, 200, 403]
    refused = embed(guarded, key)
    assert refused.json()["code"] == "AUTHZ_INSUFFICIENT_BALANCE"
    assert refused.json()["detail"].startswith("Insufficient account balance")
    assert account(guarded, key)["key"]["balance"] == 5
    wait_until(lambda: used(guarded, key) == (2, 12), "usage to be written")


def test_what_is_refused_or_cannot_be_read_costs_nothing(guarded: Served) -> None:
    key = new_key(guarded, balance=6)
    for given in ([], [1], "word " * 300, {"image": "x"}):
        assert embed(guarded, key, given).is_client_error
    assert embed(guarded, key).status_code == 200
    assert account(guarded, key)["key"]["balance"] == 0


def test_an_admin_manages_keys(guarded: Served, admin: str) -> None:
    http = httpx.Client(base_url=guarded.url, headers=bearer(admin), event_hooks={"response": [conforms]})
    with http:
        made = http.post("/v1/admin/keys", json={"name": "ci", "tier": "few", "balance": 1}).json()
        key, path = made["key"], f"/v1/admin/keys/{made['id']}"
        assert (made["tier"], made["balance"], made["admin"], made["state"]) == ("few", 1, False, "active")
        assert embed(guarded, key).status_code == 403
        assert http.post(f"{path}/credit", json={"tokens": 11}).json()["balance"] == 12
        assert embed(guarded, key).status_code == 200
        end = "2099-01-30T23:00:00+00:00"
        asked = {"name": "find", "tier": "tier2", "expires_at": "2099-01-31T00:00:00+01:00"}
        changed = http.patch(path, json=asked).json()
        assert (changed["name"], changed["tier"], changed["expires_at"]) == ("find", "tier2", end)
        kept = http.patch(path, json={"expires_at": None}).json()
        assert kept == changed | {"expires_at": None, "last_used_at": kept["last_used_at"]}
        wait_until(lambda: account(guarded, key)["limits"]["requests_per_minute"] == 5000, "the new tier")
        again = http.post(f"{path}/rotate").json()["key"]
        assert embed(guarded, again).status_code == 200
        wait_until(lambda: embed(guarded, key).status_code == 401, "the old secret to stop")
        assert made["id"] in [each["id"] for each in http.get("/v1/admin/keys").json()["data"]]
        assert http.delete(path).json()["state"] == "revoked"
        wait_until(lambda: embed(guarded, again).status_code == 401, "the key to stop")
        assert http.get(path).json()["revoked_at"]
        for gone in (http.post(f"{path}/rotate"), http.get("/v1/admin/keys/nobody"), http.get(f"{path}x")):
            assert gone.status_code == 404
        assert http.patch(path, json={"tier": "free"}).status_code == 404
        wait_until(lambda: http.get("/v1/admin/usage", params={"key": made["id"]}).json()["data"], "usage")
        [line] = http.get("/v1/admin/usage", params={"key": made["id"]}).json()["data"]
        assert (line["model"], line["endpoint"], line["requests"], line["tokens"]) == (MODEL, "/v1/embeddings", 2, 12)
        table = http.get("/v1/admin/usage", params={"format": "csv", "since": line["day"], "until": line["day"]})
        assert table.headers["content-type"].startswith("text/csv")
        head, *rows = table.text.splitlines()
        assert head == "day,key_id,model,endpoint,requests,tokens"
        assert f"{line['day']},{made['id']},{MODEL},/v1/embeddings,2,12" in rows


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"name": ""},
        {"name": "a\nb"},
        {"name": "a\x00b"},
        {"name": "x", "tier": "none"},
        {"name": "x", "balance": -1},
        {"name": "x", "balance": 2**60},
        {"name": "x", "expires_at": "2020-01-01T00:00:00Z"},
        {"name": "x", "expires_at": "2100-01-01T00:00:00"},
        {"name": "x", "expires_at": "9999-12-31T23:59:59-10:00"},
        {"name": "x", "expires_at": "9999-12-31T23:59:59Z"},
        {"name": "x", "expires_at": "0001-01-01T00:00:00+10:00"},
        {"name": "x", "expires_at": "10000-01-01T00:00:00Z"},
        {"name": "x", "expire": 1},
    ],
)
def test_a_key_that_cannot_be_made(guarded: Served, admin: str, wrong: dict[str, object]) -> None:
    assert guarded.http.post("/v1/admin/keys", json=wrong, headers=bearer(admin)).status_code == 422


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"name": ""},
        {"name": None},
        {"tier": "none"},
        {"tier": ""},
        {"tier": None},
        {"expires_at": "2020-01-01T00:00:00Z"},
        {"expires_at": "never"},
        {"balance": 5},
        {"tier": "free", "admin": True},
    ],
)
def test_a_change_that_cannot_be_made(guarded: Served, admin: str, wrong: dict[str, object]) -> None:
    key = new_key(guarded)
    path = f"/v1/admin/keys/{id_of(key)}"
    before = guarded.http.get(path, headers=bearer(admin)).json()
    assert guarded.http.patch(path, json=wrong, headers=bearer(admin)).status_code == 422
    assert guarded.http.get(path, headers=bearer(admin)).json() == before


def test_an_admin_comes_in_when_its_limit_is_reached(guarded: Served) -> None:
    key = new_key(guarded, tier="tiny", admin=True)
    assert [embed(guarded, key).status_code for _ in range(4)] == [200, 200, 200, 429]
    for path in ("/v1/admin/keys", "/metrics"):
        answer = guarded.http.get(path, headers=bearer(key))
        assert answer.status_code == 200
        assert "x-ratelimit-limit-requests" not in answer.headers


def test_a_caller_that_is_no_admin_is_told_so(guarded: Served) -> None:
    refused = guarded.http.get("/v1/admin/keys", headers=bearer(new_key(guarded)))
    assert refused.status_code == 403
    assert refused.json()["code"] == "AUTHZ_ADMIN_REQUIRED"


def test_usage_is_written_before_the_end_and_survives_a_kill(tmp_path: Path) -> None:
    key = make_key(tmp_path, balance=1_000)
    with serving(tmp_path, auth=True, threads=1, drain_seconds=0) as server:
        assert embed(server, key).status_code == 200
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0
    with serving(tmp_path, auth=True, threads=1) as server:
        assert used(server, key) == (1, 6)
        assert embed(server, key).status_code == 200
        wait_until(lambda: used(server, key) == (2, 12), "usage to be written")
        server.process.kill()
        server.process.wait()
    assert read_key(key, tmp_path).balance == 1_000 - 12
    with serving(tmp_path, auth=True, threads=1, preload=False) as server:
        assert used(server, key) == (2, 12)


def test_the_log_names_the_key_and_never_shows_it(guarded: Served) -> None:
    key = new_key(guarded)
    request_id = embed(guarded, key).headers["x-request-id"]

    def logged() -> dict[str, Any] | None:
        return next((event for event in guarded.events() if event.get("request_id") == request_id), None)

    assert wait_until(logged, "the log line")["key"] == id_of(key)
    assert key not in guarded.log()


def test_the_log_says_where_a_refused_request_was_for(guarded: Served) -> None:
    asked = [
        ("POST", "/v1/embeddings", "/v1/embeddings"),
        ("GET", "/v1/embeddings", "/v1/embeddings"),  # its method is none of the route's
        ("GET", "/v1/admin/keys/somebody", "/v1/admin/keys/{key_id}"),
        ("GET", "/v1/nothing", "other"),
    ]
    wanted = {}
    for method, path, route in asked:
        response = guarded.http.request(method, path)
        assert response.status_code == 401
        wanted[response.headers["x-request-id"]] = route

    def logged() -> dict[str, Any] | None:
        lines = {each.get("request_id"): each["path"] for each in guarded.events() if each["event"] == "request"}
        return {key: lines[key] for key in wanted} if wanted.keys() <= lines.keys() else None

    assert wait_until(logged, "the log lines") == wanted


def test_who_needs_an_admins_key_is_told_how_to_make_one(guarded: Served) -> None:
    for headers in ({}, bearer(UNKNOWN)):
        for path, ending in (("/v1/admin/keys", "fundament keys create NAME --admin"), ("/v1/me", "create NAME")):
            refused = guarded.http.get(path, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["detail"].endswith(ending)


def test_keys_that_do_not_work_are_counted_by_address(tmp_path: Path) -> None:
    key = make_key(tmp_path)
    with serving(tmp_path, auth=True, preload=False, ip_refusals_per_minute=3) as server:
        server.http.event_hooks["response"].append(conforms)
        codes = [embed(server, UNKNOWN).json()["code"] for _ in range(5)]
        assert codes == ["AUTH_INVALID_API_KEY"] * 3 + ["RATE_IP_LIMIT_EXCEEDED"] * 2
        assert server.http.get("/v1/me", headers=bearer(key)).status_code == 200


def test_without_keys_an_address_has_its_own_limit(tmp_path: Path) -> None:
    with serving(tmp_path, threads=1, ip_requests_per_minute=4) as server:
        server.http.event_hooks["response"].append(conforms)
        asked = [server.embed(TEXT) for _ in range(2)]
        assert [response.status_code for response in asked] == [200] * 2
        assert asked[-1].headers["x-ratelimit-remaining-requests"] == "2"
        assert server.http.get("/v1/me").json()["key"] is None
        assert server.embed(TEXT).status_code == 200
        refused = server.embed(TEXT)
        assert refused.json()["code"] == "RATE_IP_LIMIT_EXCEEDED"
        assert 0 < int(refused.headers["retry-after"]) <= 60
        assert server.http.get("/v1/admin/keys").status_code == 401  # keys are managed with an admin's only


def test_without_keys_an_address_has_its_own_tokens(tmp_path: Path) -> None:
    with serving(tmp_path, threads=1, ip_tokens_per_minute=50) as server:
        server.http.event_hooks["response"].append(conforms)
        assert server.embed([TEXT] * 7).headers["x-ratelimit-remaining-tokens"] == "8"
        refused = server.embed([TEXT] * 2)
        assert (refused.status_code, refused.json()["code"]) == (429, "RATE_TOKEN_LIMIT_EXCEEDED")
        assert "key" not in refused.json()["detail"]
        assert server.embed(TEXT).status_code == 200
        assert server.http.get("/v1/me").json()["limits"]["tokens_per_minute"] == 50


def test_without_keys_an_address_has_so_many_requests_at_once(tmp_path: Path) -> None:
    with running(tmp_path, worker=False, ip_concurrency=1) as api:

        async def work() -> None:
            begun, held = asyncio.Event(), asyncio.Event()

            async def body() -> AsyncIterator[bytes]:
                yield b'{"input": "x", '
                begun.set()
                await held.wait()
                yield b'"model": "%s"}' % MODEL.encode()

            first = asyncio.ensure_future(api.client.post("/v1/embeddings", content=body()))
            await begun.wait()
            refused = await api.embed(TEXT)
            assert (refused.status_code, refused.json()["code"]) == (429, "RATE_CONCURRENCY_LIMIT_EXCEEDED")
            held.set()
            assert (await first).status_code == 200
            assert (await api.embed(TEXT)).status_code == 200

        api.run(work())


def test_an_admin_deletes_the_uploads_that_a_revoked_key_left_behind(guarded: Served, admin: str) -> None:
    http, left = guarded.http, new_key(guarded)
    sent = http.post("/v1/files", files={"file": ("lines.jsonl", b'"one"')}, headers=bearer(left))
    file_id, path = sent.json()["id"], "/v1/admin/files"
    assert http.delete(f"/v1/admin/keys/{id_of(left)}", headers=bearer(admin)).status_code == 200
    for headers, status in ((bearer(new_key(guarded)), 403), ({}, 401)):
        assert http.get(path, headers=headers).status_code == status
        assert http.delete(f"{path}/{file_id}", headers=headers).status_code == status
    assert (
        http.delete(f"/v1/files/{file_id}", headers=bearer(admin)).status_code == 404
    )  # there it is its owner's alone

    def everybodys() -> dict[str, Any]:
        listed = http.get(path, headers=bearer(admin)).json()
        return {one["id"]: one["key_id"] for one in listed["data"]}

    assert everybodys()[file_id] == id_of(left)
    kept = guarded.log_file.parent / "files" / file_id
    assert kept.read_bytes() == b'"one"'
    assert [path.stat().st_mode & 0o077 for path in (kept, kept.parent)] == [0, 0]  # nobody else's on this machine
    deleted = http.delete(f"{path}/{file_id}", headers=bearer(admin))
    assert deleted.json() == {"id": file_id, "object": "file", "deleted": True}
    assert file_id not in everybodys()
    assert not kept.exists()
    assert http.delete(f"{path}/{file_id}", headers=bearer(admin)).status_code == 404
