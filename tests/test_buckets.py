"""Buckets of callers' inputs: what is listed, what is refused at start, what does not answer."""

import asyncio
import sys
from collections.abc import Callable

import pytest
from pydantic import ValidationError

from fundament import buckets
from fundament.config import Settings
from fundament.depot import whole
from fundament.errors import FetchError, FundamentError
from tests.servers import free_port
from tests.website import website


@pytest.mark.parametrize(
    ("url", "listed"),
    [
        ("s3://corpus/a", True),
        ("s3://corpus/a/b?c#d", True),
        ("gs://texts/a", True),
        ("gs://corpus/a", False),
        ("s3://corpus", False),
        ("s3://corpus/", False),
        ("S3://corpus/a", False),
        ("s3://Corpus/a", False),
        ("s3://corpus.example/a", False),
        ("s3://user@corpus/a", False),
        ("s3://corpus@other/a", False),
        ("s3:///corpus/a", False),
        ("s3:corpus/a", False),
        (" s3://corpus/a", False),
        ("http://corpus/a", False),
        ("", False),
    ],
)
def test_only_objects_of_listed_buckets(url: str, listed: bool) -> None:
    assert buckets.is_listed(url, ["s3://corpus", "gs://texts"]) == listed


@pytest.mark.parametrize("bucket", ["corpus", "s3://corpus/part", "s3://", "https://corpus", "file://x"])
def test_a_setting_that_names_no_bucket_is_refused(bucket: str) -> None:
    with pytest.raises(ValidationError, match="write s3://NAME or gs://NAME"):
        Settings(input_buckets=[bucket])


@pytest.mark.parametrize("url", ["files", "s3://", "https://files/x", "s3://files//x", "s3://files/x?y"])
def test_files_are_kept_in_a_bucket_or_nowhere(url: str) -> None:
    with pytest.raises(ValidationError, match="write s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"):
        Settings(files_url=url)


@pytest.mark.parametrize("url", ["s3://corpus", "s3://corpus/", "s3://corpus/some/where"])
def test_a_bucket_of_files_is_never_read_for_callers(url: str) -> None:
    with pytest.raises(ValidationError, match="callers could read all"):
        Settings(files_url=url, input_buckets=["s3://corpus"])
    assert Settings(files_url=url, input_buckets=["gs://corpus", "s3://corpus2"]).files_url == url


def test_buckets_without_their_client_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(FundamentError, match=r"pip install 'fundament\[cloud\]'"):
        buckets.require_client()


@pytest.fixture
def s3_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def point(url: str) -> None:
        for name, value in (("ENDPOINT_URL", url), ("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test")):
            monkeypatch.setenv(f"AWS_{name}", value)

    return point


def test_a_server_that_does_not_answer(s3_at: Callable[[str], None], runner: asyncio.Runner) -> None:
    s3_at(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(FetchError, match="s3://corpus does not answer"):
        runner.run(whole(buckets.read("s3://corpus/a", max_bytes=1)))


@pytest.mark.parametrize("status", [401, 403])
def test_a_bucket_that_may_not_be_read(s3_at: Callable[[str], None], runner: asyncio.Runner, status: int) -> None:
    with website() as site:
        site.say("/corpus/a", status=status)
        s3_at(site.url)
        with pytest.raises(FetchError, match="s3://corpus does not let this server read 'a'"):
            runner.run(whole(buckets.read("s3://corpus/a", max_bytes=1)))
