"""Connections of clients: HTTP/1.1, within bounds of size and of time."""

import asyncio
import re

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_UPGRADE, _HEAD_END = re.compile(rb"^upgrade:", re.IGNORECASE | re.MULTILINE), re.compile(rb"\n\r?\n")
_MOST_HEAD_BYTES = 65_536
_HEAD_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"content-length: 41\r\nconnection: close\r\n\r\nThe request's head is larger than 64 KiB."
)
_SILENT_SECONDS = 60.0
_LEAST_BYTES_PER_SECOND = 1000
_UNREAD_SECONDS = 300.0


class _Impatient(asyncio.Protocol):
    """Closes a connection whose client sends nothing that is waited for, or takes nothing of its answer.

    It is a file of the process, and what has come of a body is its memory. So a request's head comes within a minute,
    and a body is never a minute behind the least rate. What waits to be sent is memory too, and a conversation that is
    sent as it is written keeps its model: something of it is taken every five minutes.
    """

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _heard: float  # the client is as far as one that sent at the least rate, and stopped then
    _silence: asyncio.TimerHandle
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Greet nobody, and wait."""
        super().connection_made(transport)
        self._heard = self.loop.time()
        self._silence = self.loop.call_later(_SILENT_SECONDS, self._close_silent)

    def on_response_complete(self) -> None:
        """The client may begin its next request."""
        self._heard = self.loop.time()
        super().on_response_complete()  # type: ignore[misc]

    def _awaits(self) -> bool:
        """Whether it is the client's turn to send."""
        raise NotImplementedError

    def _hear(self, n_bytes: int) -> None:
        self._heard = min(self.loop.time(), self._heard + n_bytes / _LEAST_BYTES_PER_SECOND)

    def _close_silent(self) -> None:
        left = self._heard + _SILENT_SECONDS - self.loop.time() if self._awaits() else _SILENT_SECONDS
        if left <= 0:
            self.transport.close()
        else:
            self._silence = self.loop.call_later(left, self._close_silent)

    def pause_writing(self) -> None:
        """More waits to be sent than is taken."""
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Most of it is taken."""
        self._unwatch()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is sent any more."""
        self._silence.cancel()
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self, n_bytes: int) -> None:
        self._unread = self.loop.call_later(_UNREAD_SECONDS, self._cut_unread, n_bytes)

    def _cut_unread(self, n_before: int) -> None:
        if (n_bytes := self.transport.get_write_buffer_size()) < n_before:
            self._watch(n_bytes)
        else:
            self.transport.abort()

    def _unwatch(self) -> None:
        if self._unread is not None:
            self._unread.cancel()


class Connection(_Impatient, HttpToolsProtocol):
    """HTTP/1.1, with heads of 64 KiB at most.

    A client that offers another protocol, as Java's does, goes on in h11. httptools reads no body after such a head;
    h11, which is slower, ignores the offer, as the standard asks (RFC 9110, section 7.8).
    """

    _head, _inside = b"", False
    _n_framing = 0  # bytes since the last of a body, or since the last head ended

    def on_message_begin(self) -> None:
        """A request begins."""
        self._inside, self._heard = True, self.loop.time()
        self._unset_keepalive_if_required()  # it may have come in one piece with the end of one that was answered
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its head has come whole."""
        self._n_framing = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """More of its body has come."""
        self._n_framing = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """It has come whole. Where it was answered before that, the connection is kept from now on."""
        self._inside, self._n_framing = False, 0
        super().on_message_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            kept = self.timeout_keep_alive
            self.timeout_keep_alive_task = self.loop.call_later(kept, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        """Read what has come; of a head all at once."""
        if self._inside:
            self._hear(len(data))
        else:
            self._head = (self._head + data).lstrip(b"\r\n")
            end = _HEAD_END.search(self._head)
            if (len(self._head) if end is None else end.end()) > _MOST_HEAD_BYTES:
                self._refuse_head()
                return
            if end is None and (not self._head or self._head[:1].isalpha()):
                return
            data, self._head = self._head, b""
            answered = self.cycle is None or self.cycle.response_complete  # two protocols never write at once
            if answered and _UPGRADE.search(data, 0, end.start() if end else len(data)):
                self._hand_over(data)
                return
        self._n_framing += len(data)
        super().data_received(data)
        if self._n_framing > _MOST_HEAD_BYTES:  # of a head behind a body, of trailers, of a chunk's extensions
            self._refuse_head()

    def _refuse_head(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(_HEAD_TOO_LARGE)
        self.transport.close()

    def _hand_over(self, data: bytes) -> None:
        self._silence.cancel()  # the other has its own
        self._unset_keepalive_if_required()
        self.connections.discard(self)
        other = _PlainH11(self.config, self.server_state, self.app_state, self.loop)
        other.connection_made(self.transport)
        self.transport.set_protocol(other)
        other.data_received(data)

    def _awaits(self) -> bool:
        return (self.cycle is None or self._inside) and not self.flow.read_paused


class _PlainH11(_Impatient, H11Protocol):
    def data_received(self, data: bytes) -> None:
        """Read what has come."""
        self._hear(len(data))
        super().data_received(data)

    def _awaits(self) -> bool:
        asked = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None  # else that ends it sooner
        return (asked or self.conn.their_state is h11.SEND_BODY) and not self.flow.read_paused

    def _get_upgrade(self) -> None:
        """Nothing that is offered is taken, and nobody need be told."""
