"""A model hub on this machine: the part of its HTTP interface that a pull uses, and ways to make it misbehave."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WIDTH = 312


def make_bert(directory: Path, *, seed: int = 0) -> Path:
    """A random BERT in the public layout: a few megabytes, so that a download can be interrupted in the middle."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=3_000,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=12,
        intermediate_size=64,
        max_position_embeddings=512,
    )
    BertModel(config).eval().save_pretrained(directory)
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "small", "cat"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    pooling = directory / "1_Pooling"
    pooling.mkdir()
    (pooling / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return directory


@dataclass
class Hub:
    """What the hub has and how it behaves. Every attribute may be changed while it runs.

    Attributes:
        files: contents by path, of the one commit.
        commit: what `main` is.
        stalls: paths of which only so many bytes are sent before the hub waits for `resume`.
        cuts: paths of which only so many bytes are sent, once, before the connection breaks.
        lies: paths whose digest the hub gives wrong.
        listing_status: status and headers of the answer instead of the listing; likewise of a file's description
            and of its content.
        seen: method, path and headers of every request.
        fetched: every download: path of the file, and the range that was asked for.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    commit: str = COMMIT
    ranges: bool = True
    stalls: dict[str, int] = field(default_factory=dict)
    cuts: dict[str, int] = field(default_factory=dict)
    lies: set[str] = field(default_factory=set)
    listing_status: tuple[int, dict[str, str]] | None = None
    file_status: tuple[int, dict[str, str]] | None = None
    content_status: tuple[int, dict[str, str]] | None = None
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    fetched: list[tuple[str, str | None]] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)
    resume: threading.Event = field(default_factory=threading.Event)


@contextmanager
def hub_of(directory: Path) -> Iterator[Hub]:
    """A started hub whose only repository, under any name, holds the files of a directory."""
    hub = Hub(files={str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*.*")})

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.resume.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the base class's
        del format, args

    def do_HEAD(self) -> None:
        self._note()
        if self.state.file_status:
            self._answer(*self.state.file_status)
            return
        name = self._file_name()
        content = self.state.files[name]
        digest = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        headers = {"X-Repo-Commit": self.state.commit, "Accept-Ranges": "bytes"}
        if name.endswith(".safetensors"):
            digest = hashlib.sha256(content).hexdigest()
        if name in self.state.lies:
            digest = digest[::-1]
        if name.endswith(".safetensors"):
            # Large files lie on another host, which a redirect names.
            self._answer(302, {**headers, **self._elsewhere(name), "X-Linked-Etag": f'"{digest}"'})
        else:
            self._answer(200, {**headers, "ETag": f'W/"{digest}"', "Content-Length": str(len(content))})

    def do_GET(self) -> None:
        self._note()
        if self.path.startswith("/api/models/"):
            self._listing()
        elif self.path.startswith("/cdn/"):
            self._send(unquote(self.path.removeprefix("/cdn/")))
        elif (name := self._file_name()).endswith(".safetensors"):
            self._answer(302, self._elsewhere(name))
        else:
            self._send(name)

    def _note(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.state.seen.append((self.command, self.path, headers))

    def _file_name(self) -> str:
        return unquote(self.path.partition(f"/resolve/{self.state.commit}/")[2])

    def _elsewhere(self, name: str) -> dict[str, str]:
        return {
            "Location": f"http://localhost:{self.server.server_address[1]}/cdn/{name}",
            "X-Linked-Size": str(len(self.state.files[name])),
        }

    def _listing(self) -> None:
        if self.state.listing_status:
            self._answer(*self.state.listing_status)
            return
        repo, _, revision = self.path.removeprefix("/api/models/").partition("/revision/")
        if revision not in ("main", self.state.commit):
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": name} for name in self.state.files]
        body = json.dumps({"id": unquote(repo), "sha": self.state.commit, "siblings": siblings}).encode()
        self._answer(200, {"Content-Type": "application/json", "Content-Length": str(len(body))}, body)

    def _send(self, name: str) -> None:
        content = self.state.files[name]
        asked = self.headers.get("Range")
        self.state.fetched.append((name, asked))
        if self.state.content_status:
            self._answer(*self.state.content_status)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.state.ranges else 0
        body = content[start:]
        headers = {"Content-Length": str(len(body))}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if (sent := self.state.cuts.pop(name, None)) is not None:
            self._answer(206 if start else 200, headers, body[:sent])
            self.wfile.flush()
            self.close_connection = True
        elif (sent := self.state.stalls.get(name)) is not None:
            self._answer(206 if start else 200, headers, body[:sent])
            self.wfile.flush()
            self.state.stalled.set()
            self.state.resume.wait()
            self.close_connection = True
        else:
            self._answer(206 if start else 200, headers, body)

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
