"""Telling a caller's server that something has happened: signed as Standard Webhooks describe it, tried for a day."""

import base64
import hmac
from collections.abc import Sequence
from datetime import datetime, timedelta
from hashlib import sha256

from fundament.errors import FetchError
from fundament.fetching import Fetcher

DELAYS: Sequence[timedelta] = tuple(
    timedelta(seconds=seconds) for seconds in (20, 40, 120, 600, 1800, 3600, 7200, 14400, 28800, 28800)
)
"""How long after each try's beginning the next one follows, longer than a try takes; all together a day."""


def signature(secret: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """`v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`."""
    signed = b".".join((message_id.encode(), str(timestamp).encode(), body))
    return f"v1,{base64.b64encode(hmac.digest(secret, signed, sha256)).decode()}"


async def deliver(
    fetcher: Fetcher, url: str, body: bytes, *, secret: bytes, message_id: str, now: datetime
) -> str | None:
    """Post a JSON body once.

    Args:
        fetcher: dials public addresses only.
        url: the caller's.
        body: JSON.
        secret: signs it; the receiver has the same.
        message_id: the same at every try, so that a receiver can tell a repetition.
        now: the moment that is signed.

    Returns:
        None where the receiver took it, else why not.
    """
    timestamp = int(now.timestamp())
    headers = {
        "Content-Type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature(secret, message_id, timestamp, body),
    }
    try:
        status = await fetcher.post(url, body, headers)
    except FetchError as error:
        return error.detail
    return None if 200 <= status < 300 else f"The URL answered {status}."
