"""Where the bytes of jobs and uploads lie: below the data directory, or in a bucket that several machines share.

    jobs/ID/input        a job's input, as it was handed in
    jobs/ID/NAME         its lines, where they had to be fetched or converted, and what became of each chunk
    files/ID             an upload
    depot.id             names the depot to the store
    NAME.secret          random bytes to sign with, the same for all that share the depot
    store.owner          which store names the files here: no other one's worker removes what it does not know

Nothing here knows whose they are: that, and what counts, is the store's. A file is written once, by one try, under a
name of that try's own; one that no row names never happened.
"""

import asyncio
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Literal, Protocol

from fundament.buckets import require_client
from fundament.errors import FundamentError

Kind = Literal["jobs", "files"]
INPUT = "input"
OWNER = "store.owner"

PIECE_BYTES = 256 * 1024


class Depot(Protocol):
    """Files by name. What fails for want of the disk raises `OSError`, for want of the bucket `UnavailableError`.

    Attributes:
        claimed: what `secret` and `identity` have read, by the file's name.
    """

    claimed: dict[str, bytes]

    async def write(self, name: str, pieces: AsyncIterable[bytes]) -> int:
        """Write a new file, so that it outlives a loss of power; there is none where this fails.

        Returns:
            Its size in bytes.
        """
        ...

    def read(self, name: str) -> AsyncIterator[bytes]:
        """A file, piece by piece.

        Raises:
            FileNotFoundError: with the first piece.
        """
        ...

    async def read_part(self, name: str, *, start: int, n_bytes: int) -> bytes:
        """That many bytes of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        ...

    def lend(self, name: str) -> AbstractAsyncContextManager[Path]:
        """A file as one on this machine's disk, to be read while the block lasts."""
        ...

    async def copy(self, source: str, target: str) -> None:
        """Give a file's bytes a second name, under which they stay when the first one is removed."""
        ...

    async def remove(self, name: str) -> None:
        """Remove a file, or all files below a name; what cannot be removed now is left to whoever sweeps."""
        ...

    async def old(self, kind: Kind, *, seconds: float) -> list[str]:
        """The ids of jobs or uploads of which nothing was written for so long."""
        ...

    async def claim(self, name: str, content: bytes) -> bytes:
        """Write a small file unless there is one of that name; what is there now. The first one's stands for all."""
        ...


def of_job(job_id: str, *names: str) -> str:
    """The name of a job's file; without one, that of all its files."""
    return "/".join(("jobs", job_id, *names))


def of_upload(file_id: str) -> str:
    """The name of an upload."""
    return f"files/{file_id}"


def depot_of(url: str, data_dir: Path) -> Depot:
    """The bucket at a URL, or the data directory where there is none.

    Raises:
        FundamentError: the bucket's client is not installed, or cannot be made.
    """
    if not url:
        from fundament.depot.directory import Directory

        return Directory(data_dir)
    require_client()
    from fundament.depot.bucket import Bucket

    return Bucket(url)


async def secret(depot: Depot, name: str) -> bytes:
    """32 random bytes, the same at every start."""
    return await _claimed(depot, f"{name}.secret", secrets.token_bytes(32))


async def identity(depot: Depot) -> str:
    """What the store calls a depot: the same for all that share it, and for no other."""
    return (await _claimed(depot, "depot.id", secrets.token_hex(8).encode())).decode()


async def _claimed(depot: Depot, name: str, content: bytes) -> bytes:
    if name not in depot.claimed:
        depot.claimed[name] = await depot.claim(name, content)
    return depot.claimed[name]


async def whole(pieces: AsyncIterable[bytes]) -> bytes:
    """Pieces together, for files that are small."""
    return b"".join([piece async for piece in pieces])


async def on_thread(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    """Pieces that take time to make: made on another thread, some of them at a time."""
    made = iter(pieces)
    while some := await asyncio.to_thread(_gather, made):
        yield some


def _gather(pieces: Iterator[bytes]) -> bytes:
    some = bytearray()
    for piece in pieces:
        some += piece
        if len(some) >= PIECE_BYTES:
            break
    return bytes(some)


async def probe(depot: Depot) -> None:
    """Write, read and remove a small file.

    Raises:
        UnavailableError: the depot does not answer.
        FundamentError: what was removed is still there.
    """
    name = f"probe/{secrets.token_hex(8)}"
    await depot.write(name, on_thread([b"fundament"]))
    await whole(depot.read(name))
    await depot.remove(name)
    with suppress(FileNotFoundError):
        await whole(depot.read(name))
        raise FundamentError(f"{name} can be written and read there, but not removed.")
