"""The command line's side of batch jobs: files become lines, go to a running server, and come back as vectors."""

import asyncio
import errno
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson

from fundament.errors import FundamentError, install, why
from fundament.jsonl import TEXT_COLUMNS, InputFileError, csv_lines, jsonl

ENDED = ("completed", "failed", "cancelled", "expired")
_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 60  # for a server that has answered before and restarts
_LATER = (
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=300)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PIECE_BYTES = 256 * 1024


class ClientError(FundamentError):
    """What the server refused, or that it does not answer."""


class LaterError(ClientError):
    """What the server would not answer now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How far a job is, in whichever form the server describes it.

    Attributes:
        status: in that form's words; one of `ENDED` at the end.
        n_lines: of the input; 0 until they are counted.
        n_completed: lines that became vectors.
        n_failed: lines that did not.
        n_tokens: that were read.
        error: why it failed.
    """

    status: str
    n_lines: int
    n_completed: int
    n_failed: int
    n_tokens: int
    error: str | None

    @classmethod
    def of(cls, job: Mapping[str, Any]) -> "Report":
        """Read a job made from a file (`request_counts`, `usage`) or from `input` and `input_url` (`stats`)."""
        counts = job.get("request_counts") or job.get("stats") or {}
        return cls(
            status=job["status"],
            n_lines=counts.get("total", 0),
            n_completed=counts.get("completed", 0),
            n_failed=counts.get("failed", 0),
            n_tokens=(job.get("usage") or counts).get("total_tokens", 0),
            error=job.get("error"),
        )


@dataclass(frozen=True, slots=True)
class Server:
    """Where jobs go.

    Attributes:
        url: of the server.
        key: None where it asks for none.
    """

    url: str
    key: str | None = None

    async def submit(self, lines: Path, name: str, fields: Mapping[str, Any]) -> str:
        """Hand a file in.

        Args:
            lines: JSONL, as of `as_lines`.
            name: what the server calls it.
            fields: what every line has in common, `model` among them.

        Returns:
            The job's id.

        Raises:
            ClientError: the server refuses it, or does not answer.
        """
        async with self._session() as session:
            with await asyncio.to_thread(lines.open, "rb") as file:
                form = aiohttp.FormData({"purpose": "batch"})
                form.add_field("file", file, filename=f"{name}.jsonl")
                sent = await _answer(session.post("v1/files", data=form))
            asked = {**fields, "input_file_id": sent["id"]}
            try:
                made = await _answer(session.post("v1/batch/embeddings", json=asked))
            finally:  # a job keeps the lines
                with suppress(FundamentError, aiohttp.ClientError, TimeoutError):
                    await _answer(session.delete(f"v1/files/{sent['id']}"))
        return str(made["id"])

    async def status(self, job: str) -> Report:
        """How far a job is."""
        async with self._session() as session:
            return Report.of(await _answer(session.get(f"v1/batch/{job}")))

    async def wait(self, job: str, seen: Callable[[Report], None]) -> Report:
        """Wait for a job's end, and show `seen` how it goes. A server that has answered once may be away for a minute.

        Raises:
            ClientError: there is no such job, or the server does not come back.
        """
        answered_at = None
        async with self._session() as session:
            while True:
                try:
                    now = Report.of(await _answer(session.get(f"v1/batch/{job}")))
                except (LaterError, aiohttp.ClientError, TimeoutError):
                    if answered_at is None or time.monotonic() > answered_at + _PATIENCE_SECONDS:
                        raise
                else:
                    answered_at = time.monotonic()
                    seen(now)
                    if now.status in ENDED:
                        return now
                await asyncio.sleep(_POLL_SECONDS)

    async def cancel(self, job: str) -> Report:
        """Stop a job."""
        async with self._session() as session:
            return Report.of(await _answer(session.delete(f"v1/batch/{job}")))

    async def fetch(self, job: str, kind: str, target: Path) -> int:
        """Write a job's output or errors to a file; it is there whole or not at all.

        Returns:
            Its size in bytes.
        """
        part = target.with_name(f".{target.name}.part")
        n_bytes = 0
        async with self._session() as session, session.get(f"v1/batch/{job}/{kind}") as response:
            await _refuse(response)
            try:
                # A file that a thread opens is nobody's where the wait for the thread is left.
                with part.open("wb") as file:
                    async for piece in response.content.iter_chunked(_PIECE_BYTES):
                        n_bytes += await asyncio.to_thread(file.write, piece)
                await asyncio.to_thread(part.replace, target)
            except BaseException as error:
                part.unlink(missing_ok=True)
                if isinstance(error, OSError | aiohttp.ClientError):
                    raise ClientError(f"{target} cannot be fetched: {error}") from error
                raise
        return n_bytes

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[aiohttp.ClientSession]:
        key = (self.key or "").strip()  # a secret in a file ends with a line
        if not key.isprintable():
            raise ClientError("The key has characters that no key has; is it the right file?")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with aiohttp.ClientSession(base(self.url), headers=headers, timeout=_TIMEOUT) as session:
            try:
                yield session
            except (aiohttp.ClientError, TimeoutError) as error:
                raise ClientError(f"{self.url} does not answer: {_why(error)}. Name another with --url.") from error


