"""Before every request: who asks, and whether they may. What is not named here as open needs a key."""

import math
import re
from http import HTTPStatus

from fastapi import Request
from starlette.datastructures import QueryParams
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fundament.accounts.keyring import missing_key
from fundament.accounts.visits import Accounts, Caller, Visit, current_visit
from fundament.api import errors
from fundament.api.presence import CLIENT_GONE
from fundament.errors import FundamentError, NotAllowedError

OPEN = {
    *("/", "/live", "/health", "/healthz", "/ready"),
    *("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"),
    "/v1/models",
}
DOCUMENTATION_FILES = "/docs/static"
OPEN_BELOW = ("/v1/models/", f"{DOCUMENTATION_FILES}/")
ADMIN, ADMIN_BELOW = "/metrics", "/v1/admin/"
_LINKED = re.compile("/v1/batch/[^/]+/(output|errors)")


class AccountMiddleware:
    """Lets in who may come in, and bills to them what they run."""

    def __init__(self, app: ASGIApp, accounts: Accounts) -> None:
        self.app, self.accounts = app, accounts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "websocket":  # there are none, and one would have to be let in here first
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http" or is_open(scope["path"]) or is_link(scope):
            await self.app(scope, receive, send)
            return
        visit: Visit | None = None

        async def counted(message: Message) -> None:
            if visit is not None:
                if message["type"] == "http.response.start":
                    if message["status"] >= HTTPStatus.BAD_REQUEST and message["status"] != CLIENT_GONE:
                        visit.forgive()
                elif not message.get("more_body"):
                    await visit.leave()  # first, so that a client may send the next one as soon as it has read this
            await send(message)

        for_admins = self._for_admins(scope)
        try:
            caller = await self.accounts.recognise(
                _authorization(scope), scope["client"][0] if scope.get("client") else "", admin=for_admins
            )
            visit = Visit(self.accounts, caller, lambda: getattr(scope.get("route"), "path", ""))
            scope["state"] |= {"caller": caller, "visit": visit}
            if not (for_admins and caller.admin):  # whoever looks after the server comes in when limits are reached
                await self.accounts.enter(visit)
            if for_admins and not caller.admin:  # now that the request is counted
                raise NotAllowedError("This needs an admin key: fundament keys create NAME --admin")
        except FundamentError as error:
            errors.note(error, scope["state"])
            await errors.render(error, scope["state"]["request_id"])(scope, receive, counted)
            return
        outside = current_visit.set(visit)
        try:
            await self.app(scope, receive, counted)
        except BaseException:
            visit.forgive()
            raise
        finally:
            current_visit.reset(outside)
            await visit.leave()

    def _for_admins(self, scope: Scope) -> bool:
        """Whether only an admin's key will do: always for managing keys, for metrics where keys are asked for."""
        path = scope["path"]
        return path.startswith(ADMIN_BELOW) or (path == ADMIN and bool(self.accounts.settings.auth))


def is_open(path: str) -> bool:
    """Whether a path needs no key: health, documentation, and the list of models, as in the public specification."""
    return path in OPEN or path.startswith(OPEN_BELOW)


def is_link(scope: Scope) -> bool:
    """Whether a request carries a signature in place of a key; the endpoint asks the same, and then checks it."""
    return bool(_LINKED.fullmatch(scope["path"])) and "signature" in QueryParams(scope["query_string"])


def caller_of(request: Request) -> Caller:
    """Who asks.

    Raises:
        AuthError: nobody who came in by the door.
    """
    caller: Caller | None = getattr(request.state, "caller", None)
    if caller is None:
        raise missing_key()
    return caller


def owner(request: Request) -> str:
    """The id of the key that asks; empty where no keys are asked for.

    Raises:
        AuthError: nobody who came in by the door.
    """
    return caller_of(request).key_id


def rate_headers(visit: Visit | None) -> list[tuple[bytes, bytes]]:
    """What a caller may still do, for each limit that there is; `Reset` is in seconds, until all of it is free."""
    if visit is None or visit.standing is None:
        return []
    standing, tier = visit.standing, visit.caller.tier
    rows = (
        ("Requests", tier.requests_per_minute, standing.n_requests, standing.requests_seconds),
        ("Tokens", tier.tokens_per_minute, standing.n_tokens, standing.tokens_seconds),
    )
    return [
        (f"X-RateLimit-{name}-{of}".lower().encode(), str(value).encode())
        for of, limit, used, seconds in rows
        if limit
        for name, value in (("Limit", limit), ("Remaining", max(0, limit - used)), ("Reset", math.ceil(seconds)))
    ]


def _authorization(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"authorization":
            return str(value.decode("latin-1"))
    return None
