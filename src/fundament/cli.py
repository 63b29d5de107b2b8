"""The `fundament` command: parses and delegates. What loads torch is imported by the command that needs it."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional, TypeVar

import orjson
import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError

from fundament import __version__
from fundament.catalog import CATALOG, EMBEDDED, ModelSpec, find
from fundament.config import Settings, check_environment, check_file, config_file
from fundament.engine.weights import Local, directory_of, embedded, reading, where_whole
from fundament.errors import FundamentError, near
from fundament.models import families

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from fundament.client import Report, Server

T = TypeVar("T")

app = typer.Typer(
    help="The Jina Search Foundation API on your own hardware.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

keys = typer.Typer(help="Keys: who may call.", no_args_is_help=True)
app.add_typer(keys, name="keys")
db = typer.Typer(help="The store: keys, usage and what else survives a restart.", no_args_is_help=True)
app.add_typer(db, name="db")
batch = typer.Typer(help="Batch jobs of a running server: many lines, handed in once.", no_args_is_help=True)
app.add_typer(batch, name="batch")

# Options that several commands take. None means that neither the environment nor the file is overruled. A command that
# takes settings alone has a parameter for each, of the setting's name, and has them together from its context.
Models = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads this form on every supported version
    typer.Option("--model", metavar="ID[=DIR]", help="Serve this model; may be given several times."),
]
Aliases = Annotated[
    Optional[list[str]],  # noqa: UP045 - as above
    typer.Option("--alias", metavar="NAME=MODEL[:TASK]", help="Answer to NAME as MODEL; may be given several times."),
]
AllowTorchscript = Annotated[
    bool | None,
    typer.Option("--allow-torchscript", help="Serve TorchScript files, which run code when they are loaded."),
]
Host = Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")]
Port = Annotated[int | None, typer.Option(help="Port to listen on.", show_default="8080")]
Auth = Annotated[bool | None, typer.Option("--auth/--no-auth", help="Ask for keys; needed beyond loopback.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:1.", show_default="auto")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.", show_default="auto")]
DataDir = Annotated[
    Path | None, typer.Option(help="Where models and the store are kept.", show_default="~/.local/share/fundament")
]
LogFormat = Annotated[str | None, typer.Option(help="text or json.", show_default="text")]
Json = Annotated[bool, typer.Option("--json", help="JSON, for scripts.")]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="The key's id: `fundament keys list`.")]
Files = Annotated[list[str], typer.Argument(metavar="FILE...", help=".jsonl, .csv, .parquet or .txt.")]
FilesOrJobs = Annotated[list[str], typer.Argument(metavar="FILE...", help="Files that were handed in, or ids of jobs.")]
Url = Annotated[str, typer.Option(envvar="FUNDAMENT_URL", help="The server.")]
ApiKey = Annotated[str | None, typer.Option(envvar="FUNDAMENT_API_KEY", help="The key, where it asks for one.")]
MemoryGb = Annotated[
    float | None, typer.Option(help="Most memory of all models together.", show_default="80 % of what is free")
]


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options of the command itself."""
    if version:
        typer.echo(f"fundament {__version__}")
        raise typer.Exit


@app.command()
def serve(
    context: typer.Context,
    models: Models = None,
    aliases: Aliases = None,
    allow_torchscript: AllowTorchscript = None,
    host: Host = None,
    port: Port = None,
    auth: Auth = None,
    device: Device = None,
    dtype: Dtype = None,
    data_dir: DataDir = None,
    preload: Annotated[bool | None, typer.Option("--preload/--lazy", help="Load models at start.")] = None,
    memory_gb: MemoryGb = None,
    idle_seconds: Annotated[
        float | None, typer.Option(help="Let a model go after this long unused.", show_default="never")
    ] = None,
    log_format: LogFormat = None,
) -> None:
    """Serve models over HTTP. Further settings: docs/settings.md."""
    settings = _settings(**context.params)
    from fundament.server import run

    try:
        run(settings)
    except FundamentError as error:
        _refuse(error.detail)


@app.command()
def worker(
    context: typer.Context,
    models: Models = None,
    aliases: Aliases = None,
    allow_torchscript: AllowTorchscript = None,
    device: Device = None,
    dtype: Dtype = None,
    data_dir: DataDir = None,
    memory_gb: MemoryGb = None,
    log_format: LogFormat = None,
) -> None:
    """Run batch jobs of the servers on the same store and files; any number of workers may."""
    settings = _settings(**context.params)
    from fundament.server import work

    try:
        work(settings)
    except FundamentError as error:
        _refuse(error.detail)


