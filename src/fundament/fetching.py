"""The one client for every URL that a caller gives: it reads what is public, within bounds, and dials nothing else.

The check is made where the socket is made, on the very address that is dialled: for names, literals in any spelling,
every redirect and every attempt alike. What a name answered a moment earlier is therefore of no use to anybody.
"""

import errno
import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver

from fundament.errors import FetchError, UnavailableError
from fundament.telemetry import say

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_MOST_URL, _MOST_HOST = 8_192, 253  # characters; what reads a name takes time that grows faster than its square
_MOST_REDIRECTS = 3
_CONNECT_SECONDS = 10.0
_SILENCE_SECONDS = 15.0  # between two pieces of a body
_PIECE_BYTES = 64 * 1024
_MOST_CONNECTIONS = 256  # of all callers, each of whom has a share; to however many hosts

_NAT64, _TRANSLATED = IPv6Network("64:ff9b::/96"), IPv6Network("::ffff:0:0:0/96")
# Not private by the registries, but a machine's own all the same.
_RESERVED: Sequence[Network] = (
    ip_network("168.63.129.16/32"),  # Azure's machine agent
    ip_network("192.88.99.0/24"),  # relays of 6to4, deprecated
    ip_network("192.0.0.0/24"),  # protocol assignments; Oracle's metadata
    ip_network("64:ff9b:1::/48"),  # NAT64 for local use
    ip_network("::/96"),  # IPv4-compatible, deprecated
)


def read_networks(texts: Iterable[str]) -> list[Network]:
    """Networks as an operator writes them: `10.0.0.0/8`, `fd00::/8`, `192.168.1.7`.

    Raises:
        ValueError: what is not a network; the message names it.
    """
    return [ip_network(text.strip(), strict=False) for text in texts]


def is_allowed(address: Address, allowed: Sequence[Network] = ()) -> bool:
    """Whether an address may be dialled: a public one, or one in a network that the operator allows.

    An IPv6 address that carries an IPv4 address is what it carries: mapped (RFC 4291), translated (RFC 2765), NAT64
    (RFC 6052), 6to4 (RFC 3056) and Teredo (RFC 4380).
    """
    return all(
        any(each in network for network in allowed) or _is_public(each) for each in _carried(address) or (address,)
    )


def _carried(address: Address) -> Sequence[Address]:
    if isinstance(address, IPv4Address):
        return ()
    if address.ipv4_mapped:
        return (address.ipv4_mapped,)
    if address in _NAT64 or address in _TRANSLATED:
        return (IPv4Address(int(address) & 0xFFFF_FFFF),)
    if address.sixtofour:
        return (address.sixtofour,)
    return address.teredo or ()


def _is_public(address: Address) -> bool:
    return (
        address.is_global
        and not address.is_multicast
        and not (isinstance(address, IPv6Address) and address.is_site_local)
        and not any(address in network for network in _RESERVED)
    )


class _NotAllowedError(OSError):
    def __init__(self) -> None:
        super().__init__(errno.EACCES, "not an allowed address")


