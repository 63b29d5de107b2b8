"""The store: keys, usage, and its schema."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import typer

from fundament.cli.options import DataDir, settings_of
from fundament.cli.output import end_output, refuse, show
from fundament.config import Settings
from fundament.errors import FundamentError, why

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

T = TypeVar("T")

keys = typer.Typer(help="Keys: who may call.", no_args_is_help=True)
db = typer.Typer(help="The store: keys, usage and what else survives a restart.", no_args_is_help=True)

_TIER = "Its limits: free, tier1, tier2, or one of the settings' own."
Json = Annotated[bool, typer.Option("--json", help="JSON, for scripts.")]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="The key's id: `fundament keys list`.")]


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise typer.BadParameter("write a day: 2027-01-31") from error


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What its owner calls it.")],
    tier: Annotated[str, typer.Option(help=_TIER)] = "free",
    balance: Annotated[
        int | None, typer.Option(min=0, max=2**53, help="Tokens that it may spend.", show_default="not counted")
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="It manages keys and sees everybody's usage.")] = False,
    expires: Annotated[str | None, typer.Option(metavar="WHEN", help="30d, 12h, or a day: 2027-01-31.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Make a key, and show it this once."""
    settings = settings_of(data_dir=data_dir)
    _check_key(settings, name=name, tier=tier)
    from fundament.store import keys as table
    from fundament.store.database import locate, shown

    expires_at = None if expires is None else _moment(expires)
    key, secret = _in_store(
        settings,
        lambda store: table.create(store, name, tier=tier, balance=balance, admin=admin, expires_at=expires_at),
        makes=True,
    )
    store = shown(locate(settings.store_url, settings.data_dir))
    typer.secho(f"Key {key.id} of tier {key.tier}, in {store}. It is shown this once:", err=True)
    _show(secret, key.id)


@keys.command("list")
def list_keys(data_dir: DataDir = None, as_json: Json = False) -> None:
    """Every key, without its secret."""
    from fundament.api.me import describe_key
    from fundament.store import keys as table

    rows = [describe_key(key) for key in _in_store(settings_of(data_dir=data_dir), table.everyone)]
    if not rows:
        typer.secho("No keys yet: fundament keys create NAME", err=True)
    names = ("id", "name", "tier", "balance", "admin", "state", "expires_at", "last_used_at")
    show(rows, names, as_json=as_json, right=(3,))


