"""A program that runs another one within bounds: `python bounded.py SECONDS BYTES PROGRAM ARGUMENT…`.

What a file asks of what draws or decodes it has no bounds of its own. Past these the system ends the process, and
with it nothing but the one file.
"""

import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fundament.core import Interest

_MOST_BYTES = 2 * 1024**3


@contextmanager
def bounded(
    program: str, *arguments: int | str, seconds: int, interest: "Interest"
) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a Python program with pipes; it has ended when the block has, and ends when nobody waits for it any more.

    Args:
        program: its file.
        arguments: what it is given.
        seconds: most processor time that it may take.
        interest: whether anybody waits.

    Raises:
        UnavailableError: the system starts no more processes now.
    """
    from fundament.errors import UnavailableError, why

    command = [sys.executable, "-P", __file__, str(seconds), str(_MOST_BYTES), program, *map(str, arguments)]
    try:
        with _undisturbed():
            started = subprocess.Popen(  # noqa: S603 no word of the command is a caller's
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
    except OSError as error:
        raise UnavailableError(f"No process can be started to read a file: {why(error)}. Try again.") from error
    with started as process:
        try:
            with interest.ending(process.kill):
                yield process
        finally:
            process.kill()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep what starts in the block from the signals that end a server and all around it: its file is still awaited."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def feed(process: "subprocess.Popen[bytes]", content: bytes) -> None:
    """Give a program its whole input. One that has ended takes none; what it does not answer will tell."""
    assert process.stdin is not None
    try:
        with process.stdin as pipe:
            pipe.write(content)
    except BrokenPipeError:
        return


def _bound(seconds: int, n_bytes: int) -> None:
    if sys.platform == "win32":
        return
    import resource

    for what, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, n_bytes), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(what)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (least, least))


if __name__ == "__main__":
    _bound(int(sys.argv[1]), int(sys.argv[2]))
    sys.argv = sys.argv[3:]
    runpy.run_path(sys.argv[0], run_name="__main__")