def base(url: str) -> str:
    """A server's address, given that or the `…/v1` that other clients want.

    Raises:
        ClientError: it is no web address.
    """
    try:
        found = urlsplit(url if "://" in url else f"http://{url}")
        _ = found.port  # read, and so checked
    except ValueError:
        found = urlsplit("")
    if found.scheme not in ("http", "https") or not found.hostname:
        raise ClientError(f"'{url}' is not a server's address; write --url http://127.0.0.1:8080.")
    return f"{found.scheme}://{found.netloc}{found.path.rstrip('/').removesuffix('/v1')}/"


def _why(error: aiohttp.ClientError | TimeoutError) -> str:
    """What a connection came to, in the system's words where it has any."""
    match error:
        case aiohttp.ClientConnectorSSLError():
            return "it does not speak https as it should; is it http?"
        case aiohttp.ClientConnectorDNSError():
            return "its name cannot be looked up"
        case aiohttp.ClientConnectorError():
            return why(error)
        case _:
            return str(error) or "it takes too long"


async def _answer(asking: Any) -> dict[str, Any]:
    async with asking as response:
        await _refuse(response)
        try:
            answer = await response.json()
        except (ValueError, aiohttp.ContentTypeError):
            answer = None
        if not isinstance(answer, dict) or not answer.keys() & {"id", "status"}:
            raise ClientError(f"{response.url} does not answer as Fundament does. Name another server with --url.")
        return answer


async def _refuse(response: aiohttp.ClientResponse) -> None:
    if response.ok:
        return
    if response.status == HTTPStatus.UNAUTHORIZED and "Authorization" not in response.request_info.headers:
        raise ClientError(f"{response.url.origin()} asks for a key: set FUNDAMENT_API_KEY, or --key.")
    try:
        detail = str((await response.json())["detail"])
    except (aiohttp.ContentTypeError, ValueError, KeyError, TypeError):
        detail = f"{response.url} answered {response.status}"
    raise (LaterError if response.status in _LATER else ClientError)(detail)


def as_lines(path: Path, target: Path) -> Path:
    """A file as JSONL: itself where it is, else written to `target`.

    Raises:
        FundamentError: a file that is not there, or of a kind that is not read.
    """
    try:
        match path.suffix.lower():
            case ".jsonl" | ".ndjson":
                with path.open("rb"):  # here rather than when it is sent
                    return path
            case ".csv":
                _write(target, csv_lines(path))
            case ".txt" | ".text":
                _write(target, (line for line in _text(path) if line.strip()))
            case ".parquet":
                _write(target, _parquet(path))
            case _:
                raise ClientError(f"{path}: a file's name should end in .jsonl, .csv, .parquet or .txt.")
    except UnicodeDecodeError as error:
        raise ClientError(f"{path} is not UTF-8.") from error
    except OSError as error:
        if error.errno in _FULL:
            raise ClientError(f"{target.parent} is full. Name another directory with TMPDIR.") from error
        raise ClientError(f"{path} cannot be read: {why(error)}.") from error
    except InputFileError as error:
        raise ClientError(f"{path}: {error.detail}") from error
    except orjson.JSONEncodeError as error:  # of Parquet, which has more types than JSON
        raise ClientError(f"{path}: a row holds something else than a text. {error}.") from error
    return target


def _write(target: Path, lines: Iterator[Any]) -> None:
    with target.open("wb") as file:
        file.writelines(jsonl(lines))


def _text(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            yield line.rstrip("\r\n")


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        raise ClientError(f"Parquet needs its reader: {install('parquet')}") from error
    try:
        file = parquet.ParquetFile(path)
        names = {name.lower(): name for name in file.schema_arrow.names}
        text = next((names[name] for name in TEXT_COLUMNS if name in names), None)
        key = next((names[name] for name in ("custom_id", "id") if name in names), None)
        if text is None:
            listed = ", ".join(f"'{name}'" for name in TEXT_COLUMNS)
            raise ClientError(f"{path} has no column of texts; call it one of {listed}.")
        for batch in file.iter_batches(columns=[text, key] if key else [text]):
            for row in batch.to_pylist():
                named = {"custom_id": str(row[key])} if key and row[key] is not None else {}
                yield {**named, "input": row[text]}
    except ArrowException as error:
        raise ClientError(f"{path} cannot be read: {error}") from error
