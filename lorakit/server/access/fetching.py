"""An adapter from an address that somebody gave over HTTP: from allowed hosts alone, over https, and never from inside
of the network that this server stands in.

A name is looked up once, and what it meant then is connected to; the certificate has to be the name's all the same.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Collection
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address
from pathlib import Path

import httpx

from lorakit.checkpoints.finished import CHECKPOINT
from lorakit.checkpoints.moving.addresses import Address, parse_address
from lorakit.checkpoints.moving.download import Patience
from lorakit.checkpoints.moving.fetching import fetch
from lorakit.errors import LorakitError, NotFound, OutOfSpace, Refused, UsageError
from lorakit.files.addresses import without_secrets
from lorakit.files.archives import Limits
from lorakit.files.folders import temporary_folder
from lorakit.server.settings import Settings

AT_ONCE = 2  # fetches of one server
HTTPS = 443
PATIENCE = Patience(tries=3, timeout=20.0)

_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: IPv4 as networks of IPv6 alone see it
# Of protocols, where Oracle's cloud tells of itself; and a public address, where Azure's does.
_INSIDE_ALL_THE_SAME = (IPv4Network("192.0.0.0/24"), IPv4Network("168.63.129.16/32"))


class NotFetched(LorakitError):
    """What is at an address did not come, or not whole: its server's fault, or the way's."""


@dataclass(frozen=True, slots=True)
class Host:
    """A name, or an address, and a port of https there."""

    name: str
    port: int = HTTPS


def parse_host(text: str) -> Host:
    """`files.example.com`, `files.example.com:8443`.

    Raises:
        UsageError: it is neither.
    """
    try:
        url = httpx.URL(f"https://{text}")
        found = Host(url.raw_host.decode("ascii"), url.port or HTTPS)
    except (httpx.InvalidURL, ValueError):
        found = Host("")
    if not found.name or "%" in found.name or url.path not in ("", "/") or url.query or url.userinfo or url.fragment:
        raise UsageError(f"--allow-host '{without_secrets(text)}': write HOST or HOST:PORT, as in files.example.com")
    return found


def is_address(source: str) -> bool:
    """Whether it is one of the web, rather than a folder here."""
    return source.lstrip().lower().startswith(("https:", "http:"))


class Places:
    """Folders for what is fetched, few at once, each gone at the end of its block."""

    def __init__(self, settings: Settings) -> None:
        self._folder = settings.store_home / "tmp"
        self._turns = asyncio.Semaphore(AT_ONCE)

    @asynccontextmanager
    async def new(self) -> AsyncIterator[Path]:
        async with self._turns:
            with ExitStack() as leaving:
                place = await asyncio.to_thread(leaving.enter_context, temporary_folder(self._folder, "source-"))
                try:
                    yield place
                finally:
                    await asyncio.to_thread(leaving.close)  # gigabytes take a while to go


class Fetching:
    """Fetches for those who ask a server, few at once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._places = Places(settings)

    @asynccontextmanager
    async def fetched(self, source: str) -> AsyncIterator[Path]:
        """The folder of what is at an address, for as long as the block lasts.

        Raises:
            Refused: it is not of an allowed host, leads elsewhere, is larger or takes longer than it may, or is none.
            NotFound: there is nothing there.
            NotFetched: it did not come.
        """
        host, address = allowed(source, self._settings.allow_hosts)
        async with self._places.new() as place:
            yield await asyncio.to_thread(_fetch, self._settings, host, address, place)


def allowed(source: str, hosts: Collection[str]) -> tuple[Host, Address]:
    """Raises Refused for what is no https address of one of these hosts."""
    shown = without_secrets(source)
    try:
        url, address = httpx.URL(source), parse_address(source)
        host = Host(url.raw_host.decode("ascii"), url.port or HTTPS)
    except (httpx.InvalidURL, ValueError, UsageError):
        raise Refused(f"'{shown}' is no address that can be fetched from") from None
    if url.scheme != "https" or address.way != "url":
        raise Refused(
            f"'{shown}' is no https address, and nothing else is fetched for others: fetch it (lorakit fetch)"
        )
    if host not in [parse_host(text) for text in hosts]:
        raise Refused(
            f"'{shown}': this server fetches nothing from '{host.name}' when it is asked for it: start it with "
            f"--allow-host {host.name}, or fetch it there (lorakit fetch), and load the folder"
        )
    return host, address


def _fetch(settings: Settings, host: Host, address: Address, place: Path) -> Path:
    """A folder in another, under the name that it has there, where that says its step."""
    named = address.name.partition(".")[0]
    folder = place / (named if CHECKPOINT.fullmatch(named) else "source")
    ends = time.monotonic() + settings.source_timeout

    def still_in_time(done: int, total: int | None) -> None:
        if time.monotonic() > ends:
            raise Refused(
                f"'{address.shown}' was not here within {settings.source_timeout:g} s (--source-timeout): nothing is "
                "kept of it"
            )

    through = Pinned(host, address_of(host))
    limits = Limits(max_bytes=settings.max_source * 2**30)
    try:
        fetch(
            address, folder, limits=limits, patience=PATIENCE, progress=still_in_time, through=through,
            with_digest=False,
        )  # fmt: skip
    except (NotFound, Refused, OutOfSpace):
        raise
    except LorakitError as error:
        raise NotFetched(str(error)) from None
    return folder


def address_of(host: Host) -> str:
    """What a name means now.

    Raises:
        NotFound: nothing.
        Refused: one of the addresses that it means is not out in the world.
    """
    try:
        found = socket.getaddrinfo(host.name, host.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise NotFound(f"there is no host '{host.name}'") from None
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise Refused(
            f"'{host.name}' is inside of this server's network, and nothing is fetched from there for others: fetch it "
            "(lorakit fetch), and load the folder"
        )
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an address is out in the world, and no way back in: an address of IPv6 may hold one of IPv4."""
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv4Address):
        return ip.is_global and not ip.is_multicast and not any(ip in network for network in _INSIDE_ALL_THE_SAME)
    if ip in _NAT64:
        return is_public(str(IPv4Address(int(ip) & 0xFFFFFFFF)))
    inner = [ip.sixtofour, *(ip.teredo or ())]
    return ip in _GLOBAL_UNICAST and ip.is_global and all(one is None or is_public(str(one)) for one in inner)


class Pinned(httpx.BaseTransport):
    """Connects to one address, whatever a name comes to mean, for one host alone; and follows nothing."""

    def __init__(self, host: Host, address: str) -> None:
        self._host = host
        self._address = address
        self._inner = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        if (url.scheme, Host(url.raw_host.decode("ascii"), url.port or HTTPS)) != ("https", self._host):
            raise Refused(f"'{self._host.name}' leads to another place, which is not asked")
        answer = self._inner.handle_request(
            httpx.Request(
                request.method, url.copy_with(host=self._address), headers=request.headers, stream=request.stream,
                extensions={**request.extensions, "sni_hostname": self._host.name},
            )
        )  # fmt: skip
        if answer.has_redirect_location:
            answer.close()
            raise Refused(f"'{self._host.name}' leads to another place, which is not asked")
        return answer

    def close(self) -> None:
        self._inner.close()
