"""The command `fundament` where Python never learns the address of a `.invalid` name, and one thread reads files."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from fundament import server
from fundament.cli import app


def hang(host: Any, *rest: Any, found: Any = socket.getaddrinfo, **more: Any) -> Any:
    """Ask as usual, but for one kind of name."""
    if str(host).endswith(".invalid"):
        threading.Event().wait()
    return found(host, *rest, **more)


if __name__ == "__main__":
    socket.getaddrinfo = hang
    server.ThreadPoolExecutor = partial(ThreadPoolExecutor, 1)  # type: ignore[attr-defined]
    app()
