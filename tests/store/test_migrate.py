"""The schema is brought to the newest version, both ways, once, and is what the tables say."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text
from sqlalchemy.engine import make_url

from fundament.errors import FundamentError
from fundament.store import migrate
from fundament.store.database import connected, locate
from fundament.store.schema import whole_metadata
from tests.servers import database_on


def test_the_newest_version_is_the_head_of_one_line() -> None:
    scripts = ScriptDirectory(str(Path(migrate.__file__).parent / "migrations"))
    assert scripts.get_heads() == [migrate.newest()]
    for script in scripts.walk_revisions():
        assert Path(script.path).stem == script.revision
        assert len(script.revision) <= 32  # the column of `alembic_version`


def test_the_migrations_make_what_the_tables_say_and_can_be_undone(store_url: str) -> None:
    url = locate(store_url, Path())
    with connected(url) as connection:
        migrate.run(connection, "check")
        tables = set(inspect(connection).get_table_names())
        assert tables == {*whole_metadata().tables, "alembic_version"}
    with connected(url) as connection:
        migrate.run(connection, "downgrade", "base")
        assert set(inspect(connection).get_table_names()) == {"alembic_version"}
    assert migrate.upgrade(url) == (None, migrate.newest())
    with connected(url) as connection:
        migrate.run(connection, "check")


def test_upgrading_again_changes_nothing(store_url: str) -> None:
    assert migrate.upgrade(locate(store_url, Path())) == (migrate.newest(), migrate.newest())


def test_processes_that_start_together_migrate_once(tmp_path: Path) -> None:
    url = locate("", tmp_path / "new")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(migrate.prepare, [url] * 4))
    with connected(url) as connection:
        assert migrate.version_of(connection) == migrate.newest()


def test_postgres_is_not_migrated_by_itself(postgres_url: str) -> None:
    with database_on(postgres_url) as given:
        url = locate(given, Path())
        with pytest.raises(FundamentError, match="fundament db upgrade"):
            migrate.prepare(url)
        migrate.upgrade(url)
        migrate.prepare(url)


def test_a_schema_of_a_newer_release_is_left_alone(store_url: str) -> None:
    url = locate(store_url, Path())
    with connected(url) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'v9999_later'"))
    for step in (migrate.prepare, migrate.upgrade):
        with pytest.raises(FundamentError, match="newer release"):
            step(url)


def test_a_password_is_never_said(postgres_url: str) -> None:
    here = make_url(postgres_url).set(port=1)
    in_its_query = here.set(password=None).update_query_dict({"password": "hunter2", "connect_timeout": "5"})
    for url in (here.set(password="hunter2"), in_its_query):
        with pytest.raises(FundamentError) as refused:
            migrate.prepare(locate(url.render_as_string(hide_password=False), Path()))
        assert "hunter2" not in refused.value.detail
        assert "cannot be used" in refused.value.detail


@pytest.mark.parametrize(
    "given", ["nonsense", "postgresql://h:abc/x", "mysql://x/y", "sqlite://", "sqlite:///:memory:"]
)
def test_a_store_of_another_kind_is_refused(given: str, tmp_path: Path) -> None:
    with pytest.raises(FundamentError, match="store_url"):
        locate(given, tmp_path)


def test_a_data_directory_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FundamentError, match="--data-dir"):
        migrate.prepare(locate("", tmp_path / "file"))
