"""How bodies are read."""

import gc
import sys
import threading

from fundament.api.body import read_json


def test_threads_that_read_at_once_leave_the_garbage_collector_on() -> None:
    def read() -> None:
        for _ in range(50_000):
            read_json(b"[1, 2, 3]")

    threads, interval = [threading.Thread(target=read) for _ in range(4)], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert gc.isenabled()
    finally:
        sys.setswitchinterval(interval)
        gc.enable()
