"""Objects in the buckets of S3, of servers that speak like it, and of Google Cloud Storage.

Credentials, region and endpoint are the environment's (`AWS_…`, `GOOGLE_…`), so only buckets that the operator lists
may be read for a caller. What the depot keeps in a bucket of its own goes through the same client.
"""

import logging
from collections.abc import AsyncGenerator, Collection
from datetime import timedelta
from typing import TYPE_CHECKING

from fundament.errors import FetchError, FundamentError, install
from fundament.telemetry import say

if TYPE_CHECKING:
    from obstore import GetResult
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

_PIECE_BYTES = 1024 * 1024
_CLIENT: "ClientConfig" = {
    "connect_timeout": timedelta(seconds=5),
    "read_timeout": timedelta(seconds=30),  # of silence
    "timeout": timedelta(hours=1),  # of a whole object, which a slow caller may be downloading
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
        raise FundamentError(f"Buckets need their client: {install('cloud')}") from error


def open_bucket(url: str) -> "ObjectStore":
    """A client of a bucket, or of what is below a prefix of it; nothing is asked yet.

    Raises:
        obstore.exceptions.BaseError: the environment says something that cannot be used.
    """
    from obstore.store import from_url

    return from_url(url, client_options=_CLIENT, retry_config=_RETRIES)


async def read(url: str, *, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """An object, piece by piece.

    Args:
        url: of an object in a bucket that is listed.
        max_bytes: most bytes of the object.

    Raises:
        FetchError: with its reason.
    """
    from obstore.exceptions import BaseError

    bucket, key = _divided(url)
    try:
        found = await _get(bucket, key)
        if found.meta["size"] > max_bytes:
            raise FetchError("size", f"The object is larger than {max_bytes / 1e6:g} MB.")
        async for piece in found.stream(min_chunk_size=_PIECE_BYTES):
            yield bytes(piece)
    except BaseError as error:
        say("bucket does not answer", level=logging.WARNING, bucket=bucket, reason=first_line(error))
        raise FetchError("unreachable", f"'{key}' cannot be read: {bucket} does not answer as it should.") from error


async def _get(bucket: str, key: str) -> "GetResult":
    import obstore
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    try:
        return await obstore.get_async(open_bucket(bucket), key)
    except FileNotFoundError as error:
        raise FetchError("status", f"There is no object '{key}' in {bucket}, or no such bucket.") from error
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise FetchError("status", f"{bucket} does not let this server read '{key}'.") from error
    except ValueError as error:
        raise FetchError("form", f"'{key}' cannot be an object's name.") from error


def first_line(error: BaseException) -> str:
    """What the client says of an error, without what it adds for its own developers."""
    return str(error).partition("\n")[0]


def _divided(url: str) -> tuple[str, str]:
    """A URL's bucket and the object's key in it."""
    scheme, _, rest = url.partition("://")
    name, _, key = rest.partition("/")
    return f"{scheme}://{name}", key
