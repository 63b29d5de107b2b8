"""The depot in a bucket, which machines share that share nothing else; needs the extra `cloud`."""

import asyncio
import errno
import logging
import os
import tempfile
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError

from fundament import buckets
from fundament.depot import PIECE_BYTES, Kind, whole
from fundament.errors import FundamentError, UnavailableError
from fundament.telemetry import say

_PART_BYTES = 8 * 1024 * 1024  # of an object that is sent in parts; S3 takes none below 5 MiB but the last
_PARTS_AT_A_TIME = 2


class Bucket:
    """A depot in a bucket of S3, of a server that speaks like it, or of Google Cloud Storage.

    Args:
        url: `s3://BUCKET/PREFIX` or `gs://BUCKET/PREFIX`.

    Raises:
        FundamentError: the bucket's client is not installed, or cannot be made.
    """

    def __init__(self, url: str) -> None:
        try:
            self._store = buckets.open_bucket(url)
        except BaseError as error:
            raise FundamentError(f"{url} cannot be used: {buckets.first_line(error)}") from error
        self.url = url
        self.claimed: dict[str, bytes] = {}

    async def write(self, name: str, pieces: AsyncIterable[bytes]) -> int:
        """See `Depot`; what is longer than a part is sent in parts, so that few of them lie in memory.

        An object of one part is refused where there is one of its name. Parts cannot say so, and rely on names that
        nobody chooses twice.
        """
        n_bytes = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal n_bytes
            async for piece in pieces:
                n_bytes += len(piece)
                yield piece

        rest = counted()
        first = await _up_to_a_part(rest)
        with self._answering():
            if len(first) < _PART_BYTES:
                await obstore.put_async(self._store, name, first, mode="create")
            else:
                await obstore.put_async(
                    self._store,
                    name,
                    _chained(first, rest),
                    use_multipart=True,
                    chunk_size=_PART_BYTES,
                    max_concurrency=_PARTS_AT_A_TIME,
                )
        return n_bytes

    async def read(self, name: str) -> AsyncIterator[bytes]:
        """See `Depot`."""
        with self._answering(name):
            found = await obstore.get_async(self._store, name)
            async for piece in found.stream(min_chunk_size=PIECE_BYTES):
                yield bytes(piece)

    async def read_part(self, name: str, *, start: int, n_bytes: int) -> bytes:
        """See `Depot`."""
        with self._answering(name):
            return bytes(await obstore.get_range_async(self._store, name, start=start, length=n_bytes))

    @asynccontextmanager
    async def lend(self, name: str) -> AsyncIterator[Path]:
        """See `Depot`; a copy in the system's temporary directory."""
        with tempfile.NamedTemporaryFile(prefix="fundament-") as file:
            async for piece in self.read(name):
                await asyncio.to_thread(file.write, piece)
            await asyncio.to_thread(file.flush)
            yield Path(file.name)

    async def copy(self, source: str, target: str) -> None:
        """See `Depot`; the bucket copies, nothing comes here."""
        with self._answering(source):
            await obstore.copy_async(self._store, source, target)

    async def remove(self, name: str) -> None:
        """See `Depot`."""
        # Google's is an error where there is none of that name, S3's is not.
        with suppress(UnavailableError, FileNotFoundError), self._answering(name):
            below = [each["path"] async for listed in obstore.list(self._store, prefix=name) for each in listed]
            await obstore.delete_async(self._store, below or name)

    async def old(self, kind: Kind, *, seconds: float) -> list[str]:
        """See `Depot`."""
        written: dict[str, datetime] = {}
        with self._answering():
            async for listed in obstore.list(self._store, prefix=kind):
                for each in listed:
                    found = each["path"].split("/")[1]
                    written[found] = max(each["last_modified"], written.get(found, each["last_modified"]))
        before = datetime.now(UTC) - timedelta(seconds=seconds)
        return [found for found, last in written.items() if last < before]

    async def claim(self, name: str, content: bytes) -> bytes:
        """See `Depot`; readable by whoever has the bucket's credentials."""
        try:
            return await whole(self.read(name))
        except FileNotFoundError:
            with self._answering(), suppress(AlreadyExistsError):
                await obstore.put_async(self._store, name, content, mode="create")
            return await whole(self.read(name))

    @contextmanager
    def _answering(self, name: str | None = None) -> Iterator[None]:
        """Turn what the bucket's client raises into what `Depot` says.

        Args:
            name: the file that may be missing; None where it can only be the bucket.
        """
        try:
            yield
        except FileNotFoundError as error:
            if name is None:
                raise self._unavailable("there is no such bucket") from error
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from error
        except BaseError as error:
            raise self._unavailable(buckets.first_line(error)) from error

    def _unavailable(self, reason: str) -> UnavailableError:
        say("bucket does not answer", level=logging.WARNING, bucket=self.url, reason=reason)
        return UnavailableError(
            "The files of batch jobs cannot be reached now. Try again shortly.", retry_after_seconds=5
        )


async def _up_to_a_part(pieces: AsyncIterator[bytes]) -> bytes:
    """The beginning of pieces: all of them where they come to less than a part."""
    first = bytearray()
    async for piece in pieces:
        first += piece
        if len(first) >= _PART_BYTES:
            break
    return bytes(first)


async def _chained(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece
