"""What a killed server has not yet written down."""

import signal
from pathlib import Path

from tests.accounts.keys import bearer, make_key, read_usage
from tests.served import serving, wait_until


def test_a_kill_loses_no_usage_but_the_last(tmp_path: Path) -> None:
    key = make_key(tmp_path, tier="tier2")
    with serving(tmp_path, AUTH=True) as server:
        server.http.headers.update(bearer(key))
        for n in range(1, 4):
            assert server.embed("hello").is_success
            wait_until(lambda n=n: read_usage(key, tmp_path) == n, "usage to be written")
        assert server.embed("hello").is_success
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    assert read_usage(key, tmp_path) in (3, 4)