@app.command()
def pull(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Models of the catalogue: `fundament models`.")],
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="Your use is one that a non-commercial licence allows.")
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Download models; an interrupted download goes on. HF_ENDPOINT, HF_TOKEN and HTTPS_PROXY are heeded."""
    settings = _settings(data_dir=data_dir)
    from fundament.engine.hub import pull as pull_model
    from fundament.engine.hub import refuse_unpullable

    try:
        specs = [_in_catalogue(model) for model in ids]
        # All are looked at before the first is downloaded, which may take long.
        for spec in specs:
            typer.echo(f"{spec.id}: licence {spec.licence}" + (f", from {spec.repo}" if spec.repo else ""))
            refuse_unpullable(spec, accept_licence=accept_licence)
        for spec in specs:
            if there := where_whole(spec, settings.data_dir):
                typer.echo(f"{spec.id}: already in {there}")
                continue
            with _progress(spec.id) as progress:
                local = pull_model(spec, settings.data_dir, endpoint=os.environ.get("HF_ENDPOINT"), progress=progress)
            typer.echo(f"{spec.id}: {_size(local.n_bytes)} in {local.directory}")
    except FundamentError as error:
        _refuse(error.detail)
    except KeyboardInterrupt:
        _refuse("interrupted; what arrived is kept, the same command goes on from there")


@app.command()
def models(
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array, for scripts.")] = False,
) -> None:
    """List the models of the catalogue, and which are on this machine."""
    settings = _settings(data_dir=data_dir)
    try:
        with reading():
            rows = [_row(spec, settings.data_dir) for spec in CATALOG.values()]
    except FundamentError as error:
        _refuse(error.detail)
    if as_json:
        typer.echo(orjson.dumps(rows, option=orjson.OPT_INDENT_2).decode())
        return
    lines = [["ID", "KIND", "DIM", "CONTEXT", "LICENCE", "SIZE", "HERE"], *map(_cells, rows)]
    for line in _aligned(lines, right=(2, 3, 5)):
        typer.echo(line)


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What its owner calls it.")],
    tier: Annotated[str, typer.Option(help="Its limits: free, tier1, tier2, or one of the settings' own.")] = "free",
    balance: Annotated[
        int | None, typer.Option(min=0, max=2**53, help="Tokens that it may spend.", show_default="not counted")
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="It manages keys and sees everybody's usage.")] = False,
    expires: Annotated[str | None, typer.Option(metavar="WHEN", help="30d, 12h, or a day: 2027-01-31.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Make a key, and show it this once."""
    settings = _settings(data_dir=data_dir)
    _check_key(settings, name=name, tier=tier)
    from fundament.store import keys as table
    from fundament.store.database import locate

    expires_at = _moment(expires) if expires else None
    key, shown = _in_store(
        settings,
        lambda store: table.create(store, name, tier=tier, balance=balance, admin=admin, expires_at=expires_at),
    )
    store = locate(settings.store_url, settings.data_dir).render_as_string()
    typer.secho(f"Key {key.id} of tier {key.tier}, in {store}. It is shown this once:", err=True)
    typer.echo(shown)


@keys.command("list")
def list_keys(data_dir: DataDir = None, as_json: Json = False) -> None:
    """Every key, without its secret."""
    from fundament.api.me import describe_key
    from fundament.store import keys as table

    rows = [describe_key(key) for key in _in_store(_settings(data_dir=data_dir), table.everyone)]
    names = ("id", "name", "tier", "balance", "admin", "state", "expires_at", "last_used_at")
    _show(rows, names, as_json=as_json, right=(3,))


