"""The command, run in this process."""

from typer.testing import CliRunner

from fundament import cli

RUNNER = CliRunner()


def fundament(*arguments: str) -> tuple[int, str, str]:
    """The exit code, standard output and standard error of a command."""
    result = RUNNER.invoke(cli.app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr
