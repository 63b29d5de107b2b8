"""`fundament keys`, `usage` and `db`: what they say, on which stream, with which exit code."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from fundament import cli
from fundament.app import create_app
from fundament.config import Settings
from fundament.errors import FundamentError
from tests.cli.command import RUNNER, fundament
from tests.servers import database_on

COMMAND = [sys.executable, "-m", "fundament"]


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
    _, full = make_key("--balance", str(2**53))
    _, uncounted = make_key()
    refused = {
        ("rotate", key_id): f"key {key_id} is revoked, for good",
        ("revoke", "nobody"): "there is no key with the id 'nobody': fundament keys list",
        ("credit", "nobody", "1"): "there is no key with the id 'nobody'",
        ("credit", uncounted, "1"): f"the tokens of key {uncounted} are not counted",
        ("credit", full, "5"): f"the balance of key {full} has no room for 5 tokens: it is {2**53:,}",
    }
    for command, reason in refused.items():
        code, out, err = fundament("keys", *command)
        assert (code, out) == (1, "")
        assert reason in err


def test_a_key_that_cannot_be_written_can_be_had_again() -> None:
    with Path("/dev/full").open("w") as full:
        run = partial(subprocess.run, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        made = run([*COMMAND, "keys", "create", "ci"])
        [key] = json.loads(fundament("keys", "list", "--json")[1])
        assert made.returncode == 1
        assert made.stderr.splitlines()[-1] == (
            "fundament: the key could not be written: no space left on device. "
            f"Give it another secret: fundament keys rotate {key['id']}"
        )
        listed = run([*COMMAND, "keys", "list"])
    assert listed.returncode == 1
    assert listed.stderr == "fundament: what it says cannot be written: no space left on device\n"


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
    "when", ["", "yesterday", "2020-01-01", "0d", "-3h", "d", "99999999999d", "9999-12-31T23:59:59-10:00"]
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


def test_no_store_is_made_by_who_reads(tmp_path: Path) -> None:
    for command in (("keys", "list"), ("keys", "revoke", "a"), ("usage",)):
        code, out, err = fundament(*command, "--data-dir", str(tmp_path / "misspelt"))
        assert (code, out) == (1, "")
        there = tmp_path / "misspelt" / "fundament.db"
        assert err == f"fundament: there is no store {there} yet. Is it another --data-dir?\n"
    assert not (tmp_path / "misspelt").exists()
    (tmp_path / "file").touch()
    assert "there is no store" in fundament("keys", "list", "--data-dir", str(tmp_path / "file"))[2]
    assert f"{tmp_path / 'file'} is a file" in fundament("keys", "create", "a", "--data-dir", str(tmp_path / "file"))[2]


def test_usage_without_any_is_an_empty_table() -> None:
    assert fundament("db", "upgrade")[0] == 0
    code, out, err = fundament("keys", "list")
    assert (code, len(out.splitlines()), err) == (0, 1, "No keys yet: fundament keys create NAME\n")
    assert "write a day: 2027-01-31" in fundament("usage", "--since", "yesterday")[2]
    assert (
        "--since 2026-02-01 is after --until 2026-01-01"
        in (fundament("usage", "--since", "2026-02-01", "--until", "2026-01-01")[2])
    )
    assert fundament("usage")[1].split() == ["DAY", "KEY_ID", "MODEL", "ENDPOINT", "REQUESTS", "TOKENS"]
    assert fundament("usage", "--csv", "--json")[2].endswith("--csv or --json, not both\n")
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


def test_a_store_that_is_no_database_is_refused_in_a_sentence(data_dir: Path) -> None:
    data_dir.mkdir()
    (data_dir / "fundament.db").write_bytes(b"garbage, and more of it")
    result = RUNNER.invoke(cli.app, ["keys", "list"])
    assert result.exit_code == 1
    assert "cannot be used: file is not a database" in result.stderr
