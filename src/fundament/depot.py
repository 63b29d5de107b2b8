"""Where the bytes of jobs and uploads lie: plain files below the data directory.

    jobs/ID/input        the lines, as they were handed in
    jobs/ID/NAME         what became of a chunk; the store says which of these count
    files/ID             an upload

Nothing here knows whose they are: that, and what counts, is the store's.
"""

import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

_PIECE_BYTES = 256 * 1024


class Depot:
    """Files below a directory.

    Args:
        root: the data directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def job(self, job_id: str) -> Path:
        """A job's directory."""
        return self.root / "jobs" / job_id

    def input(self, job_id: str) -> Path:
        """A job's lines."""
        return self.job(job_id) / "input"

    def file(self, file_id: str) -> Path:
        """An upload."""
        return self.root / "files" / file_id

    def open_job(self, job_id: str) -> Path:
        """Make a job's directory; the path of its input, which is not there yet."""
        self.job(job_id).mkdir(parents=True)
        return self.input(job_id)

    def open_file(self, file_id: str) -> Path:
        """Make room for an upload; its path."""
        path = self.file(file_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, job_id: str, name: str, pieces: Iterable[bytes]) -> int:
        """Write a new file of a job, so that it outlives a loss of power; what was written is removed where it fails.

        Returns:
            Its size in bytes.

        Raises:
            OSError: the disk is full, or the job's directory has gone.
        """
        path = self.job(job_id) / name
        try:
            with path.open("xb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
                return file.tell()
        except OSError:
            path.unlink(missing_ok=True)
            raise

    def read(self, job_id: str, names: Iterable[str]) -> Iterator[bytes]:
        """Files of a job one after the other, piece by piece."""
        for name in names:
            with (self.job(job_id) / name).open("rb") as file:
                while piece := file.read(_PIECE_BYTES):
                    yield piece

    def remove_job(self, job_id: str) -> None:
        """Remove everything of a job."""
        shutil.rmtree(self.job(job_id), ignore_errors=True)

    def remove_file(self, file_id: str) -> None:
        """Remove an upload."""
        self.file(file_id).unlink(missing_ok=True)

    def old(self, kind: Literal["jobs", "files"], *, seconds: float) -> list[str]:
        """The ids of jobs or uploads that began to lie here more than that long ago."""
        try:
            entries = list(os.scandir(self.root / kind))
        except FileNotFoundError:
            return []
        return [entry.name for entry in entries if entry.stat().st_mtime < time.time() - seconds]

    def secret(self, name: str) -> bytes:
        """32 random bytes, the same at every start, readable by this user only."""
        path = self.root / f"{name}.secret"
        if not path.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            made = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            made.touch(mode=0o600)
            made.write_bytes(secrets.token_bytes(32))
            try:
                os.link(made, path)  # another process may have been first: then its secret stands
            except FileExistsError:
                pass
            finally:
                made.unlink()
        return path.read_bytes()
