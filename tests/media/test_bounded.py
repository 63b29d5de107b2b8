"""What runs a program within bounds."""

import resource
import signal
from pathlib import Path

import pytest

from fundament.core import Interest
from fundament.errors import UnavailableError
from fundament.media.bounded import bounded, feed


@pytest.fixture
def echo(tmp_path: Path) -> str:
    program = tmp_path / "echo.py"
    program.write_text("import sys\nsys.stdout.write(sys.stdin.read())")
    return str(program)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_ends_a_server_and_all_around_it_leaves_a_file_to_be_read(echo: str, number: signal.Signals) -> None:
    """Ctrl-C goes to all of a terminal's processes, and service managers tell all of a service's."""
    with bounded(echo, seconds=30, interest=Interest()) as process:
        process.send_signal(number)
        feed(process, b"a file")
        assert process.stdout is not None
        assert process.stdout.read() == b"a file"
        assert process.wait() == 0
    assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_where_no_process_can_be_started_the_file_may_come_again(echo: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        with pytest.raises(UnavailableError) as refusal, bounded(echo, seconds=30, interest=Interest()):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert refusal.value.detail.startswith("No process can be started to read a file: too many open files.")
