"""`GET /v1/me`: the caller's own key, limits, balance and use."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from fundament.api.auth import caller_of
from fundament.api.schemas import responses
from fundament.api.state import state_of
from fundament.api.wire import answer
from fundament.store import keys, usage
from fundament.store.keys import Key
from fundament.store.usage import Use

router = APIRouter(tags=["Account"])

_DAYS = 30


class KeyInfo(BaseModel):
    """A key without its secret; moments are in UTC, ISO 8601."""

    object: str
    id: str
    name: str
    tier: str
    balance: int | None
    admin: bool
    state: str
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    last_used_at: str | None


class UsageLine(BaseModel):
    """What one key used of one model through one endpoint on one day (UTC)."""

    key_id: str
    day: str
    model: str
    endpoint: str
    requests: int
    tokens: int


class RateLimits(BaseModel):
    """What a caller may do; 0 is no limit."""

    requests_per_minute: int
    tokens_per_minute: int
    concurrency: int


class Account(BaseModel):
    """The caller's own key, limits and use; `key` is null where no keys are asked for."""

    object: str
    key: KeyInfo | None
    limits: RateLimits
    usage: list[UsageLine]


@router.get("/v1/me", summary="Your account", responses=responses(Account, errors=(401, 429, 500, 503)))
async def me(request: Request) -> Response:
    """The caller's key, limits and balance, and what it used in the last 30 days."""
    store, caller = state_of(request).store, caller_of(request)
    async with store.read() as connection:
        key = await keys.get(connection, caller.key.id) if caller.key else None
        since = datetime.now(UTC).date() - timedelta(days=_DAYS - 1)
        used = await usage.find(connection, key_id=caller.key_id, since=since)
    return answer(
        {
            "object": "account",
            "key": describe_key(key) if key else None,
            "limits": caller.tier.model_dump(),
            "usage": describe_usage(used),
        }
    )


def describe_key(key: Key) -> dict[str, Any]:
    """A key without its secret."""
    return {
        "object": "key",
        "id": key.id,
        "name": key.name,
        "tier": key.tier,
        "balance": key.balance,
        "admin": key.admin,
        "state": key.state(datetime.now(UTC)),
        **{
            name: at and at.isoformat(timespec="seconds")
            for name, at in (
                ("created_at", key.created_at),
                ("expires_at", key.expires_at),
                ("revoked_at", key.revoked_at),
                ("last_used_at", key.last_used_at),
            )
        },
    }


def describe_usage(used: Sequence[Use]) -> list[dict[str, Any]]:
    """Usage as rows of plain values."""
    return [
        {
            "key_id": use.line.key_id,
            "day": use.line.day.isoformat(),
            "model": use.line.model,
            "endpoint": use.line.endpoint,
            "requests": use.requests,
            "tokens": use.tokens,
        }
        for use in used
    ]
