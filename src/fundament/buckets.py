"""Objects in the buckets of S3, of servers that speak like it, and of Google Cloud Storage.

Credentials, region and endpoint are the environment's (`AWS_…`, `GOOGLE_…`), so only buckets that the operator lists
may be read for a caller.
"""

import asyncio
import logging
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from fundament.errors import FetchError, FundamentError
from fundament.telemetry import say

if TYPE_CHECKING:
    from obstore import GetResult
    from obstore.store import ClientConfig, RetryConfig

_PIECE_BYTES = 1024 * 1024
_CLIENT: "ClientConfig" = {
    "connect_timeout": timedelta(seconds=5),
    "timeout": timedelta(minutes=10),
    "allow_http": True,  # where the environment's endpoint has no TLS
}
_RETRIES: "RetryConfig" = {"max_retries": 5, "retry_timeout": timedelta(seconds=30)}


def is_listed(url: str, buckets: Collection[str]) -> bool:
    """Whether a URL names an object in one of these buckets."""
    bucket, key = _divided(url)
    return bool(key) and bucket in buckets


def require_client() -> None:
    """Refuse buckets where their client is not installed.

    Raises:
        FundamentError: with the command that installs it.
    """
    try:
        import obstore  # noqa: F401
    except ModuleNotFoundError as error:
        raise FundamentError("Buckets need their client: pip install 'fundament[cloud]'.") from error


async def save(url: str, path: Path, *, max_bytes: int) -> None:
    """Write an object to a file, piece by piece; the file stays incomplete where this fails.

    Args:
        url: of an object in a bucket that is listed.
        path: the file.
        max_bytes: most bytes of the object.

    Raises:
        FetchError: with its reason.
        OSError: the file cannot be written.
    """
    from obstore.exceptions import BaseError

    bucket, key = _divided(url)
    try:
        found = await _get(bucket, key)
        if found.meta["size"] > max_bytes:
            raise FetchError("size", f"The object is larger than {max_bytes / 1e6:g} MB.")
        with await asyncio.to_thread(path.open, "wb") as file:
            async for piece in found.stream(min_chunk_size=_PIECE_BYTES):
                await asyncio.to_thread(file.write, piece)
    except BaseError as error:
        say("bucket does not answer", level=logging.WARNING, bucket=bucket, reason=str(error).partition("\n")[0])
        raise FetchError("unreachable", f"'{key}' cannot be read: {bucket} does not answer as it should.") from error


async def _get(bucket: str, key: str) -> "GetResult":
    import obstore
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError
    from obstore.store import from_url

    store = from_url(bucket, client_options=_CLIENT, retry_config=_RETRIES)
    try:
        return await obstore.get_async(store, key)
    except FileNotFoundError as error:
        raise FetchError("status", f"There is no object '{key}' in {bucket}, or no such bucket.") from error
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise FetchError("status", f"{bucket} does not let this server read '{key}'.") from error
    except ValueError as error:
        raise FetchError("form", f"'{key}' cannot be an object's name.") from error


def _divided(url: str) -> tuple[str, str]:
    """A URL's bucket and the object's key in it."""
    scheme, _, rest = url.partition("://")
    name, _, key = rest.partition("/")
    return f"{scheme}://{name}", key
