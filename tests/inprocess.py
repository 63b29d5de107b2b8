"""The application in the test's own process, on an event loop of its own: for faults that a test must plant."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import httpx
import pytest
from fastapi import FastAPI

from fundament.app import create_app
from fundament.config import Settings
from fundament.worker import Worker
from tests.served import MODEL, PATIENCE_SECONDS
from tests.tiny import resize

T = TypeVar("T")


class Api:
    """A running application and a client of it."""

    def __init__(self, app: FastAPI, client: httpx.AsyncClient, runner: asyncio.Runner) -> None:
        self.app, self.client, self._runner = app, client, runner

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the application's event loop."""
        return self._runner.run(asyncio.wait_for(work, PATIENCE_SECONDS))

    async def embed(self, given: object) -> httpx.Response:
        return await self.client.post("/v1/embeddings", json={"model": MODEL, "input": given})

    def post(self, content: bytes, **headers: str) -> httpx.Response:
        """Send a body of any kind."""
        return self.run(self.client.post("/v1/embeddings", content=content, headers=headers))

    async def ready(self) -> httpx.Response:
        """What `/ready` says once loading is over."""
        while (answer := await self.client.get("/ready")).status_code == 503 and "loading" in answer.text:
            await asyncio.sleep(0.01)
        return answer


@contextmanager
def running(folder: Path, *, dims: Mapping[str, int] = MappingProxyType({}), **settings: Any) -> Iterator[Api]:
    """Start an application with its models loaded; it has ended afterwards.

    Args:
        folder: its data directory.
        dims: length of the vectors of models that tiny checkpoints stand for.
        settings: of the application.
    """
    with asyncio.Runner() as runner, pytest.MonkeyPatch.context() as patch:
        resize(patch, dims)
        app = create_app(Settings(data_dir=folder, threads=1, **settings))
        lifespan = app.router.lifespan_context(app)
        transport = httpx.ASGITransport(app)
        runner.run(lifespan.__aenter__())
        client = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=None)
        try:
            api = Api(app, client, runner)
            api.run(api.ready())
            yield api
        finally:
            runner.run(client.aclose())
            runner.run(lifespan.__aexit__(None, None, None))


def work_until(api: Api, happened: Callable[[], Awaitable[Any]]) -> Any:
    """Run a worker until something has happened; what `happened` then gives."""

    async def until() -> Any:
        working = asyncio.ensure_future(Worker(api.app.state.parts).run())
        try:
            while not (value := await happened()):
                await asyncio.sleep(0.01)
            return value
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    return api.run(until())
