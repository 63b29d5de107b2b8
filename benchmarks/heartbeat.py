"""The server with a task that notes how late its event loop is: `python benchmarks/heartbeat.py`.

It prints a line for every millisecond's sleep that took more than five: when it ended on the system's steady clock, in
seconds; how long it was, in milliseconds; and for how many of these the loop was ready to run and the machine had no
core for it, which is not the server's doing. `benchmarks/server.py` starts it.
"""

import asyncio
import os
import socket
import time

import uvicorn

from fundament.config import Settings
from fundament.server import configured, listen, prepare

WORTH_NOTING = 0.005


async def beat() -> None:
    """Sleep a millisecond again and again, and say when it was more; runs until cancelled."""
    schedule = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
    last, last_waited = time.perf_counter(), _waited(schedule)
    while True:
        await asyncio.sleep(0.001)
        now, waited = time.perf_counter(), _waited(schedule)
        if now - last > WORTH_NOTING:
            print(f"gap {now:.6f} {1000 * (now - last):.3f} {1000 * (waited - last_waited):.3f}", flush=True)
        last, last_waited = now, waited


def _waited(schedule: int) -> float:
    return int(os.pread(schedule, 100, 0).split()[1]) / 1e9  # seconds in the run queue, of this thread


class _Beating(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.heart = asyncio.ensure_future(beat())
        port = (sockets or [])[0].getsockname()[1]
        print(f"serving url=http://127.0.0.1:{port}", flush=True)


def main() -> None:
    """Serve on a free port."""
    settings = Settings()
    prepare(settings)
    from fundament.app import create_app

    _Beating(configured(create_app(settings), settings)).run(listen("127.0.0.1", 0))


if __name__ == "__main__":
    main()
