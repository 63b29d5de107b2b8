"""The guarded client against addresses, redirects and bodies that mean harm."""

import asyncio
import gzip
import socket
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from fundament.errors import FetchError
from fundament.fetching import Fetcher, check_form, is_allowed, read_networks
from tests.served import PATIENCE_SECONDS
from tests.website import Website, website

HERE = read_networks(["127.0.0.1"])  # the test's own website; every other address of this machine stays refused
UNREACHABLE = FetchError.unreachable("").detail


@pytest.fixture(scope="module")
def site() -> Iterator[Website]:
    with website() as site:
        yield site


class Listening:
    """A port on every address of this machine, which counts who connects."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
        self.socket.setblocking(False)
        self.port: int = self.socket.getsockname()[1]

    def n_connections(self) -> int:
        count = 0
        while True:
            try:
                self.socket.accept()[0].close()
            except BlockingIOError:
                return count
            count += 1


@pytest.fixture
def listening() -> Iterator[Listening]:
    listening = Listening()
    try:
        yield listening
    finally:
        listening.socket.close()


def fetch(runner: asyncio.Runner, url: str, allowed: Any = (), max_bytes: int = 1_000_000, **how: Any) -> bytes:
    async def work() -> bytes:
        fetcher = Fetcher(allowed, resolver=how.pop("resolver", None))
        try:
            return await fetcher.fetch(url, max_bytes=max_bytes, **how)
        finally:
            await fetcher.close()

    return runner.run(work())


def refusal(runner: asyncio.Runner, url: str, allowed: Any = (), **how: Any) -> FetchError:
    with pytest.raises(FetchError) as caught:
        fetch(runner, url, allowed, **how)
    assert caught.value.status == 422
    return caught.value


async def pieces(url: str, read: list[bytes], *, max_bytes: int) -> None:
    """Read a body piece by piece, into a list."""
    fetcher = Fetcher(HERE)
    try:
        async for piece in fetcher.read(url, max_bytes=max_bytes):
            read.append(piece)
    finally:
        await fetcher.close()


HOSTS = [
    "127.0.0.1",
    "127.255.255.254",
    "localhost",
    "0.0.0.0",
    "0x7f000001",  # hexadecimal
    "0x7f.0.0.1",
    "①②⑦.⓪.⓪.①",  # digits of another alphabet
    "10.0.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "100.64.0.1",  # carrier-grade NAT
    "100.100.100.200",  # metadata of a cloud
    "169.254.169.254",
    "168.63.129.16",
    "192.0.0.192",
    "198.18.0.1",  # benchmarks
    "224.0.0.1",  # multicast
    "255.255.255.255",
    "[::]",
    "[::1]",
    "[::127.0.0.1]",  # IPv4-compatible
    "[::ffff:127.0.0.1]",  # mapped
    "[::ffff:7f00:1]",
    "[::ffff:10.0.0.1]",
    "[::ffff:0:127.0.0.1]",  # translated
    "192.88.99.1",  # a relay of 6to4
    "[64:ff9b::7f00:1]",  # NAT64
    "[64:ff9b:1::1]",
    "[2002:7f00:1::]",  # 6to4
    "[2002:a00:1::1]",
    "[2001:0:7f00:1::]",  # Teredo, its server
    "[2001:0:808:808::80ff:fffe]",  # Teredo, its client 127.0.0.1
    "[fc00::1]",
    "[fd00:ec2::254]",
    "[fe80::1]",
    "[fec0::1]",
    "[ff02::1]",
]


@pytest.mark.parametrize("host", HOSTS)
def test_an_address_that_is_not_public_is_refused_before_it_is_dialled(
    host: str, runner: asyncio.Runner, listening: Listening
) -> None:
    error = refusal(runner, f"http://{host}:{listening.port}/latest/meta-data")
    assert error.reason == "address"
    assert error.detail == UNREACHABLE
    assert listening.n_connections() == 0


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.1:{port}/", "form"),
        ("http://0:{port}/", "form"),
        ("http://2130706433:{port}/", "form"),  # 127.0.0.1 in decimal
        ("http://017700000001:{port}/", "form"),  # in octal
        ("http://0177.0.0.1:{port}/", "form"),
        ("http://public.example@127.0.0.1:{port}/", "form"),
        ("http://127.0.0.1:{port}#@public.example/", "address"),
        ("http://public.example\\@127.0.0.1:{port}/", "form"),
        ("http://[::1", "form"),
        ("http://", "form"),
        ("http:///etc/passwd", "form"),
        ("http://host:99999/", "form"),
        ("//127.0.0.1/", "form"),
        ("127.0.0.1", "form"),
        ("", "form"),
        ("file:///etc/passwd", "scheme"),
        ("ftp://127.0.0.1/", "scheme"),
        ("gopher://127.0.0.1:{port}/_GET", "scheme"),
        ("data:text/plain,x", "scheme"),
        ("unix:///var/run/docker.sock", "scheme"),
        ("ws://127.0.0.1:{port}/", "scheme"),
        ("http://nothing.invalid/", "unreachable"),
    ],
)
def test_every_other_address_is_refused_with_its_reason(
    url: str, reason: str, runner: asyncio.Runner, listening: Listening
) -> None:
    assert refusal(runner, url.format(port=listening.port)).reason == reason
    assert listening.n_connections() == 0


@pytest.mark.parametrize(
    "url",
    ["http://" + "\u5b57" * 254 + "/", "http://example.org/" + "../" * 3_000, "http://" + "a." * 127 + "example/"],
    ids=["a name", "a path", "a name of many parts"],
)
def test_a_url_that_takes_long_to_read_is_refused_before_it_is(url: str) -> None:
    with pytest.raises(FetchError) as error:
        check_form(url)
    assert error.value.reason == "form"


def test_nobody_can_tell_a_refused_address_from_one_where_nothing_answers(
    runner: asyncio.Runner, listening: Listening
) -> None:
    closed = socket.create_server(("127.0.0.1", 0))
    port = closed.getsockname()[1]
    closed.close()
    said = {
        refusal(runner, f"http://127.0.0.1:{listening.port}").detail,
        refusal(runner, f"http://127.0.0.1:{port}").detail,
        refusal(runner, f"http://127.0.0.1:{port}", HERE).detail,
        refusal(runner, "http://nothing.invalid/").detail,
    }
    assert said == {UNREACHABLE}


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_may_be_dialled(address: str) -> None:
    assert is_allowed(ip_address(address))


def test_networks_that_the_operator_allows_may_be_dialled_in_every_spelling() -> None:
    allowed = read_networks(["10.1.0.0/16", "fd12::/16"])
    assert is_allowed(ip_address("10.1.2.3"), allowed)
    assert is_allowed(ip_address("::ffff:10.1.2.3"), allowed)
    assert is_allowed(ip_address("fd12::1"), allowed)
    assert not is_allowed(ip_address("10.2.0.1"), allowed)
    with pytest.raises(ValueError, match="garden"):
        read_networks(["garden"])


def test_a_body_arrives_whatever_its_type(runner: asyncio.Runner, site: Website) -> None:
    url = site.say("/text", b"words", Content_Type="text/plain; charset=utf-8")
    assert fetch(runner, url, HERE) == b"words"
    bare = site.say("/bare", b"words")
    assert fetch(runner, bare, HERE) == b"words"


class Changing(AbstractResolver):
    """A name whose answer changes with every question."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        address = self.addresses.pop(0)
        return [ResolveResult(hostname=host, host=address, port=port, family=socket.AF_INET, proto=0, flags=0)]

    async def close(self) -> None:
        pass