@keys.command("change")
def change_key(
    key_id: KeyId,
    name: Annotated[str | None, typer.Option(help="What its owner calls it.")] = None,
    tier: Annotated[str | None, typer.Option(help="Its limits.")] = None,
    expires: Annotated[str | None, typer.Option(metavar="WHEN", help="30d, 12h, a day: 2027-01-31, or never.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Give a key another name, tier or end, within a second on every process."""
    settings = _settings(data_dir=data_dir)
    _check_key(settings, name=name, tier=tier)
    values: dict[str, object] = {key: value for key, value in (("name", name), ("tier", tier)) if value is not None}
    if expires is not None:
        values["expires_at"] = None if expires == "never" else _moment(expires)
    if not values:
        _refuse("say what changes: --name, --tier or --expires")
    from fundament.store import keys as table

    key = _in_store(settings, lambda store: table.change(store, key_id, values))
    if key is None:
        _refuse(f"there is no key {key_id} that is not revoked: fundament keys list")
    end = f"expires {key.expires_at:%Y-%m-%d %H:%M} UTC" if key.expires_at else "does not expire"
    typer.echo(f"{key.id} is '{key.name}' of tier {key.tier}, and {end}")


@keys.command("revoke")
def revoke_key(key_id: KeyId, data_dir: DataDir = None) -> None:
    """Stop a key for good, within a second on every process."""
    from fundament.store import keys as table

    if _in_store(_settings(data_dir=data_dir), lambda store: table.revoke(store, key_id)) is None:
        _refuse(f"there is no key {key_id}: fundament keys list")
    typer.echo(f"{key_id} is revoked")


@keys.command("rotate")
def rotate_key(key_id: KeyId, data_dir: DataDir = None) -> None:
    """Give a key a new secret, and show it this once; the old one stops within a second."""
    from fundament.store import keys as table

    rotated = _in_store(_settings(data_dir=data_dir), lambda store: table.rotate(store, key_id))
    if rotated is None:
        _refuse(f"there is no key {key_id} that is not revoked: fundament keys list")
    typer.secho(f"Key {key_id} has a new secret. It is shown this once:", err=True)
    typer.echo(rotated[1])


@keys.command("credit")
def credit_key(
    key_id: KeyId,
    tokens: Annotated[int, typer.Argument(metavar="TOKENS", min=1, max=2**53, help="How many to add.")],
    data_dir: DataDir = None,
) -> None:
    """Add tokens to a key's balance."""
    from fundament.store import keys as table

    key = _in_store(_settings(data_dir=data_dir), lambda store: table.credit(store, key_id, tokens))
    if key is None:
        _refuse(f"there is no key {key_id} with a balance: fundament keys list")
    typer.echo(f"{key.balance:,} tokens")


@app.command()
def usage(
    key: Annotated[str | None, typer.Option(metavar="ID", help="Of this key only.")] = None,
    since: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="The first day (UTC).")] = None,
    until: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="The last day (UTC).")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="A table for spreadsheets.")] = False,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Requests and tokens per key, day, model and endpoint."""
    from fundament.api.admin import usage_csv
    from fundament.api.me import describe_usage
    from fundament.store import usage as table

    first, last = since and since.date(), until and until.date()
    used = _in_store(_settings(data_dir=data_dir), lambda store: table.find(store, key_id=key, since=first, until=last))
    rows = describe_usage(used)
    if as_csv:
        typer.echo(usage_csv(rows), nl=False)
        return
    _show(rows, ("day", "key_id", "model", "endpoint", "requests", "tokens"), as_json=as_json, right=(4, 5))


@db.command("upgrade")
def db_upgrade(data_dir: DataDir = None) -> None:
    """Bring the store's schema to this release: needed on PostgreSQL; SQLite is brought there at every start."""
    settings = _settings(data_dir=data_dir)
    from fundament.store import migrate
    from fundament.store.database import locate

    try:
        before, now = migrate.upgrade(locate(settings.store_url, settings.data_dir))
    except FundamentError as error:
        _refuse(error.detail)
    typer.echo(f"schema {now}" if before == now else f"schema {before or 'none'} -> {now}")


@batch.command("submit")
def batch_submit(
    file: Files,
    model: Annotated[str, typer.Option("--model", help="The model that embeds them.")] = EMBEDDED.id,
    task: Annotated[str | None, typer.Option(help="What the vectors are for.")] = None,
    dimensions: Annotated[int | None, typer.Option(help="Keep this many numbers of each vector.")] = None,
    embedding_type: Annotated[
        str | None, typer.Option(help="float, base64, binary or ubinary.", show_default="float")
    ] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut what is longer than the context.")] = False,
    webhook_url: Annotated[str | None, typer.Option(help="Told when the job ends.")] = None,
    url: Url = "http://127.0.0.1:8080",
    key: ApiKey = None,
) -> None:
    """Hand files in: .jsonl, .csv, .parquet or .txt. The job's id is printed, and kept in FILE.job."""
    given = {"task": task, "dimensions": dimensions, "embedding_type": embedding_type, "webhook_url": webhook_url}
    fields = {"model": model, "truncate": truncate} | {
        name: value for name, value in given.items() if value is not None
    }
    with _asking(url, key) as server:
        for path in map(Path, file):
            job = asyncio.run(server.submit(path, fields))
            _note(path).write_text(f"{job}\n")
            typer.echo(job)


@batch.command("status")
def batch_status(file: FilesOrJobs, url: Url = "http://127.0.0.1:8080", key: ApiKey = None) -> None:
    """Say how far jobs are."""
    with _asking(url, key) as server:
        for name in file:
            _tell(name, asyncio.run(server.status(_job_of(name))))


