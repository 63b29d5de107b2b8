"""A web server of a test's own, whose pages may be as hostile as they like."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Asked:
    """A request that arrived."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


Page = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Website:
    """What it serves, by path, and what it was asked."""

    url: str = ""
    pages: dict[str, Page] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def say(self, path: str, body: bytes = b"", status: int = 200, **headers: str) -> str:
        """Serve bytes at a path.

        Returns:
            The address of the page.
        """

        def page(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            for name, value in {"Content_Length": str(len(body)), **headers}.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.end_headers()
            handler.wfile.write(body)

        return self.serve(path, page)

    def redirect(self, path: str, to: str, status: int = 302) -> str:
        """Lead from a path to an address."""
        return self.say(path, status=status, Location=to)

    def serve(self, path: str, page: Page) -> str:
        """Serve a page at a path."""
        self.pages[path] = page
        return self.url + path


@contextmanager
def website(host: str = "127.0.0.1") -> Iterator[Website]:
    """Serve until the block ends; pages that never end are woken by `ended`."""
    site = Website()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            site.asked.append(Asked(self.command, self.path, dict(self.headers), body))
            page = site.pages.get(self.path.partition("?")[0])
            try:
                if page is None:
                    self.send_error(404)
                else:
                    page(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        do_GET = do_POST = do_PUT = _any  # noqa: N815 - the names that the class looks for

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass

    with Server((host, 0), Handler) as server:
        site.url = f"http://{host}:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield site
        finally:
            site.ended.set()
            server.shutdown()
            thread.join()