def test_a_name_that_changes_its_answer_is_refused_where_it_leads_inside(
    runner: asyncio.Runner, site: Website, listening: Listening
) -> None:
    port = site.url.rpartition(":")[2]
    site.redirect("/again", f"http://changing.example:{listening.port}/")
    error = refusal(runner, f"http://changing.example:{port}/again", HERE, resolver=Changing("127.0.0.1", "127.0.0.2"))
    assert error.reason == "address"
    assert listening.n_connections() == 0


def test_an_address_that_is_checked_is_the_one_that_is_dialled(runner: asyncio.Runner, site: Website) -> None:
    port = site.url.rpartition(":")[2]
    site.say("/text", b"words")
    resolver = Changing("127.0.0.1")  # a second question would have no answer
    assert fetch(runner, f"http://changing.example:{port}/text", HERE, resolver=resolver) == b"words"


@pytest.mark.parametrize(
    ("to", "reason"),
    [
        ("http://127.0.0.2:{port}/", "address"),
        ("http://[::ffff:127.0.0.2]:{port}/", "address"),
        ("//127.0.0.2:{port}/", "address"),
        ("file:///etc/passwd", "scheme"),
        ("ftp://127.0.0.2:{port}/", "scheme"),
        ("http://", "form"),
    ],
)
def test_every_redirect_is_checked_again(
    to: str, reason: str, runner: asyncio.Runner, site: Website, listening: Listening
) -> None:
    url = site.redirect("/away", to.format(port=listening.port))
    assert refusal(runner, url, HERE).reason == reason
    assert listening.n_connections() == 0


def test_three_redirects_are_followed_and_no_more(runner: asyncio.Runner, site: Website) -> None:
    site.say("/0", b"there")
    for hop in range(1, 5):
        site.redirect(f"/{hop}", f"/{hop - 1}")
    assert fetch(runner, f"{site.url}/3", HERE) == b"there"
    assert refusal(runner, f"{site.url}/4", HERE).reason == "redirects"
    assert refusal(runner, site.redirect("/loop", "/loop"), HERE).reason == "redirects"