@batch.command("wait")
def batch_wait(file: FilesOrJobs, url: Url = "http://127.0.0.1:8080", key: ApiKey = None) -> None:
    """Wait for jobs to end, with a bar on a terminal. Exit code 1 where one did not complete."""
    failed = False
    with _asking(url, key) as server:
        for name in file:
            with _job_progress(name) as seen:
                ended = asyncio.run(server.wait(_job_of(name), seen))
            _tell(name, ended)
            failed |= ended.status != "completed"
    if failed:
        raise typer.Exit(1)


@batch.command("fetch")
def batch_fetch(file: FilesOrJobs, url: Url = "http://127.0.0.1:8080", key: ApiKey = None) -> None:
    """Fetch what jobs made into FILE.output.jsonl, and what failed into FILE.errors.jsonl."""
    with _asking(url, key) as server:
        for name in file:
            job = _job_of(name)
            now = asyncio.run(server.status(job))
            for kind, count in (("output", now.n_completed), ("errors", now.n_failed)):
                if count or kind == "output":
                    target = Path(f"{name}.{kind}.jsonl")
                    typer.echo(f"{target}: {count:,} lines, {_size(asyncio.run(server.fetch(job, kind, target)))}")


@batch.command("cancel")
def batch_cancel(file: FilesOrJobs, url: Url = "http://127.0.0.1:8080", key: ApiKey = None) -> None:
    """Stop jobs; lines that are done stay and can be fetched."""
    with _asking(url, key) as server:
        for name in file:
            _tell(name, asyncio.run(server.cancel(_job_of(name))))


def _note(path: Path) -> Path:
    """Where the id of a file's job is kept."""
    return path.with_name(f"{path.name}.job")


def _job_of(name: str) -> str:
    """The job of a file that was handed in, or the job that is named itself."""
    note = _note(Path(name))
    if note.is_file():
        return note.read_text().strip()
    if Path(name).exists():
        raise FundamentError(f"{name} has not been handed in: there is no {note}. fundament batch submit {name}")
    return name


def _tell(name: str, job: "Report") -> None:
    of = f" of {job.n_lines:,}" if job.n_lines else ""
    failed = f", {job.n_failed:,} failed" if job.n_failed else ""
    why = f": {job.error}" if job.error else ""
    typer.echo(f"{name}: {job.status}, {job.n_completed:,}{of} lines{failed}{why}")


@contextmanager
def _asking(url: str, key: str | None) -> Iterator["Server"]:
    from fundament.client import Server

    try:
        yield Server(url, key)
    except (FundamentError, OSError) as error:
        _refuse(error.detail if isinstance(error, FundamentError) else str(error))
    except KeyboardInterrupt:
        _refuse("interrupted; jobs that were handed in go on")


