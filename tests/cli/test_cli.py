"""The command: what it says, on which stream, with which exit code."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from fundament import __version__, cli
from fundament.app import named_models
from fundament.catalog import CATALOG, EMBEDDED
from fundament.config import Settings, Tier
from fundament.errors import CheckpointError
from tests.cli.command import RUNNER, fundament
from tests.hub import make_bert

SPEC = CATALOG["jina-embedding-t-en-v1"]


def test_the_doctor_finds_nothing_here() -> None:
    code, out, _ = fundament("doctor", "--port", "0", "--device", "cpu", "--dtype", "float32")
    assert code == 0, out
    assert [line.split()[1] for line in out.splitlines()] == [
        "device",
        "cores",
        "model",
        "memory",
        "data",
        "store",
        "keys",
        "port",
    ]


def test_the_doctor_s_exit_code_tells_of_a_problem() -> None:
    code, out, _ = fundament("doctor", "--port", "0", "--model", SPEC.id)
    assert code == 1
    problems = [line for line in out.splitlines() if line.startswith("problem")]
    assert len(problems) == 1
    assert f"Get them: fundament pull {SPEC.id}" in problems[0]


def test_the_doctor_looks_at_aliases() -> None:
    options = ("doctor", "--port", "0", "--device", "cpu", "--alias", f"mine={EMBEDDED.id}")
    code, out, _ = fundament(*options)
    assert code == 0, out
    assert f"mine answers as {EMBEDDED.id}" in out
    code, out, _ = fundament(*options, "--alias", "yours=nobody")
    assert code == 1
    assert "'nobody' is not served" in out


def test_an_alias_of_nothing_stops_the_start() -> None:
    command = [sys.executable, "-m", "fundament", "serve", "--port", "0", "--alias", "mine=nobody"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("fundament: --alias mine=nobody: 'nobody' is not served")


@pytest.mark.parametrize("command", ["serve", "doctor"])
def test_a_setting_that_cannot_be_is_named(command: str) -> None:
    code, _, err = fundament(command, "--port", "99999")
    assert code == 1
    assert err == "fundament: port: Input should be less than or equal to 65535\n"


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (["bge-m4"], "`fundament models`). Did you mean bge-m3? To serve a directory of your own"),
        (["x={one}", "x={two}"], "--model x is given twice, for {one} and {two}; give one of them another name"),
    ],
)
def test_models_that_cannot_be_meant_stop_the_start(models: list[str], words: str, tmp_path: Path) -> None:
    places = {name: str(make_bert(tmp_path / name)) for name in ("one", "two")}
    with pytest.raises(CheckpointError) as refused:
        named_models(Settings(models=[model.format(**places) for model in models]))
    assert words.format(**places) in refused.value.detail


def test_a_model_that_is_not_here_stops_the_start() -> None:
    command = [sys.executable, "-m", "fundament", "serve", "--port", "0", "--model", SPEC.id]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"fundament: The weights of '{SPEC.id}' are not in ")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["models"], ["pull", "nobody-knows-it"]])
def test_what_needs_no_model_does_not_load_torch(arguments: list[str]) -> None:
    program = (
        "import sys; from typer.testing import CliRunner; from fundament.cli import app; "
        f"print(CliRunner().invoke(app, {arguments}).output); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_help_says_what_is_taken_where_nothing_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no line is broken
    code, out, _ = fundament("serve", "--help")
    assert code == 0
    for default in ("127.0.0.1", "8080", "auto", "text", "never"):
        assert f"default: ({default})" in out


def test_ctrl_c_ends_in_silence_also_while_it_starts() -> None:
    program = """
import builtins, sys
from fundament.__main__ import main
imports = builtins.__import__
def interrupted(name, *given):
    if name.startswith("fundament.cli"):
        raise KeyboardInterrupt
    return imports(name, *given)
builtins.__import__ = interrupted
main()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_the_doctor_takes_what_serve_takes() -> None:
    commands: Any = typer.main.get_command(cli.app)
    serve, doctor = ([each.opts for each in commands.commands[name].params] for name in ("serve", "doctor"))
    assert serve == doctor


def test_the_version() -> None:
    assert fundament("--version")[:2] == (0, f"fundament {__version__}\n")


