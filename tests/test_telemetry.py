"""Logs: one event, one line, whatever a caller has put into its fields."""

import io
import logging
from collections.abc import Iterator

import pytest

from fundament.telemetry import configure_logs, log, say


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What is logged as text."""
    out = io.StringIO()
    before, level, propagates = log.handlers[:], log.level, log.propagate
    monkeypatch.setattr("sys.stderr", out)
    configure_logs("text", "info")
    yield out
    log.handlers[:], log.propagate = before, propagates
    log.setLevel(level)


def test_a_line_says_when_what_and_its_fields(written: io.StringIO) -> None:
    say("request", path="/v1/embeddings", status=200, reason="Two words.")
    record = logging.makeLogRecord({"msg": "at", "levelname": "INFO", "levelno": logging.INFO, "created": 0.0})
    log.handle(record)
    first, second = written.getvalue().splitlines()
    assert first.endswith('info    request  path=/v1/embeddings status=200 reason="Two words."')
    assert second == "1970-01-01 00:00:00Z info    at"


@pytest.mark.parametrize(
    "told", ["x\n08:09:10 info    request", "x\r\ny", "\x1b[31mred", "a\u2028b", "a\x85b", "v status=200", 'say "so"']
)
def test_a_field_is_never_another_line_or_another_field(written: io.StringIO, told: str) -> None:
    say("job failed", reason=told, job="one")
    [line] = written.getvalue().splitlines()
    assert line.isprintable()
    assert line.endswith(" job=one")
    assert 'reason="' in line
