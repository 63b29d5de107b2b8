"""Servers in processes of their own: started, held still while others run, ended."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

START_SECONDS = 120
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


class Server:
    """A server process that writes its log to a file.

    Args:
        command: what to run.
        port: where it listens; None reads it from the log line that says so.
        cwd: the directory to run it in.
        env: variables besides this process's own.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        signal.signal(signal.SIGTERM, _leave)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self.port = port or self._told_port()
            self._wait_for_socket()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Itself, to be closed at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.close()

    @property
    def log(self) -> str:
        """What it has written so far."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    @property
    def core_seconds(self) -> float:
        """Seconds of all cores that it has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    @property
    def resident_bytes(self) -> int:
        """Memory that it holds."""
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * _PAGE_BYTES

    def pause(self) -> None:
        """Hold it still: it takes no core until `resume`."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run again."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """End it, gently first."""
        if self._process.poll() is None:
            self.resume()
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._log.close()

    def _told_port(self) -> int:
        while not (told := re.search(r"url=http://[^ ]+:(\d+)", self.log)):
            self._check("say where it listens")
            time.sleep(0.002)
        return int(told.group(1))

    def _wait_for_socket(self) -> None:
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                self._check("listen")
                time.sleep(0.01)

    def _check(self, what: str) -> None:
        if self._process.poll() is not None:
            raise SystemExit(f"{self._process.args} ended before it did {what}:\n{self.log[-3000:]}")
        if time.perf_counter() - self.started > START_SECONDS:
            raise SystemExit(f"{self._process.args} did not {what} within {START_SECONDS} s:\n{self.log[-3000:]}")


def _leave(number: int, _: object) -> None:
    # Python ends on this signal without unwinding, which would leave the servers behind, some of them stopped.
    raise SystemExit(128 + number)


def fundament(*options: str) -> Server:
    """`fundament serve` of this environment on a free port, with its default settings."""
    return Server([str(Path(sys.executable).with_name("fundament")), "serve", "--port", "0", *options])


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