class Fetcher:
    """Connections to where callers point. No proxy, no cookie, no credentials of this machine.

    Args:
        allowed: networks that may be dialled although they are not public.
        resolver: looks names up; None means the system's.
    """

    def __init__(self, allowed: Sequence[Network] = (), *, resolver: AbstractResolver | None = None) -> None:
        self._allowed, self._resolver = allowed, resolver
        self._session: aiohttp.ClientSession | None = None

    async def fetch(self, url: str, *, max_bytes: int, seconds: float = 30) -> bytes:
        """A body, decoded, in memory.

        Args:
            url: http or https.
            max_bytes: most bytes of the body, decoded.
            seconds: most time for everything together, redirects and the body included.

        Raises:
            FetchError: with its reason.
        """
        async with self._get(url, seconds) as response:
            return b"".join([piece async for piece in _pieces(response, max_bytes)])

    async def read(self, url: str, *, max_bytes: int, seconds: float = 600) -> AsyncGenerator[bytes, None]:
        """A body, piece by piece.

        Args:
            url: http or https.
            max_bytes: most bytes of the body, decoded.
            seconds: most time for everything together, what is done between the pieces included.

        Raises:
            FetchError: with its reason.
        """
        async with self._get(url, seconds) as response:
            async for piece in _pieces(response, max_bytes):
                yield piece

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], *, seconds: float = 15) -> int:
        """Send a body; redirects are not followed and the answer's body is not read.

        Returns:
            The status of the answer.

        Raises:
            FetchError: nothing answered, or it may not be asked.
        """
        async with self._ask("POST", url, seconds, data=body, headers=headers, allow_redirects=False) as response:
            status = response.status
            response.close()
            return status

    async def close(self) -> None:
        """Close what is open."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    @asynccontextmanager
    async def _get(self, url: str, seconds: float) -> AsyncIterator[aiohttp.ClientResponse]:
        # One more than are followed: aiohttp counts the answer that would be one too many.
        async with self._ask("GET", url, seconds, max_redirects=_MOST_REDIRECTS + 1) as response:
            if response.status != HTTPStatus.OK:
                raise FetchError("status", f"The URL answered {response.status}.")
            yield response

    @asynccontextmanager
    async def _ask(self, method: str, url: str, seconds: float, **how: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        check_form(url)
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
        try:
            async with self._open().request(method, url, timeout=timeout, **how) as response:
                yield response
        except aiohttp.TooManyRedirects as error:
            raise FetchError("redirects", f"The URL redirects more than {_MOST_REDIRECTS} times.") from error
        except aiohttp.NonHttpUrlClientError as error:
            raise FetchError("scheme", "The URL leads to something other than http or https.") from error
        except aiohttp.ClientConnectorError as error:
            cause = getattr(error, "os_error", None)
            refused = isinstance(cause, _NotAllowedError)
            if getattr(cause, "errno", None) in (errno.EMFILE, errno.ENFILE):
                raise UnavailableError("The server has no connections left. Try again shortly.") from error
            if refused:
                say("address refused", level=logging.WARNING, host=urlsplit(url).hostname)
            raise FetchError.unreachable("address" if refused else "unreachable") from error
        except (aiohttp.InvalidURL, UnicodeError) as error:
            raise FetchError("form", "The URL, or one that it redirects to, is malformed.") from error
        except (aiohttp.ConnectionTimeoutError, aiohttp.ServerConnectionError) as error:
            if isinstance(error, aiohttp.SocketTimeoutError):
                raise _too_slow() from error
            raise FetchError.unreachable("unreachable") from error
        except TimeoutError as error:
            raise _too_slow() from error
        except aiohttp.ClientError as error:
            raise FetchError("broken", "What the URL answered cannot be read.") from error

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                socket_factory=self._socket,
                resolver=self._resolver,
                use_dns_cache=False,
                limit=_MOST_CONNECTIONS,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": "fundament"},
                trust_env=False,
            )
        return self._session

    def _socket(self, info: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, address = info
        if not is_allowed(ip_address(str(address[0]).partition("%")[0]), self._allowed):
            raise _NotAllowedError
        return socket.socket(family=family, type=kind, proto=protocol)


async def _pieces(response: aiohttp.ClientResponse, max_bytes: int) -> AsyncIterator[bytes]:
    """The decoded body, refused as soon as it is longer than allowed."""
    too_large = FetchError("size", f"The URL's body is larger than {max_bytes / 1e6:g} MB.")
    if (response.content_length or 0) > max_bytes:
        raise too_large
    n_bytes = 0
    async for piece in response.content.iter_chunked(_PIECE_BYTES):
        n_bytes += len(piece)
        if n_bytes > max_bytes:
            raise too_large
        yield piece


def check_form(url: str) -> None:
    """Refuse what is no http or https URL; whether it may be dialled is seen when it is.

    Raises:
        FetchError: with its reason.
    """
    if len(url) > _MOST_URL:
        raise FetchError("form", f"The URL has more than {_MOST_URL:,} characters.")
    try:
        parts = urlsplit(url)
        scheme, host, user = parts.scheme, parts.hostname, parts.username
    except ValueError:
        scheme, host, user = "", None, None
    if scheme and scheme not in ("http", "https"):
        raise FetchError("scheme", f"The URL's scheme is '{scheme[:20]}'; use http or https.")
    if not scheme or not host or len(host) > _MOST_HOST:
        raise FetchError("form", "The URL is malformed; write http://… or https://….")
    if user is not None:
        raise FetchError("form", "The URL carries a user name; use a URL that is signed instead.")


def _too_slow() -> FetchError:
    return FetchError("time", "The URL took too long to answer.")
