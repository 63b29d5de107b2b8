"""The model hub: a repository's files at one commit, into a directory that is either whole or not there.

Files gather in `models/.<id>.partial/`, go on where an interrupted pull stopped, and are compared with the digests that
the hub gives. The receipt is written last; then one rename makes the directory a model.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import orjson
from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, httpx  # type: ignore[attr-defined]

from fundament import __version__
from fundament.catalog import ModelSpec
from fundament.engine.weights import RECEIPT, WITHOUT_SAFETENSORS, FileRecord, Local, Receipt, directory_of
from fundament.errors import FundamentError
from fundament.models import families

# Weights, and what tokenizers and configurations come in, ColBERT's too. Python files are never taken: nothing of them
# is run.
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "artifact.metadata")

# The same model again, for other programs.
_EXPORTS = ("onnx/*", "openvino/*", "coreml/*", "gguf/*", "mlx/*", "original/*", "consolidated*.safetensors")

_COMMIT_FILE = "pulling.json"  # the commit that a pull began with, so that going on means the same files
_ATTEMPTS = 5

Progress = Callable[[int, int], None]
"""Called with the bytes that are here and the bytes of the whole model."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as the hub describes it.

    Attributes:
        name: its path in the repository.
        size: in bytes.
        digest: SHA-256 of a large file; Git's SHA-1 of the blob otherwise.
        url: where it is.
    """

    name: str
    size: int
    digest: str
    url: str

    def matches(self, path: Path) -> bool:
        """Whether a local file has this size and digest."""
        if path.stat().st_size != self.size:
            return False
        if len(self.digest) == 64:
            return sha256_of(path) == self.digest
        blob = f"blob {self.size}\0".encode() + path.read_bytes()
        return hashlib.sha1(blob, usedforsecurity=False).hexdigest() == self.digest


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_unpullable(spec: ModelSpec, *, accept_licence: bool = False) -> None:
    """Refuse a model that cannot or must not be pulled as asked.

    Raises:
        FundamentError: no public weights, a family that is not served, a non-commercial licence not accepted.
    """
    if not spec.repo:
        raise FundamentError(f"The weights of '{spec.id}' cannot be pulled. {spec.way_in}")
    if spec.family not in families():
        raise FundamentError(f"'{spec.id}' is not served by this release yet, so it is not pulled.")
    if spec.non_commercial and not accept_licence:
        raise FundamentError(
            f"'{spec.id}' is licensed {spec.licence}: commercial use needs an agreement with {spec.owner}. "
            "Where your use is allowed, say so: add --accept-licence"
        )


def pull(spec: ModelSpec, data_dir: Path, *, endpoint: str | None = None, progress: Progress | None = None) -> Local:
    """Bring a model onto this machine; one that was there is replaced when the new one is whole.

    Args:
        spec: what to pull; its revision, or the commit that `main` is now.
        data_dir: where models are kept.
        endpoint: address of the hub; None is the public one.
        progress: told as bytes arrive.

    Raises:
        FundamentError: it cannot be pulled now, with the way out; what arrived is kept for the next attempt.
    """
    endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
    target = directory_of(spec, data_dir)
    partial = target.with_name(f".{spec.id}.partial")
    with _in_words(spec, endpoint, partial), _alone(spec, partial):
        commit, names = _listing(spec, endpoint, partial)
        _begin(partial, spec.repo, commit)
        files = [_describe(spec, name, commit, endpoint) for name in names]
        _refuse_full_disk(files, partial)
        report = _Report(sum(file.size for file in files), progress)
        records = {file.name: _obtain(file, partial, report) for file in files}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        Receipt(repo=spec.repo, revision=commit, pulled=now, files=records).write(partial)
        _replace(partial, target)
        (target / _COMMIT_FILE).unlink()  # now: what is cut off before can go on
    return Local(spec, target)


class _Report:
    """Counts what is here, and tells."""

    def __init__(self, n_whole: int, progress: Progress | None) -> None:
        self.n_here, self.n_whole, self.progress = 0, n_whole, progress

    def add(self, n_bytes: int) -> None:
        self.n_here += n_bytes
        if self.progress is not None:
            self.progress(self.n_here, self.n_whole)


def _listing(spec: ModelSpec, endpoint: str, partial: Path) -> tuple[str, list[str]]:
    """The commit, and the files of it that a model is made of."""
    asked = spec.revision or _begun(partial) or "main"
    api = HfApi(endpoint=endpoint, library_name="fundament", library_version=__version__)
    try:
        info = api.model_info(spec.repo, revision=asked)
    except HfHubHTTPError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FundamentError(f"{endpoint} does not answer like a model hub; check HF_ENDPOINT.") from error
    commit = info.sha or ""
    if not re.fullmatch("[0-9a-f]{40}", commit) or (spec.revision and commit != spec.revision):
        raise FundamentError(
            f"{endpoint} gives no commit of {spec.repo} at '{asked}' but '{commit}'; nothing is pulled."
        )
    wanted = (*_WANTED, *WITHOUT_SAFETENSORS.get(spec.id, ()))
    names = sorted(
        name
        for name in (file.rfilename for file in info.siblings or [])
        if any(fnmatch(name, pattern) for pattern in wanted) and not any(fnmatch(name, other) for other in _EXPORTS)
    )
    weights = WITHOUT_SAFETENSORS.get(spec.id, ("*.safetensors",))
    if missing := [pattern for pattern in weights if not any(fnmatch(name, pattern) for name in names)]:
        raise FundamentError(f"{spec.repo} at {commit} has no {', '.join(missing)}; nothing is pulled.")
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or name in (RECEIPT, _COMMIT_FILE):
            raise FundamentError(f"{spec.repo} at {commit} names a file '{name}'; nothing is pulled.")
    return commit, names


def _begun(partial: Path) -> str | None:
    """The commit that an earlier pull began with; None where its note is not there, or not whole."""
    try:
        return str(orjson.loads((partial / _COMMIT_FILE).read_bytes())["revision"])
    except (FileNotFoundError, orjson.JSONDecodeError, LookupError, TypeError):
        return None


def _begin(partial: Path, repo: str, commit: str) -> None:
    """Note the commit; files that an earlier pull of another commit left go."""
    note = orjson.dumps({"repo": repo, "revision": commit})
    begun = partial / _COMMIT_FILE
    if not begun.exists() or begun.read_bytes() != note:
        for child in partial.iterdir():
            if child.is_dir():
                shutil.rmtree(child)
            else:
                child.unlink()
        begun.write_bytes(note)


def _describe(spec: ModelSpec, name: str, commit: str, endpoint: str) -> HubFile:
    url = hf_hub_url(spec.repo, name, revision=commit, endpoint=endpoint)
    said = get_hf_file_metadata(
        url, timeout=constants.HF_HUB_ETAG_TIMEOUT, library_name="fundament", library_version=__version__
    )
    if said.size is None or said.etag is None or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", said.etag):
        raise FundamentError(
            f"{endpoint} gives no size and digest for {name} of {spec.repo}, so it could not be checked. "
            "Use another hub (HF_ENDPOINT), or download it yourself and serve it with --model NAME=DIR"
        )
    return HubFile(name, said.size, said.etag, url)


def _refuse_full_disk(files: list[HubFile], partial: Path) -> None:
    missing = sum(file.size - _size(partial / file.name) for file in files)
    free = shutil.disk_usage(partial).free
    if missing > free:
        raise FundamentError(
            f"{missing / 1e9:.1f} GB are still to come and {partial.parent} has room for {free / 1e9:.1f} GB. "
            "Make room, or choose another place: --data-dir"
        )


def _obtain(file: HubFile, partial: Path, report: _Report) -> FileRecord:
    """Download what is missing of a file and check it.

    What an interrupted pull left may be wrong, so it gets a second chance from the start; a fresh download does not.
    """
    path = partial / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if _size(path) > file.size:
        path.unlink()
    kept = _size(path)
    report.add(kept)
    _download(file, path, report)
    if kept and not file.matches(path):
        path.unlink()
        report.add(-file.size)
        _download(file, path, report)
    if not file.matches(path):
        path.unlink()
        raise FundamentError(
            f"{file.name} is not what the hub announced: its digest is not {file.digest}. "
            "It was deleted; pull again, and if that does not help, use another hub (HF_ENDPOINT)."
        )
    return FileRecord(file.size, file.digest if len(file.digest) == 64 else sha256_of(path))


def _download(file: HubFile, path: Path, report: _Report) -> None:
    """Append to a file until it has its size; a connection that breaks is made anew."""
    failures = 0
    while not path.exists() or _size(path) < file.size:
        before = _size(path)
        try:
            _append(file, path, report)
        except httpx.TransportError:
            failures = 0 if _size(path) > before else failures + 1
            if failures == _ATTEMPTS:
                raise
            time.sleep(failures)  # in seconds: not at all after a connection that brought something
        else:
            if _size(path) < file.size:
                raise FundamentError(f"{file.name} ends after {_size(path)} of {file.size} bytes; pull again.")


def _append(file: HubFile, path: Path, report: _Report) -> None:
    here = _size(path)
    headers = build_hf_headers(library_name="fundament", library_version=__version__)
    headers["Accept-Encoding"] = "identity"  # a range of a compressed body would be of no use
    if here:
        headers["Range"] = f"bytes={here}-"
    with get_session().stream("GET", file.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
        hf_raise_for_status(answer)
        if here and answer.status_code != 206:
            report.add(-here)
            here = 0
        with path.open("ab" if here else "wb") as out:
            for chunk in answer.iter_bytes():  # as it comes: what has come is kept where the connection breaks
                out.write(chunk)
                report.add(len(chunk))
            out.flush()
            os.fsync(out.fileno())  # a crash of the machine after the rename must not leave a hole


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _replace(partial: Path, target: Path) -> None:
    """Make a whole directory the model. A server that has the old files open keeps reading those."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _alone(spec: ModelSpec, partial: Path) -> Iterator[None]:
    """One pull of a model at a time; the lock goes with the process that holds it."""
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FundamentError(f"'{spec.id}' is being pulled by another process; wait for it.") from error
        yield
    finally:
        os.close(handle)


