"""The schema's versions: SQLite is brought to the newest at start, PostgreSQL by `fundament db upgrade`.

A version's id is the name of its file in `migrations/versions`; the newest is the last by name.
"""

import sys
from pathlib import Path
from typing import Any

from sqlalchemy import inspect, text
from sqlalchemy.engine import URL, Connection

from fundament.errors import FundamentError
from fundament.store.database import connected, is_sqlite, shown

_SCRIPTS = Path(__file__).parent / "migrations"
_LOCK = 0x46_75_6E_64  # one process at a time migrates; any number that nobody else takes


def newest() -> str:
    """The version that this release works with."""
    return max(file.stem for file in (_SCRIPTS / "versions").glob("v*.py"))


def prepare(url: URL) -> None:
    """Make sure that the store has the schema of this release.

    Raises:
        FundamentError: it cannot be reached; or it is PostgreSQL with an older schema, or has a newer one.
    """
    with connected(url) as connection:
        found = version_of(connection)
        if found == newest():
            return
        refuse_newer(found, url)
        if is_sqlite(url):
            _upgrade(connection)
            return
    raise FundamentError(
        f"The store {shown(url)} has {f'schema {found}' if found else 'no schema yet'}, this release works "
        f"with {newest()}. Bring it there: fundament db upgrade"
    )


def upgrade(url: URL) -> tuple[str | None, str]:
    """Bring the store to the newest version; what it had before, and what it has now.

    Raises:
        FundamentError: it cannot be reached, or its schema is of a newer release.
    """
    with connected(url) as connection:
        found = version_of(connection)
        refuse_newer(found, url)
        _upgrade(connection)
    return found, newest()


def version_of(connection: Connection) -> str | None:
    """The schema's version, None where there is none yet."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    version: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return version


def refuse_newer(found: str | None, url: URL) -> None:
    """Refuse a schema that this release does not know.

    Raises:
        FundamentError: it is of a newer release.
    """
    if found is not None and found > newest():
        raise FundamentError(
            f"The store {shown(url)} has schema {found} of a newer release; this one knows {newest()}."
        )


def run(connection: Connection, command: str, *arguments: Any) -> None:
    """Run a command of Alembic on a connection, in its transaction."""
    from alembic import command as commands
    from alembic.config import Config

    config = Config(stdout=sys.stdout, attributes={"connection": connection})  # its own is that of its import
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    getattr(commands, command)(config, *arguments)


def _upgrade(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    run(connection, "upgrade", "head")
