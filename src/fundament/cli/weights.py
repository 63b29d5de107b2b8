"""Models on this machine: download them, list them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from fundament.catalog import CATALOG, ModelSpec, find
from fundament.cli.options import DataDir, settings_of
from fundament.cli.output import aligned, refuse, size_of
from fundament.engine.weights import Local, directory_of, embedded, reading, where_whole
from fundament.errors import FundamentError, near
from fundament.models import families


def pull(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Models of the catalogue: `fundament models`.")],
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="Your use is one that a non-commercial licence allows.")
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Download models; an interrupted download goes on. HF_ENDPOINT, HF_TOKEN and HTTPS_PROXY are heeded."""
    settings = settings_of(data_dir=data_dir)
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
            typer.echo(f"{spec.id}: {size_of(local.n_bytes)} in {local.directory}")
    except FundamentError as error:
        refuse(error.detail)
    except KeyboardInterrupt:
        refuse("interrupted; what arrived is kept, the same command goes on from there")


def models(
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array, for scripts.")] = False,
) -> None:
    """List the models of the catalogue, and which are on this machine."""
    settings = settings_of(data_dir=data_dir)
    try:
        with reading():
            rows = [_row(spec, settings.data_dir) for spec in CATALOG.values()]
    except FundamentError as error:
        refuse(error.detail)
    if as_json:
        typer.echo(orjson.dumps(rows, option=orjson.OPT_INDENT_2).decode())
        return
    lines = [["ID", "KIND", "DIM", "CONTEXT", "LICENCE", "PARAMS", "SIZE", "HERE"], *map(_cells, rows)]
    for line in aligned(lines, right=(2, 3, 5, 6)):
        typer.echo(line)
    typer.secho("docs/models.md says what each is for.", err=True)


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
        here = None
    return {
        "id": spec.id,
        "kind": spec.kind,
        "dimensions": spec.dim,
        "context": spec.context,
        "licence": spec.licence,
        "parameters": spec.n_parameters,
        "bytes": Local(spec, there).n_bytes if there else None,
        "here": here,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    """The same as cells of the table, with nothing in the place of a zero."""
    size = size_of(row["bytes"]) if row["bytes"] else ""
    params = f"{row['parameters'] / 1e6:,.0f} M"
    shown = (row["id"], row["kind"], row["dimensions"], row["context"], row["licence"], params, size, row["here"])
    return [str(cell or "") for cell in shown]


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