@pytest.mark.parametrize("command", [["serve", "--lazy"], ["doctor"], ["models"], ["keys", "list"]])
def test_settings_that_are_named_and_not_there_stop_everything(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUNDAMENT_CONFIG", str(tmp_path / "prd.toml"))
    result = RUNNER.invoke(cli.app, command)
    assert result.exit_code == 1
    assert result.stderr.strip() == f"fundament: FUNDAMENT_CONFIG names {tmp_path / 'prd.toml'}, which is not there."


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("FUNDAMENT_ATUH", "true", "FUNDAMENT_ATUH is not a setting; "),
        ("FUNDAMENT_ATUH", "true", "docs/settings.md lists them. Did you mean FUNDAMENT_AUTH?\n"),
        ("fundament_model", "bge-m3", "docs/settings.md lists them. Did you mean FUNDAMENT_MODELS?\n"),
        ("FUNDAMENT_QQQQ", "", "docs/settings.md lists them.\n"),
        ("FUNDAMENT_DATA_DIR", "", "data_dir: it is empty; name a directory"),
        ("FUNDAMENT_TIERS", "gold", "FUNDAMENT_TIERS should be JSON, as in "),
        ("FUNDAMENT_PORT", "tcp://10.0.0.7:80", "enableServiceLinks: false, or --port"),
    ],
)
def test_a_variable_that_says_nothing_or_cannot_be_meant_stops_the_start(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    code, out, err = fundament("models")
    assert (code, out) == (1, "")
    assert words in err
    monkeypatch.delenv(name)


def test_what_is_not_utf_8_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUNDAMENT_DATA_DIR", os.fsdecode(b"/tmp/d\xff"))
    assert "data_dir: it is not UTF-8" in fundament("models")[2]
    monkeypatch.delenv("FUNDAMENT_DATA_DIR")
    monkeypatch.setenv("FUNDAMENT_MODELS", os.fsdecode(b"mine=/tmp/d\xff"))
    assert "models: it is not UTF-8" in fundament("models")[2]
    monkeypatch.delenv("FUNDAMENT_MODELS")
    monkeypatch.setattr("sys.argv", ["fundament", "keys", "revoke", os.fsdecode(b"a\xff")])
    code, _, said = fundament("keys", "revoke", os.fsdecode(b"a\xff"))
    assert (code, "not UTF-8" in said) == (1, True)


def test_a_table_of_the_environment_stands_in_place_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("fundament.toml").write_text("port = 9\n[tiers.gold]\nrequests_per_minute = 5\n[tiers.old]\n")
    monkeypatch.setenv("FUNDAMENT_TIERS", '{"gold": {"concurrency": 2}}')
    settings = Settings()
    assert settings.tiers == {"gold": Tier(concurrency=2)}
    assert settings.port == 9


def test_the_first_process_of_a_container_ends_by_a_signal_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("os.getpid", lambda: 1)
    try:
        fundament("--version")
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGTERM)
        assert ended.value.code == 143
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_what_kubernetes_says_of_services_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT_80_TCP", "PORT_80_TCP_ADDR", "API_PORT"):
        monkeypatch.setenv(f"FUNDAMENT_{name}", "10.0.0.7")
    assert fundament("models")[0] == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"port = \n", "fundament.toml cannot be read: Invalid value"),
        (b"\xff", "fundament.toml cannot be read"),
        (b"porrt = 1\n", "fundament.toml: 'porrt' is not a setting; docs/settings.md lists them. Did you mean port?"),
        (b'port = "x"\n', "fundament.toml: port: write a whole number"),
        (b"memory_gb = inf\n", "memory_gb: Input should be a finite number"),
        (b"drain_seconds = nan\n", "drain_seconds: Input should be"),
        (b"threads = 100000\n", "threads: Input should be less than or equal to 1024"),
        (b'public_url = "abc"\n', "public_url: write a web address"),
        (b"job_hours = 1e8\n", "job_hours: Input should be less than or equal to 100000"),
        (b"max_body_mb = 1e308\n", "max_body_mb: at most 1,000,000,000"),
        (b"[tiers.%s]\n" % (b"x" * 41), "should have at most 40 characters"),
    ],
)
def test_settings_that_are_wrong_are_refused_in_a_sentence(content: bytes, words: str) -> None:
    Path("fundament.toml").write_bytes(content)
    result = RUNNER.invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
