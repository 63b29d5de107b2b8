"""Batch jobs of a running server: files are handed in, their vectors fetched."""

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fundament.catalog import EMBEDDED
from fundament.cli.output import refuse, size_of
from fundament.errors import FundamentError

if TYPE_CHECKING:
    from fundament.client import Report, Server

app = typer.Typer(help="Batch jobs of a running server: many lines, handed in once.", no_args_is_help=True)

Files = Annotated[list[str], typer.Argument(metavar="FILE...", help=".jsonl, .csv, .parquet or .txt.")]
FilesOrJobs = Annotated[list[str], typer.Argument(metavar="FILE...", help="Files that were handed in, or ids of jobs.")]
Url = Annotated[str, typer.Option(envvar="FUNDAMENT_URL", help="The server.")]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="FUNDAMENT_API_KEY", help="The key, where it asks for one; others on this machine can see an option."
    ),
]


@app.command("submit")
def batch_submit(
    file: Files,
    model: Annotated[str, typer.Option("--model", help="The model that embeds them.")] = EMBEDDED.id,
    task: Annotated[str | None, typer.Option(help="What the vectors are for.")] = None,
    dimensions: Annotated[int | None, typer.Option(help="Keep this many numbers of each vector.")] = None,
    embedding_type: Annotated[
        str | None, typer.Option(help="float, base64, binary or ubinary.", show_default="float")
    ] = None,
    truncate: Annotated[
        bool | None,
        typer.Option("--truncate/--no-truncate", help="Cut what is longer than the context.", show_default="server's"),
    ] = None,
    webhook_url: Annotated[str | None, typer.Option(help="Told when the job ends.")] = None,
    url: Url = "http://127.0.0.1:8080",
    key: ApiKey = None,
) -> None:
    """Hand files in: .jsonl, .csv, .parquet or .txt. The job's id is printed, and kept in FILE.job."""
    given = {
        "task": task,
        "dimensions": dimensions,
        "embedding_type": embedding_type,
        "truncate": truncate,
        "webhook_url": webhook_url,
    }
    fields = {"model": model} | {name: value for name, value in given.items() if value is not None}
    with _asking(url, key) as server, tempfile.TemporaryDirectory() as folder:
        from fundament.client import as_lines

        paths = list(map(Path, file))
        # All are read before the first is handed in.
        lines = [as_lines(path, Path(folder) / f"{place}.jsonl") for place, path in enumerate(paths)]
        for path, read in zip(paths, lines, strict=True):
            job, note = asyncio.run(server.submit(read, path.stem, fields)), _note(path)
            typer.echo(job)  # first: it runs, whether its id can be kept or not
            if note.is_file():
                typer.secho(f"{path} was handed in before, as {note.read_text().strip()}; that job stays.", err=True)
            note.write_text(f"{job}\n")


@app.command("status")
def batch_status(file: FilesOrJobs, url: Url = "http://127.0.0.1:8080", key: ApiKey = None) -> None:
    """Say how far jobs are."""
    with _asking(url, key) as server:
        for name in file:
            _tell(name, asyncio.run(server.status(_job_of(name))))


@app.command("wait")
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


@app.command("fetch")
def batch_fetch(file: FilesOrJobs, url: Url = "http://127.0.0.1:8080", key: ApiKey = None) -> None:
    """Fetch what jobs made into FILE.output.jsonl, what failed into FILE.errors.jsonl. Exit code 1 if a job failed."""
    failed = False
    with _asking(url, key) as server:
        for name in file:
            job = _job_of(name)
            now = asyncio.run(server.status(job))
            for kind, count in (("output", now.n_completed), ("errors", now.n_failed)):
                target = Path(f"{name}.{kind}.jsonl")
                if not count and (kind == "errors" or now.status == "failed"):
                    target.unlink(missing_ok=True)  # an earlier job's
                else:
                    size = size_of(asyncio.run(server.fetch(job, kind, target)))
                    typer.echo(f"{target}: {_counted(count)}, {size}")
            if now.status == "failed":
                failed = True
                _tell(name, now)
    if failed:
        raise typer.Exit(1)


@app.command("cancel")
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
    if Path(name).suffix:
        raise FundamentError(f"There is no file {name}, and no job has such an id.")
    return name


def _counted(n_lines: int) -> str:
    return f"{n_lines:,} line{'s' * (n_lines != 1)}"


def _tell(name: str, job: "Report") -> None:
    done = f"{job.n_completed:,} of {_counted(job.n_lines)}" if job.n_lines else _counted(job.n_completed)
    failed = f", {job.n_failed:,} failed" if job.n_failed else ""
    why = f": {job.error}" if job.error else ""
    typer.echo(f"{name}: {job.status}, {done}{failed}{why}")


@contextmanager
def _asking(url: str, key: str | None) -> Iterator["Server"]:
    from fundament.client import Server

    try:
        yield Server(url, key)
    except (FundamentError, OSError) as error:
        refuse(error.detail if isinstance(error, FundamentError) else str(error))
    except KeyboardInterrupt:
        refuse("interrupted; jobs that were handed in go on")


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