@contextmanager
def _in_words(spec: ModelSpec, endpoint: str, partial: Path) -> Iterator[None]:
    """Say what the network, the hub or the disk said in one sentence with the way out."""
    page = f"{endpoint}/{spec.repo}"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise FundamentError("HF_HUB_OFFLINE is set, so nothing can be pulled; unset it.") from error
    except GatedRepoError as error:
        raise FundamentError(
            f"{spec.repo} asks for consent: accept its terms at {page}, then set HF_TOKEN to a token of that account."
        ) from error
    except RepositoryNotFoundError as error:
        raise FundamentError(
            f"{endpoint} has no {spec.repo}, or does not show it to you: where it is private, set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        what = f"commit {spec.revision}" if spec.revision else "the commit that this pull began with"
        raise FundamentError(
            f"{endpoint} no longer has {what} of {spec.repo}; delete {partial} and pull again."
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise FundamentError(
                f"{endpoint} does not let you read {spec.repo}: set HF_TOKEN to a token that may, or unset a wrong one."
            ) from error
        raise FundamentError(
            f"{endpoint} answered {error.response.status_code} for {spec.repo}; what arrived is kept, pull again later."
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise FundamentError(
            f"{endpoint} cannot be reached ({_reason(error)}); what arrived is kept, pull again to go on. "
            "A mirror is set with HF_ENDPOINT, a proxy with HTTPS_PROXY."
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise FundamentError(
                f"The disk of {partial.parent} is full; make room and pull again to go on, or choose --data-dir."
            ) from error
        raise FundamentError(
            f"{error.filename or partial}: {_reason(error)}; choose another place: --data-dir"
        ) from error


def _reason(error: Any) -> str:
    """What went wrong, on one line: an error without words is named by its type."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
