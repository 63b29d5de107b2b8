"""The `fundament` command: parses and delegates. What loads torch is imported by the command that needs it."""

import os
import signal
import sys
from typing import Annotated

import typer

from fundament import __version__
from fundament.cli import batch, store, weights
from fundament.cli.options import (
    Aliases,
    AllowTorchscript,
    Auth,
    DataDir,
    Device,
    Dtype,
    Host,
    IdleSeconds,
    LogFormat,
    MemoryGb,
    Models,
    Port,
    Preload,
    settings_of,
)
from fundament.cli.output import aligned, refuse
from fundament.config import is_text
from fundament.errors import FundamentError

app = typer.Typer(
    help="The Jina Search Foundation API on your own hardware.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options of the command itself."""
    if os.getpid() == 1:  # in a container: the system ends the first process by no signal that it does not handle
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if not all(map(is_text, sys.argv)):
        refuse("An argument is not UTF-8. Give the file another name, or set LC_ALL=C.UTF-8.")
    if version:
        typer.echo(f"fundament {__version__}")
        raise typer.Exit


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
    preload: Preload = None,
    memory_gb: MemoryGb = None,
    idle_seconds: IdleSeconds = None,
    log_format: LogFormat = None,
) -> None:
    """Serve models over HTTP. Further settings: docs/settings.md."""
    settings = settings_of(**context.params)
    from fundament.server import run

    try:
        run(settings)
    except FundamentError as error:
        refuse(error.detail)


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
    """Run batch jobs of the servers on the same store and files; start as many as you like."""
    settings = settings_of(**context.params)
    from fundament.server import work

    try:
        work(settings)
    except FundamentError as error:
        refuse(error.detail)


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
    preload: Preload = None,
    memory_gb: MemoryGb = None,
    idle_seconds: IdleSeconds = None,
    log_format: LogFormat = None,
) -> None:
    """Say what would keep `serve` with these options from answering, and what to do. Exit code 1 if anything would."""
    settings = settings_of(**context.params)
    from fundament.doctor import examine

    findings = examine(settings)
    colors = {"ok": typer.colors.GREEN, "warning": typer.colors.YELLOW, "problem": typer.colors.RED}
    for finding, line in zip(findings, aligned([[f.level, f.subject, f.detail] for f in findings]), strict=True):
        typer.secho(line, fg=colors[finding.level])
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


for command in (serve, worker, weights.pull, weights.models, store.usage, doctor):
    app.command()(command)
app.add_typer(store.keys, name="keys")
app.add_typer(store.db, name="db")
app.add_typer(batch.app, name="batch")
