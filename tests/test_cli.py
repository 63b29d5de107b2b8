"""The command: what it says, on which stream, with which exit code."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from fundament import __version__, cli
from fundament.app import create_app, named_models
from fundament.catalog import CATALOG, EMBEDDED
from fundament.config import Settings
from fundament.engine import hub as hub_module
from fundament.engine.weights import pulled
from fundament.errors import CheckpointError, FundamentError, ModelNotFoundError
from tests.hub import Hub, hub_of, make_bert
from tests.servers import database_on

SPEC = CATALOG["jina-embedding-t-en-v1"]
RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory and a working directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUNDAMENT_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("published"))


@pytest.fixture
def hub(published: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub_of(published) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub
        huggingface_hub.close_session()


def fundament(*arguments: str) -> tuple[int, str, str]:
    """The exit code, standard output and standard error of a command."""
    result = RUNNER.invoke(cli.app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_model_is_pulled_once(hub: Hub, data_dir: Path) -> None:
    code, out, _ = fundament("pull", f"jinaai/{SPEC.id}")
    assert code == 0
    directory = data_dir / "models" / SPEC.id
    assert out.splitlines() == [
        f"{SPEC.id}: licence Apache-2.0, from {SPEC.repo}",
        f"{SPEC.id}: {pulled(data_dir)[SPEC.id].n_bytes / 1e6:.0f} MB in {directory}",
    ]
    n_requests = len(hub.seen)
    code, out, _ = fundament("pull", SPEC.id)
    assert code == 0
    assert f"{SPEC.id}: already in {directory}" in out
    assert len(hub.seen) == n_requests


def test_the_embedded_model_is_there_already(hub: Hub) -> None:
    code, out, _ = fundament("pull", EMBEDDED.id)
    assert (code, hub.seen) == (0, [])
    assert f"{EMBEDDED.id}: already in " in out


def test_a_running_application_serves_what_was_pulled_meanwhile(hub: Hub, data_dir: Path) -> None:
    parts = create_app(Settings(data_dir=data_dir, preload=False)).state.parts
    assert set(parts.served()) == {EMBEDDED.id}
    with pytest.raises(ModelNotFoundError, match="fundament pull"):
        parts.find(SPEC.id)
    assert fundament("pull", SPEC.id)[0] == 0
    assert parts.find(SPEC.id) == SPEC
    assert set(parts.served()) == {EMBEDDED.id, SPEC.id}


def test_a_licence_is_shown_first_and_must_be_accepted(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "CATALOG", {SPEC.id: replace(SPEC, licence="CC-BY-NC-4.0")})
    code, out, err = fundament("pull", SPEC.id)
    assert (code, hub.seen) == (1, [])
    assert out == f"{SPEC.id}: licence CC-BY-NC-4.0, from {SPEC.repo}\n"
    assert "commercial use needs an agreement with jinaai" in err
    assert "add --accept-licence" in err
    assert fundament("pull", SPEC.id, "--accept-licence")[0] == 0


def test_nothing_is_pulled_where_one_of_several_is_refused(hub: Hub, data_dir: Path) -> None:
    code, _, err = fundament("pull", SPEC.id, "elser-v2")
    assert code == 1
    assert err.startswith("fundament: The weights of 'elser-v2' cannot be pulled. None are public: serve a directory")
    code, _, err = fundament("pull", SPEC.id, "nobody-knows-it")
    assert code == 1
    assert err == "fundament: 'nobody-knows-it' is not in the catalogue; `fundament models` lists it.\n"
    assert fundament("pull", SPEC.id, "bge-m4")[2].endswith("`fundament models` lists it. Did you mean bge-m3?\n")
    assert hub.seen == []
    assert not data_dir.exists()


def test_what_goes_wrong_is_one_line_and_exit_code_1(hub: Hub) -> None:
    hub.listing_status = (503, {})
    code, _, err = fundament("pull", SPEC.id)
    assert code == 1
    assert err.splitlines() == [
        f"fundament: {hub.url} answered 503 for {SPEC.repo}; what arrived is kept, pull again later."
    ]


def test_an_interrupted_pull_says_how_to_go_on(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(hub_module.os, "fsync", interrupt)
        code, _, err = fundament("pull", SPEC.id)
    assert code == 1
    assert "the same command goes on from there" in err
    assert fundament("pull", SPEC.id)[0] == 0


def test_the_table_of_models(hub: Hub, data_dir: Path) -> None:
    code, out, _ = fundament("models")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert set(lines) == {"ID", *CATALOG}
    assert lines[EMBEDDED.id].endswith("91 MB  embedded")
    assert lines[SPEC.id].endswith("14M params")
    assert lines["elser-v2"].endswith("no public weights")
    assert len({line.index("params") for line in lines.values() if "params" in line}) == 1

    assert fundament("pull", SPEC.id)[0] == 0
    rows = {row["id"]: row for row in json.loads(fundament("models", "--json")[1])}
    assert rows[SPEC.id]["here"] == "on disk"
    assert rows[SPEC.id]["bytes"] == len(hub.files["model.safetensors"])
    assert rows[SPEC.id]["dimensions"] == SPEC.dim
    (data_dir / "models" / SPEC.id / "pulled.json").write_text("{}")
    assert {row["id"]: row["here"] for row in json.loads(fundament("models", "--json")[1])}[SPEC.id] == "pull again"


def test_a_family_without_a_module_is_not_served_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "CATALOG", {SPEC.id: replace(SPEC, family="of_another_time")})
    assert fundament("models")[1].splitlines()[1].endswith("not served yet")
    code, _, err = fundament("pull", SPEC.id)
    assert code == 1
    assert "not served by this release yet" in err


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


def test_the_version() -> None:
    assert fundament("--version")[:2] == (0, f"fundament {__version__}\n")


def make_key(*options: str) -> tuple[str, str]:
    """A new key and its id."""
    code, out, err = fundament("keys", "create", "ci", *options)
    assert code == 0
    assert "fundament.db. It is shown this once:" in err
    [key] = out.split()
    return key, key[5:17]


def test_a_key_is_made_listed_topped_up_rotated_and_revoked() -> None:
    key, key_id = make_key("--tier", "tier1", "--balance", "5", "--admin", "--expires", "30d")
    assert len(key) == 65
    [listed] = json.loads(fundament("keys", "list", "--json")[1])
    assert (listed["id"], listed["name"], listed["tier"], listed["balance"]) == (key_id, "ci", "tier1", 5)
    assert (listed["admin"], listed["state"]) == (True, "active")
    assert key[17:] not in json.dumps(listed)
    assert fundament("keys", "credit", key_id, "7")[1] == "12 tokens\n"
    again = fundament("keys", "rotate", key_id)[1].strip()
    assert again != key
    assert again[:17] == key[:17]
    assert fundament("keys", "revoke", key_id)[0] == 0
    assert "revoked" in fundament("keys", "list")[1]
    for command in (("rotate", key_id), ("revoke", "nobody"), ("credit", "nobody", "1")):
        code, out, err = fundament("keys", *command)
        assert (code, out) == (1, "")
        assert "there is no key" in err


def test_a_key_is_given_another_name_tier_and_end() -> None:
    _, key_id = make_key("--expires", "30d")
    assert fundament("keys", "change", key_id, "--expires", "2099-01-31")[1] == (
        f"{key_id} is 'ci' of tier free, and expires 2099-01-31 00:00 UTC\n"
    )
    assert fundament("keys", "change", key_id, "--name", "search", "--tier", "tier2", "--expires", "never")[1] == (
        f"{key_id} is 'search' of tier tier2, and does not expire\n"
    )
    refused = {
        (key_id,): "--name, --tier or --expires",
        (key_id, "--tier", "gold"): "free, tier1, tier2",
        (key_id, "--name", ""): "a name has",
        (key_id, "--expires", "2020-01-01"): "--expires",
        ("nobody", "--tier", "free"): "there is no key",
    }
    for arguments, reason in refused.items():
        code, out, err = fundament("keys", "change", *arguments)
        assert (code, out) == (1, "")
        assert reason in err
    [listed] = json.loads(fundament("keys", "list", "--json")[1])
    assert (listed["name"], listed["tier"], listed["expires_at"]) == ("search", "tier2", None)


@pytest.mark.parametrize(
    "when", ["yesterday", "2020-01-01", "0d", "-3h", "d", "99999999999d", "9999-12-31T23:59:59-10:00"]
)
def test_a_time_that_cannot_be_meant_is_refused(when: str) -> None:
    code, out, err = fundament("keys", "create", "x", f"--expires={when}")
    assert (code, out) == (1, "")
    assert "--expires" in err


def test_a_tier_that_is_not_there_is_refused_with_those_that_are() -> None:
    code, _, err = fundament("keys", "create", "x", "--tier", "gold")
    assert code == 1
    assert "free, tier1, tier2" in err
    Path("fundament.toml").write_text("[tiers.gold]\ntokens_per_minute = 7\n")
    assert fundament("keys", "create", "x", "--tier", "gold")[0] == 0


def test_usage_without_any_is_an_empty_table() -> None:
    assert fundament("usage")[1].split() == ["DAY", "KEY_ID", "MODEL", "ENDPOINT", "REQUESTS", "TOKENS"]
    assert fundament("usage", "--csv", "--since", "2026-01-01")[1] == "day,key_id,model,endpoint,requests,tokens\n"
    assert json.loads(fundament("usage", "--json")[1]) == []


def test_a_store_that_cannot_be_reached_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUNDAMENT_STORE_URL", "postgresql://me:hunter2@127.0.0.1:1/x")
    for command in (("keys", "list"), ("usage",), ("db", "upgrade")):
        code, out, err = fundament(*command)
        assert (code, out) == (1, "")
        assert len(err.splitlines()) == 1
        assert "hunter2" not in err


def test_an_old_schema_is_refused_until_it_is_upgraded(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with database_on(postgres_url) as url:
        monkeypatch.setenv("FUNDAMENT_STORE_URL", url)
        with pytest.raises(FundamentError, match="fundament db upgrade"):
            create_app(Settings())
        assert fundament("doctor", "--port", "0")[0] == 1
        assert fundament("db", "upgrade")[0] == 0
        assert fundament("keys", "list")[0] == 0
        assert fundament("doctor", "--port", "0")[0] == 0


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


def test_what_kubernetes_says_of_services_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT_80_TCP", "PORT_80_TCP_ADDR", "API_PORT"):
        monkeypatch.setenv(f"FUNDAMENT_{name}", "10.0.0.7")
    assert fundament("models")[0] == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"port = \n", "fundament.toml cannot be read: Invalid value"),
        (b"\xff", "fundament.toml cannot be read"),
        (b"porrt = 1\n", "fundament.toml: 'porrt' is not a setting"),
        (b"memory_gb = inf\n", "memory_gb: Input should be a finite number"),
        (b"drain_seconds = nan\n", "drain_seconds: Input should be"),
        (b"threads = 100000\n", "threads: Input should be less than or equal to 1024"),
        (b'public_url = "abc"\n', "public_url: write a web address"),
    ],
)
def test_settings_that_are_wrong_are_refused_in_a_sentence(content: bytes, words: str) -> None:
    Path("fundament.toml").write_bytes(content)
    result = RUNNER.invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_store_that_is_no_database_is_refused_in_a_sentence(data_dir: Path) -> None:
    data_dir.mkdir()
    (data_dir / "fundament.db").write_bytes(b"garbage, and more of it")
    result = RUNNER.invoke(cli.app, ["keys", "list"])
    assert result.exit_code == 1
    assert "cannot be used: file is not a database" in result.stderr