@keys.command("change")
def change_key(
    key_id: KeyId,
    name: Annotated[str | None, typer.Option(help="What its owner calls it.")] = None,
    tier: Annotated[str | None, typer.Option(help=_TIER)] = None,
    expires: Annotated[str | None, typer.Option(metavar="WHEN", help="30d, 12h, a day: 2027-01-31, or never.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Give a key another name, tier or end, within a second on every process."""
    settings = settings_of(data_dir=data_dir)
    _check_key(settings, name=name, tier=tier)
    values: dict[str, object] = {key: value for key, value in (("name", name), ("tier", tier)) if value is not None}
    if expires is not None:
        values["expires_at"] = None if expires == "never" else _moment(expires)
    if not values:
        refuse("say what changes: --name, --tier or --expires")
    from fundament.store import keys as table

    key = _in_store(settings, lambda store: table.change(store, key_id, values))
    if key is None:
        _refuse_key(settings, key_id)
    end = f"expires {key.expires_at:%Y-%m-%d %H:%M} UTC" if key.expires_at else "does not expire"
    typer.echo(f"{key.id} is '{key.name}' of tier {key.tier}, and {end}")


@keys.command("revoke")
def revoke_key(key_id: KeyId, data_dir: DataDir = None) -> None:
    """Stop a key for good, within a second on every process."""
    from fundament.store import keys as table

    settings = settings_of(data_dir=data_dir)
    if _in_store(settings, lambda store: table.revoke(store, key_id)) is None:
        _refuse_key(settings, key_id)
    typer.echo(f"{key_id} is revoked")


@keys.command("rotate")
def rotate_key(key_id: KeyId, data_dir: DataDir = None) -> None:
    """Give a key a new secret, and show it this once; the old one stops within a second."""
    from fundament.store import keys as table

    settings = settings_of(data_dir=data_dir)
    rotated = _in_store(settings, lambda store: table.rotate(store, key_id))
    if rotated is None:
        _refuse_key(settings, key_id)
    typer.secho(f"Key {key_id} has a new secret. It is shown this once:", err=True)
    _show(rotated[1], key_id)


@keys.command("credit")
def credit_key(
    key_id: KeyId,
    tokens: Annotated[int, typer.Argument(metavar="TOKENS", min=1, max=2**53, help="How many to add.")],
    data_dir: DataDir = None,
) -> None:
    """Add tokens to a key's balance."""
    from fundament.store import keys as table

    settings = settings_of(data_dir=data_dir)
    key = _in_store(settings, lambda store: table.credit(store, key_id, tokens))
    if key is None:
        _refuse_key(settings, key_id, tokens)
    typer.echo(f"{key.balance:,} tokens")


def usage(
    key: Annotated[str | None, typer.Option(metavar="ID", help="Of this key only.")] = None,
    since: Annotated[date | None, typer.Option(metavar="DAY", parser=_day, help="The first day (UTC).")] = None,
    until: Annotated[date | None, typer.Option(metavar="DAY", parser=_day, help="The last day (UTC).")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="A table for spreadsheets.")] = False,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Requests and tokens per key, day, model and endpoint."""
    from fundament.api.admin import usage_csv
    from fundament.api.me import describe_usage
    from fundament.store import usage as table

    if as_csv and as_json:
        refuse("--csv or --json, not both")
    if since and until and since > until:
        refuse(f"--since {since} is after --until {until}")
    used = _in_store(
        settings_of(data_dir=data_dir), lambda store: table.find(store, key_id=key, since=since, until=until)
    )
    rows = describe_usage(used)
    if as_csv:
        typer.echo(usage_csv(rows), nl=False)
        return
    show(rows, ("day", "key_id", "model", "endpoint", "requests", "tokens"), as_json=as_json, right=(4, 5))


@db.command("upgrade")
def db_upgrade(data_dir: DataDir = None) -> None:
    """Bring the store's schema to this release: needed on PostgreSQL; SQLite is brought there at every start."""
    settings = settings_of(data_dir=data_dir)
    from fundament.store import migrate
    from fundament.store.database import locate

    try:
        before, now = migrate.upgrade(locate(settings.store_url, settings.data_dir))
    except FundamentError as error:
        refuse(error.detail)
    typer.echo(f"schema {now}" if before == now else f"schema {before or 'none'} -> {now}")


def _show(secret: str, key_id: str) -> None:
    """Write a key where it goes, which may be a full disk: nobody sees it again."""
    try:
        typer.echo(secret)
    except OSError as error:
        end_output()
        refuse(f"the key could not be written: {why(error)}. Give it another secret: fundament keys rotate {key_id}")


def _refuse_key(settings: Settings, key_id: str, n_tokens: int = 0) -> NoReturn:
    """Say why nothing can be done with a key: it is not there, or revoked, or has no such balance."""
    from fundament.store import keys as table

    key = _in_store(settings, lambda store: table.get(store, key_id))
    if key is None:
        refuse(f"there is no key with the id '{key_id}': fundament keys list")
    if n_tokens and key.balance is None:
        refuse(f"the tokens of key {key_id} are not counted: it has no balance")
    if n_tokens:
        refuse(f"the balance of key {key_id} has no room for {n_tokens:,} tokens: it is {key.balance:,}")
    refuse(f"key {key_id} is revoked, for good: make another with fundament keys create NAME")


def _in_store(settings: Settings, work: "Callable[[AsyncConnection], Awaitable[T]]", *, makes: bool = False) -> T:
    """Do something in one transaction of the store, which is there already unless this `makes` it."""
    from fundament.store import migrate
    from fundament.store.database import Database, is_sqlite, locate

    async def run(store: Database) -> T:
        try:
            async with store.write() as connection:
                return await work(connection)
        finally:
            await store.close()

    try:
        url = locate(settings.store_url, settings.data_dir)
        if is_sqlite(url) and not makes and not Path(str(url.database)).exists():
            refuse(f"there is no store {url.database} yet. Is it another --data-dir?")
        migrate.prepare(url)
        return asyncio.run(run(Database(url)))
    except PermissionError as error:
        refuse(f"{error.filename} cannot be opened: {why(error)}")
    except FundamentError as error:
        refuse(error.detail)


def _check_key(settings: Settings, *, name: str | None, tier: str | None) -> None:
    """Refuse limits that there are not, and what is no name."""
    if tier is not None and settings.tier(tier) is None:
        refuse(f"there is no tier '{tier}': {', '.join(settings.tier_names())}")
    if name is not None and not (name.isprintable() and 0 < len(name) <= 200):
        refuse("a name has 1 to 200 printable characters")


def _moment(text: str) -> datetime:
    """When a key expires: so many days or hours from now, or when a day begins (UTC)."""
    from fundament.store.keys import LAST_YEAR

    units = {"d": "days", "h": "hours"}
    try:
        if text[-1:] in units:
            at = datetime.now(UTC) + timedelta(**{units[text[-1]]: int(text[:-1])})
        else:
            at = datetime.fromisoformat(text)
            at = at if at.tzinfo else at.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        refuse(f"--expires {text}: write 30d, 12h, or a day: 2027-01-31")
    if at <= datetime.now(UTC):
        refuse(f"--expires {text}: that is over already")
    if at.year > LAST_YEAR:
        refuse(f"--expires {text}: give a year up to {LAST_YEAR}, or leave it out")
    return at