def test_cookies_credentials_and_proxies_of_this_machine_stay_here(
    runner: asyncio.Runner, site: Website, listening: Listening, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{listening.port}")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    site.say("/end", b"")
    url = site.say("/cookie", status=302, Location="/end", Set_Cookie="crumb=1")
    fetch(runner, url, HERE)
    asked = site.asked[-1]
    assert asked.path == "/end"
    assert not {name.lower() for name in asked.headers} & {"cookie", "authorization", "proxy-authorization"}
    assert listening.n_connections() == 0


def _endless(site: Website) -> str:
    def page(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        while not site.ended.is_set():
            handler.wfile.write(bytes(65536))

    return site.serve("/endless", page)


def test_a_body_without_end_is_cut(runner: asyncio.Runner, site: Website) -> None:
    url = _endless(site)
    assert refusal(runner, url, HERE).reason == "size"
    read: list[bytes] = []
    with pytest.raises(FetchError, match=r"larger than 0\.3 MB"):
        runner.run(pieces(url, read, max_bytes=300_000))
    assert 0 < sum(map(len, read)) <= 300_000


def test_a_length_that_is_too_large_is_refused_unread(runner: asyncio.Runner, site: Website) -> None:
    url = site.say("/long", b"x", Content_Length="2000000")
    assert refusal(runner, url, HERE).reason == "size"


@pytest.mark.parametrize("where", ["before the head", "in the head", "in the body"])
def test_what_does_not_come_in_time_is_given_up(where: str, runner: asyncio.Runner, site: Website) -> None:
    def page(handler: BaseHTTPRequestHandler) -> None:
        sent = {
            "before the head": b"",
            "in the head": b"HTTP/1.1 200 OK\r\n",
            "in the body": b"HTTP/1.1 200 OK\r\n\r\n",
        }
        handler.wfile.write(sent[where])
        while where == "in the body" and not site.ended.wait(0.02):
            handler.wfile.write(b"x")  # always a little, so that no silence is long
        site.ended.wait()

    assert refusal(runner, site.serve("/slow", page), HERE, seconds=0.3).reason == "time"


def test_urls_that_are_slow_hold_up_no_other_of_their_host(runner: asyncio.Runner, site: Website) -> None:
    slow = site.serve("/slow", lambda handler: void(handler, site))
    quick = site.say("/quick", b"words")

    async def work() -> bytes:
        fetcher = Fetcher(HERE)
        waiting = [asyncio.ensure_future(fetcher.fetch(slow, max_bytes=10)) for _ in range(40)]
        try:
            while len(site.asked) < len(waiting):
                await asyncio.sleep(0.01)
            return await fetcher.fetch(quick, max_bytes=10)
        finally:
            for each in waiting:
                each.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await fetcher.close()

    assert runner.run(asyncio.wait_for(work(), PATIENCE_SECONDS)) == b"words"


def void(handler: BaseHTTPRequestHandler, site: Website) -> None:
    """An answer that begins and does not go on."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    site.ended.wait()


def test_a_bomb_is_cut_before_it_takes_memory(runner: asyncio.Runner, site: Website) -> None:
    bomb = gzip.compress(bytes(100_000_000))
    url = site.say("/bomb", bomb, Content_Encoding="gzip")
    tracemalloc.start()
    try:
        assert refusal(runner, url, HERE).reason == "size"
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000


def test_decoded_bytes_are_counted(runner: asyncio.Runner, site: Website) -> None:
    url = site.say("/packed", gzip.compress(bytes(5000)), Content_Encoding="gzip")
    assert len(fetch(runner, url, HERE, max_bytes=5000)) == 5000
    assert refusal(runner, url, HERE, max_bytes=4999).reason == "size"


@pytest.mark.parametrize("status", [204, 404, 500])
def test_another_status_is_no_body(status: int, runner: asyncio.Runner, site: Website) -> None:
    error = refusal(runner, site.say("/status", status=status), HERE)
    assert (error.reason, error.detail) == ("status", f"The URL answered {status}.")


def test_an_answer_that_breaks_off_or_is_no_http(runner: asyncio.Runner, site: Website) -> None:
    def short(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
        handler.close_connection = True

    def noise(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n")
        handler.close_connection = True

    assert refusal(runner, site.serve("/short", short), HERE).reason == "broken"
    assert refusal(runner, site.serve("/noise", noise), HERE).reason == "broken"
    torn = site.say("/torn", b"not gzip at all", Content_Encoding="gzip")
    assert refusal(runner, torn, HERE).reason == "broken"


def test_a_body_is_read_piece_by_piece(runner: asyncio.Runner, site: Website) -> None:
    body = bytes(range(256)) * 1000
    read: list[bytes] = []
    runner.run(pieces(site.say("/file", body), read, max_bytes=len(body)))
    assert b"".join(read) == body
    assert len(read) > 1


def test_a_post_is_not_led_elsewhere(runner: asyncio.Runner, site: Website) -> None:
    url = site.redirect("/hook", "/elsewhere", status=307)

    async def post(to: str) -> int:
        fetcher = Fetcher(HERE)
        try:
            return await fetcher.post(to, b"{}", {"Content-Type": "application/json", "X-Mark": "1"})
        finally:
            await fetcher.close()

    assert runner.run(post(url)) == 307
    assert (site.asked[-1].method, site.asked[-1].path, site.asked[-1].body) == ("POST", "/hook", b"{}")
    with pytest.raises(FetchError) as caught:
        runner.run(post("http://127.0.0.2:9/"))
    assert caught.value.reason == "address"
