"""The depot below a directory of one machine, or of a file system that several share."""

import asyncio
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager, suppress
from io import BufferedWriter
from pathlib import Path

from fundament.depot import PIECE_BYTES, Kind


class Directory:
    """A depot below a directory.

    Args:
        root: the data directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.claimed: dict[str, bytes] = {}

    async def write(self, name: str, pieces: AsyncIterable[bytes]) -> int:
        """See `Depot`."""
        path = self.root / name
        file = await asyncio.to_thread(_create, path)
        try:
            with file:
                async for piece in pieces:
                    await asyncio.to_thread(file.write, piece)
                return await asyncio.to_thread(_settle, file)
        except BaseException:
            await asyncio.to_thread(path.unlink, missing_ok=True)
            raise

    async def read(self, name: str) -> AsyncIterator[bytes]:
        """See `Depot`."""
        with await asyncio.to_thread((self.root / name).open, "rb") as file:
            while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
                yield piece

    async def read_part(self, name: str, *, start: int, n_bytes: int) -> bytes:
        """See `Depot`."""

        def read() -> bytes:
            with (self.root / name).open("rb") as file:
                file.seek(start)
                return file.read(n_bytes)

        return await asyncio.to_thread(read)

    @asynccontextmanager
    async def lend(self, name: str) -> AsyncIterator[Path]:
        """See `Depot`."""
        yield self.root / name

    async def copy(self, source: str, target: str) -> None:
        """See `Depot`; the bytes lie there once."""

        def link() -> None:
            path = self.root / target
            path.parent.mkdir(parents=True, exist_ok=True)
            path.hardlink_to(self.root / source)

        await asyncio.to_thread(link)

    async def remove(self, name: str) -> None:
        """See `Depot`."""

        def remove() -> None:
            path = self.root / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

        await asyncio.to_thread(remove)

    async def old(self, kind: Kind, *, seconds: float) -> list[str]:
        """See `Depot`."""

        def find() -> list[str]:
            found: list[str] = []
            with suppress(FileNotFoundError):
                for entry in list(os.scandir(self.root / kind)):
                    with suppress(FileNotFoundError):  # removed meanwhile
                        if entry.stat().st_mtime < time.time() - seconds:
                            found.append(entry.name)
            return found

        return await asyncio.to_thread(find)

    async def claim(self, name: str, content: bytes) -> bytes:
        """See `Depot`; readable by this user only."""
        return await asyncio.to_thread(_claim, self.root / name, content)


def _create(path: Path) -> BufferedWriter:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("xb")


def _settle(file: BufferedWriter) -> int:
    file.flush()
    os.fsync(file.fileno())
    return file.tell()


def _claim(path: Path, content: bytes) -> bytes:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        made.touch(mode=0o600)
        try:
            with made.open("wb") as file:
                file.write(content)
                _settle(file)
            path.hardlink_to(made)  # another process may have been first
        except FileExistsError:
            pass
        finally:
            made.unlink()
    return path.read_bytes()
