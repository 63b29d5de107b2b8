"""What a killed server has not yet written down."""

import signal
import time
from pathlib import Path

from tests.accounts.keys import bearer, make_key, read_usage
from tests.served import serving

_LOST_SECONDS = 1.0
_SLACK_SECONDS = 1.0  # for a machine that is busy with other tests


def test_a_kill_loses_a_second_of_usage_at_most(tmp_path: Path) -> None:
    key = make_key(tmp_path, tier="tier2")
    with serving(tmp_path, AUTH=True) as server:
        server.http.headers.update(bearer(key))
        began, answered = time.monotonic(), []
        while time.monotonic() < began + 4:
            assert server.embed("hello").is_success
            answered.append(time.monotonic())
        server.process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        server.process.wait()
    n_written = read_usage(key, tmp_path)
    assert n_written <= len(answered)
    lost = answered[n_written:]
    assert not lost or killed - lost[0] < _LOST_SECONDS + _SLACK_SECONDS
    assert n_written > 0
