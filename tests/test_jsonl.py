"""CSV files as lines."""

from pathlib import Path
from typing import Any

import pytest

from fundament.jsonl import InputFileError, csv_lines


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (
            'id,Text\n1,one\n2,"two, three"\n',
            [{"custom_id": "1", "input": "one"}, {"custom_id": "2", "input": "two, three"}],
        ),
        ("text\none\n\ntwo\n", [{"input": "one"}, {"input": "two"}]),
        ("\ntext\none\n", [{"input": "one"}]),
        ("", []),
        ("\ufefftext,other\none,x\n", [{"input": "one"}]),
        ('text\n"two\nlines"\n', [{"input": "two\nlines"}]),
        ("id,text\n1\n", [{"custom_id": "1", "input": None}]),
    ],
)
def test_csv_becomes_lines(tmp_path: Path, text: str, lines: list[dict[str, Any]]) -> None:
    (tmp_path / "csv").write_text(text, newline="")
    assert list(csv_lines(tmp_path / "csv")) == lines


@pytest.mark.parametrize("text", [b"a,b\n1,2\n", b"title\none\n", b"text\n\xff\n", b'text\n"open\n'])
def test_what_is_no_csv_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "csv").write_bytes(text)
    with pytest.raises(InputFileError, match="CSV"):
        list(csv_lines(tmp_path / "csv"))
