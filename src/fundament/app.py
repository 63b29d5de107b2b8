"""The application: engine and routes, wired."""

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

from fundament import __version__
from fundament.accounts.visits import Accounts
from fundament.aliases import read_aliases
from fundament.api import (
    admin,
    chat,
    classifiers,
    classify,
    embeddings,
    errors,
    health,
    me,
    models,
    multi_vector,
    openapi,
    prometheus,
    rerank,
    train,
)
from fundament.api.auth import DOCUMENTATION_FILES, AccountMiddleware
from fundament.api.billing import BilledEngine
from fundament.api.jobs import batch, batches, bulk, files
from fundament.api.middleware import RequestMiddleware
from fundament.api.state import State
from fundament.buckets import require_client
from fundament.catalog import EMBEDDED, ModelSpec
from fundament.config import Settings
from fundament.depot import depot_of
from fundament.engine.local import EngineOptions, LocalEngine
from fundament.engine.weights import Local, from_argument, pulled, refuse_another
from fundament.errors import CheckpointError, FundamentError
from fundament.fetching import Fetcher, read_networks
from fundament.limits import limits_of
from fundament.store import migrate
from fundament.store.database import Database, locate
from fundament.telemetry import Metrics, say
from fundament.worker import Worker

# In the order of the documentation.
_ENDPOINTS = (
    *(embeddings, multi_vector, rerank, chat, classify, train, classifiers),
    *(models, batch, batches, files, bulk, me, admin, health, prometheus),
)


def named_models(settings: Settings) -> dict[str, Local]:
    """The models asked for, the embedded one where none is.

    Raises:
        CheckpointError: a model that cannot be served, with the way out.
    """
    found: dict[str, Local] = {}
    for argument in settings.models or [EMBEDDED.id]:
        local = from_argument(argument, settings.data_dir, allow_torchscript=settings.allow_torchscript)
        refuse_another(local, found.values())
        found[local.spec.id] = local
    return found


def engine_options(settings: Settings) -> EngineOptions:
    """How the engine uses the machine, as the operator decided."""
    return EngineOptions(
        device=settings.device,
        dtype=settings.dtype,
        n_threads=settings.threads,
        max_batch_tokens=settings.max_batch_tokens,
        max_waiting_rows=settings.max_waiting_rows,
        max_waiting_bytes=int(settings.max_waiting_mb * 1e6),
        memory_bytes=int(settings.memory_gb * 1e9),
        idle_seconds=settings.idle_seconds or None,
        cache_bytes=int(settings.chat_memory_gb * 1e9),
    )


def create_app(settings: Settings) -> FastAPI:
    """An ASGI application that serves `settings.models`.

    Raises:
        FundamentError: a model, an alias, a device or a number format that cannot be served here; or a store that
            cannot be used; or a bucket whose client is not installed.
    """
    if settings.input_buckets:
        require_client()
    named = named_models(settings)
    found = {**pulled(settings.data_dir), **named}
    aliases = read_aliases(settings.aliases, {model: local.spec for model, local in found.items()})
    url = locate(settings.store_url, settings.data_dir)
    migrate.prepare(url)
    store = Database(url)
    accounts = Accounts(store, limits_of(settings.redis_url), settings)
    metrics = Metrics()
    engine = LocalEngine(found, engine_options(settings), metrics)
    fetcher = Fetcher(read_networks(settings.allowed_networks))
    # Why the models asked for at start cannot answer, which counts until each has loaded, then or for a request.
    unready: dict[str, str] = dict.fromkeys(named, "Models are loading.") if settings.preload else {}

    def served() -> Mapping[str, ModelSpec]:
        with suppress(CheckpointError):  # a directory that may no longer be read brings nothing new
            engine.refresh(pulled(settings.data_dir))
        return {model: local.spec for model, local in engine.locals.items()}

    def death() -> str | None:
        return next((f"Model '{model}' has stopped: {of}." for model, of in engine.deaths().items()), None)

    def not_ready() -> str | None:
        return next((why for model, why in unready.items() if model not in engine.loaded_once), None) or death()

    async def start() -> None:
        for model in [*unready]:
            try:
                await engine.load(model)
            except FundamentError as error:
                unready[model] = error.detail
                say("model did not load", level=logging.ERROR, reason=error.detail)
            except Exception as error:
                unready[model] = f"Model '{model}' did not load: {error!r}."
                say("model did not load", level=logging.ERROR, error=error)
        # What is here now stays: the garbage collector need not walk it again while requests wait.
        gc.collect()
        gc.freeze()

    state = State(
        settings,
        BilledEngine(engine),
        store,
        accounts,
        metrics,
        served,
        not_ready,
        death,
        depot_of(settings.files_url, settings.data_dir),
        aliases=aliases,
        fetcher=fetcher,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        work = [start(), engine.memory.expire(), _document(app), accounts.ledger.keep(), accounts.limits.keep()]
        if settings.auth:
            work.append(accounts.keyring.look())
        if settings.worker:
            worker = Worker(state)
            state.wake = worker.wake
            work.append(worker.run())
        tasks = [asyncio.create_task(each) for each in work]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await fetcher.close()
        left = settings.shutdown_seconds if state.deadline is None else state.deadline - time.monotonic()
        await engine.close(max(0.0, left))
        await accounts.close()
        await store.close()

    # The documentation pages with their scripts, which FastAPI alone has the reader's browser get from elsewhere.
    app = FastAPIOffline(
        title="Fundament",
        version=__version__,
        description="The Jina Search Foundation API on your own hardware.",
        static_url=DOCUMENTATION_FILES,
        redirect_slashes=False,  # a slash at the end is taken off before
        lifespan=lifespan,
        # Looked up anew for every request; the metrics are our own.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.parts = state
    _install(app, state)
    return app


def _install(app: FastAPI, state: State) -> None:
    """Put the routes in the application, and around them what every request goes through, the last one outermost."""
    settings = state.settings
    errors.install(app)
    for module in _ENDPOINTS:
        app.include_router(module.router)
    openapi.install(app, auth=bool(settings.auth))
    app.add_middleware(AccountMiddleware, accounts=state.accounts)
    routes = [route for module in _ENDPOINTS for route in module.router.routes]
    app.add_middleware(RequestMiddleware, state=state, routes=routes)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
            max_age=3600,
        )


async def _document(app: FastAPI) -> None:
    """Make the document in a thread: who first asks for it, or for a path that is not there, would hold up the loop."""
    await asyncio.to_thread(app.openapi)
