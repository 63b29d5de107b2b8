import asyncio

import pytest

from fundament.store.database import Database
from tests.store.table import Table


@pytest.fixture
def table(store: Database, runner: asyncio.Runner) -> Table:
    return Table(store, runner)