@contextmanager
def _job_progress(name: str) -> Iterator[Callable[["Report"], None]]:
    """A bar on a terminal: lines, tokens, rate, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None, tokens=0, rate="")

        def seen(job: "Report") -> None:
            done = job.n_completed + job.n_failed
            bar.update(task, completed=done, total=job.n_lines or None, tokens=job.n_tokens)
            if speed := bar.tasks[0].speed:
                bar.update(task, rate=f"{speed:,.0f} lines/s")

        yield seen


@app.command()
def doctor(
    context: typer.Context,
    models: Models = None,
    aliases: Aliases = None,
    allow_torchscript: AllowTorchscript = None,
    host: Host = None,
    port: Port = None,
    auth: Auth = None,
    device: Device = None,
    dtype: Dtype = None,
    data_dir: DataDir = None,
    memory_gb: MemoryGb = None,
) -> None:
    """Say what would stop `serve` with the same options, and what to do. Exit code 1 where something would."""
    settings = _settings(**context.params)
    from fundament.doctor import examine

    findings = examine(settings)
    colors = {"ok": typer.colors.GREEN, "warning": typer.colors.YELLOW, "problem": typer.colors.RED}
    for finding, line in zip(findings, _aligned([[f.level, f.subject, f.detail] for f in findings]), strict=True):
        typer.secho(line, fg=colors[finding.level])
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


def _in_catalogue(model: str) -> ModelSpec:
    if (spec := find(model, CATALOG)) is None:
        raise FundamentError(f"'{model}' is not in the catalogue; `fundament models` lists it.{near(model, CATALOG)}")
    return spec


def _row(spec: ModelSpec, data_dir: Path) -> dict[str, Any]:
    """A model as `fundament models --json` shows it."""
    there = where_whole(spec, data_dir)
    if there is not None:
        here = "embedded" if (local := embedded()) and there == local.directory else "on disk"
    elif not spec.repo:
        here = "no public weights"
    elif spec.family not in families():
        here = "not served yet"
    elif directory_of(spec, data_dir).exists():
        here = "pull again"
    else:
        here = ""
    return {
        "id": spec.id,
        "kind": spec.kind,
        "dimensions": spec.dim,
        "context": spec.context,
        "licence": spec.licence,
        "parameters": spec.n_parameters,
        "bytes": Local(spec, there).n_bytes if there else 0,
        "here": here,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    """The same as cells of the table: one size, and nothing in the place of a zero."""
    size = _size(row["bytes"]) if row["bytes"] else f"{row['parameters'] / 1e6:,.0f}M params"
    shown = (row["id"], row["kind"], row["dimensions"], row["context"], row["licence"], size, row["here"])
    return [str(cell or "") for cell in shown]


def _in_store(settings: Settings, work: "Callable[[AsyncConnection], Awaitable[T]]") -> T:
    """Do something in one transaction of the store."""
    from fundament.store import migrate
    from fundament.store.database import Database, locate

    async def run(store: Database) -> T:
        try:
            async with store.write() as connection:
                return await work(connection)
        finally:
            await store.close()

    try:
        url = locate(settings.store_url, settings.data_dir)
        migrate.prepare(url)
        return asyncio.run(run(Database(url)))
    except FundamentError as error:
        _refuse(error.detail)


def _check_key(settings: Settings, *, name: str | None, tier: str | None) -> None:
    """Refuse limits that there are not, and what is no name."""
    if tier is not None and settings.tier(tier) is None:
        _refuse(f"there is no tier '{tier}': {', '.join(settings.tier_names())}")
    if name is not None and not (name.isprintable() and 0 < len(name) <= 200):
        _refuse("a name has 1 to 200 printable characters")


def _moment(text: str) -> datetime:
    """When a key expires: so many days or hours from now, or when a day begins (UTC)."""
    from fundament.store.keys import LAST_YEAR

    units = {"d": "days", "h": "hours"}
    try:
        if text[-1] in units:
            at = datetime.now(UTC) + timedelta(**{units[text[-1]]: int(text[:-1])})
        else:
            at = datetime.fromisoformat(text)
            at = at if at.tzinfo else at.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        _refuse(f"--expires {text}: write 30d, 12h, or a day: 2027-01-31")
    if at <= datetime.now(UTC):
        _refuse(f"--expires {text}: that is over already")
    if at.year > LAST_YEAR:
        _refuse(f"--expires {text}: give a year up to {LAST_YEAR}, or leave it out")
    return at


def _show(rows: list[dict[str, Any]], names: Sequence[str], *, as_json: bool, right: tuple[int, ...] = ()) -> None:
    """Rows as a table, or as JSON."""
    if as_json:
        typer.echo(orjson.dumps(rows, option=orjson.OPT_INDENT_2).decode())
        return
    cells = [[str("" if row[name] is None else row[name]) for name in names] for row in rows]
    for line in _aligned([[name.removesuffix("_at").upper() for name in names], *cells], right=right):
        typer.echo(line)


def _aligned(rows: list[list[str]], right: tuple[int, ...] = ()) -> list[str]:
    """Rows as lines whose columns begin, or at the given places end, below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _size(n_bytes: int) -> str:
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:.1f} GB"
    return f"{n_bytes / 1e6:.0f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.0f} kB"


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing in a log."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda here, whole: bar.update(task, completed=here, total=whole)


def _settings(**given: Any) -> Settings:
    """The settings, those that are given over the environment's and the file's; None and an empty list give none."""
    try:
        check_environment()
        check_file()
        return Settings(**{name: value for name, value in given.items() if value not in (None, (), [])})
    except SettingsError:  # the one setting that is no word or list of words
        _refuse('FUNDAMENT_TIERS should be JSON, as in {"gold": {"requests_per_minute": 50}}')
    except ValidationError as error:
        _refuse("; ".join(map(_told, error.errors())))
    except ValueError as error:
        _refuse(str(error))


def _told(fault: Any) -> str:
    name = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"{config_file()}: '{name}' is not a setting; docs/settings.md lists them"
    return f"{name}: {fault['msg'].removeprefix('Value error, ')}"


def _refuse(reason: str) -> NoReturn:
    typer.secho(f"fundament: {reason}", err=True, fg=typer.colors.RED)
    raise typer.Exit(1)
