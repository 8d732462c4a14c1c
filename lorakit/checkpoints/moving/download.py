"""The bytes behind a URL as one stream, which goes on where it was when the connection breaks."""

from __future__ import annotations

import hashlib
import logging
import random
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorakit.checkpoints.moving.answers import PASSING, Said, refusal, said_in
from lorakit.errors import InvalidFile, LorakitError, NotFound, Refused
from lorakit.files.addresses import without_secrets

if TYPE_CHECKING:
    import httpx

_REDIRECTS = 10
_LONGEST_PAUSE = 20.0  # seconds
_BODY = 1 << 16  # of an answer that is an error
_LOGGERS = ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.proxy", "httpcore.socks")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server is waited for.

    Attributes:
        tries: In a row without one new byte, before it is given up.
        timeout: Seconds without a byte that count as a broken connection.
        pause: Seconds before the second try; twice as long before each further one, 20 at most.
    """

    tries: int = 8
    timeout: float = 30.0
    pause: float = 0.5


class StartAgain(Exception):
    """What arrived can't be gone on with: the bytes behind the URL have changed, or nothing says that they have not."""

    def __init__(self, reason: str, *, changed: bool) -> None:
        super().__init__(reason)
        self.changed = changed


class Download:
    """A stream over the bytes as they travel, still packed where `said.encoding` says so.

    Args:
        start: How many bytes are there already, which `before` gives.
        known: What the server said when it sent those.
        progress: Called with the bytes that are there, and how many there will be, where that is known.

    Raises, here and while it is read:
        NotFound, Refused, LorakitError: as `refusal`, or the server can't be reached.
        InvalidFile: the bytes are not those of the digests that the server gave.
        StartAgain: as it says.
    """

    def __init__(
        self,
        client: httpx.Client,
        url: str,
        patience: Patience | None = None,
        *,
        start: int = 0,
        known: Said | None = None,
        before: Callable[[], Iterable[bytes]] = tuple,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> None:
        self.position = start
        self.resumed = 0
        self.said = known or Said()
        self._client = client
        self._url = url
        self._shown = without_secrets(url)
        self._patience = patience or Patience()
        self._progress = progress
        self._answer: httpx.Response | None = None
        self._blocks: Iterator[bytes] = iter(())
        self._left = b""
        self._skip = 0
        self._failures = 0
        self._ended = False
        self._begun = False
        while not self._begun:
            self._try(self._open)
        self._hashes = {name: hashlib.new(name, usedforsecurity=False) for name, _ in self.said.digests}
        self._sha256 = self._hashes.setdefault("sha256", hashlib.sha256())
        for block in before() if start else ():
            self._hash(block)

    def read(self, size: int, /) -> bytes:
        """At least one byte and at most `size`; none at the end."""
        if not self._left:
            self._left = self._arrived()
        piece, self._left = self._left[:size], self._left[size:]
        return piece

    def sha256(self) -> str:
        """Of all that was read, and of what was there before."""
        return self._sha256.hexdigest()

    def close(self) -> None:
        if self._answer is not None:
            self._answer.close()
        self._answer, self._blocks = None, iter(())

    def _arrived(self) -> bytes:
        block = b""
        while not (block or self._ended):
            block = self._try(self._next_block) or b""
        return block

    def _try(self, step: Callable[[], bytes | None]) -> bytes | None:
        """Take one step; when the connection breaks over it, wait, so that it can be taken again."""
        import httpx

        try:
            return step()
        except _NotNow as error:
            self._wait(str(error), error.after)
        except httpx.TransportError as error:
            if isinstance(error, httpx.UnsupportedProtocol | httpx.ProxyError):
                raise LorakitError(f"'{self._shown}' can't be reached: {type(error).__name__}") from None
            if not self._begun and (reason := _hopeless(error)):
                raise NotFound(f"'{self._shown}' can't be reached: {reason}") from None
            self._wait(_in_words(error), None)
        return None

    def _wait(self, reason: str, after: float | None) -> None:
        self.close()
        self._failures += 1
        if self._failures >= self._patience.tries:
            there = f"{self.position} of {self.said.size or 'unknown'} bytes arrived" if self._begun else "no answer"
            raise LorakitError(
                f"'{self._shown}': {reason}, {self._failures} times in a row ({there}): try again later"
            ) from None
        pause = self._patience.pause * 2 ** (self._failures - 1) * random.uniform(0.75, 1.25)
        time.sleep(min(_LONGEST_PAUSE, max(pause, after or 0)))

    def _next_block(self) -> bytes:
        if self._answer is None:
            self._open()
        block = next(self._blocks, b"")
        if not block:
            self._end()
        if self._skip:
            skipped = min(self._skip, len(block))
            self._skip -= skipped
            block = block[skipped:]
        if block:
            self._failures = 0
            self.position += len(block)
            if self.said.size is not None and self.position > self.said.size:
                raise InvalidFile(f"'{self._shown}' is longer than the {self.said.size} bytes that the server said")
            self._hash(block)
            if self._progress is not None:
                self._progress(self.position, self.said.size)
        return block

    def _hash(self, block: bytes) -> None:
        for one in self._hashes.values():
            one.update(block)

    def _end(self) -> None:
        self.close()
        if self._skip or (self.said.size is not None and self.position < self.said.size):
            raise _NotNow("the connection ended too early")
        self._ended = True
        for name, digest in self.said.digests:
            if self._hashes[name].digest() != digest:
                raise InvalidFile(
                    f"'{self._shown}': what arrived is not what the server has: its {name} is "
                    f"{self._hashes[name].hexdigest()}, and the server says {digest.hex()}; fetch it again"
                )

    def _open(self) -> None:
        """Ask for the rest."""
        condition = self.said.condition()
        if self.position and not condition:
            raise StartAgain("the server gives the file no version, so the rest can't be asked for", changed=False)
        headers = {**condition, "range": f"bytes={self.position}-"} if self.position else {}
        answer = sent(self._client, self._url, headers)
        try:
            self._take(answer)
        except BaseException:
            answer.close()
            raise
        self._answer, self._blocks = answer, iter(()) if answer.status_code == 416 else answer.iter_raw()
        self.resumed += self._begun or self.position > 0
        self._begun = True

    def _take(self, answer: httpx.Response) -> None:
        status = answer.status_code
        if status == 416 and self.said.size in (None, self.position) and _whole(answer) == self.position:
            self.said = replace(self.said, size=self.position)  # it broke at the very end
            return
        if status in (412, 416) and self.position:
            raise StartAgain("the file was changed on the server while it was fetched", changed=True)
        if status in PASSING:
            raise _NotNow(f"the server can't answer ({status})", _retry_after(answer))
        if status not in (200, 206):
            raise refusal(status, beginning_of(answer), str(answer.request.url), self._url)
        said = said_in(status, answer.headers)
        self._skip = 0
        if self.position:
            if self.said.is_changed_in(said) or said.encoding != self.said.encoding:
                raise StartAgain("the file was changed on the server while it was fetched", changed=True)
            if status == 200:  # it knows no parts, and sends the same from the start
                self._skip = self.position
            elif not answer.headers.get("content-range", "").startswith(f"bytes {self.position}-"):
                raise InvalidFile(f"'{self._shown}': the server sends another part than was asked for")
            said = replace(said, digests=self.said.digests)  # those of a part may be of the part
        elif status == 206:
            raise InvalidFile(f"'{self._shown}': the server sends a part where the whole was asked for")
        self.said = said


def sent(client: httpx.Client, address: str, headers: dict[str, str]) -> httpx.Response:
    """GET, with redirects followed: never from https to http, and credentials to the first host alone.

    Raises:
        Refused: it leads round in circles, or to a place that is not safe.
    """
    shown = without_secrets(address)
    url = first = _url(address, f"'{shown}' is no address that can be asked: check it")
    for _ in range(_REDIRECTS + 1):
        try:
            request = client.build_request("GET", url, headers={"accept-encoding": "identity", **headers})
            answer = client.send(request, stream=True)
        except UnicodeError:  # of a host's name, this one's or that of the next
            raise LorakitError(f"'{shown}' names a host that can't be, or leads to one: check it") from None
        if not answer.has_redirect_location:
            return answer
        answer.close()
        url = _url(answer.headers["location"], f"'{shown}' leads to an address that is none", url)
        if url.scheme not in ("http", "https") or (request.url.scheme, url.scheme) == ("https", "http"):
            raise Refused(f"'{shown}' leads to {url.scheme}://{url.host}, which is not safe: refused")
        if (url.scheme, url.host, url.port) == (first.scheme, first.host, first.port):
            url = url.copy_with(username=first.username, password=first.password)
    raise Refused(f"'{shown}' leads from place to place, more than {_REDIRECTS} times: refused")


def _url(text: str, otherwise: str, above: httpx.URL | None = None) -> httpx.URL:
    """Raises LorakitError, saying `otherwise`, when it can't be asked."""
    import httpx

    try:
        return httpx.URL(text) if above is None else above.join(text)
    except (httpx.InvalidURL, ValueError):  # hosts of other alphabets have rules of their own
        raise LorakitError(otherwise) from None


@contextmanager
def client_for(patience: Patience, through: httpx.BaseTransport | None = None) -> Iterator[httpx.Client]:
    """An HTTP client that logs no addresses. `through` is the one way that it takes, past whatever proxy.

    Raises:
        LorakitError: the environment names a proxy or certificates that can't be used.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(_unlogged)
    try:
        with _client(patience, through) as client:
            yield client
    finally:
        for logger in loggers:
            logger.removeFilter(_unlogged)


def _client(patience: Patience, through: httpx.BaseTransport | None) -> httpx.Client:
    """Raises LorakitError when the environment names a proxy or certificates that can't be used."""
    import httpx

    timeout = httpx.Timeout(patience.timeout, connect=min(10.0, patience.timeout))
    try:
        return httpx.Client(
            timeout=timeout, follow_redirects=False, headers={"user-agent": "lorakit"}, transport=through,
            trust_env=through is None,
        )  # fmt: skip
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        raise LorakitError(
            f"the proxy or the certificates that the environment names can't be used ({type(error).__name__}): check "
            f"HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and SSL_CERT_FILE"
        ) from None


def _unlogged(record: logging.LogRecord) -> bool:
    return False


class _NotNow(Exception):
    """It may go better the next time, not before `after` seconds."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


def _whole(answer: httpx.Response) -> int | None:
    said = answer.headers.get("content-range", "").removeprefix("bytes */")
    return int(said) if said.isascii() and said.isdecimal() else None


def _retry_after(answer: httpx.Response) -> float | None:
    said = answer.headers.get("retry-after", "")
    return float(said) if said.isascii() and said.isdecimal() and len(said) < 6 else None


def beginning_of(answer: httpx.Response) -> bytes:
    """Of the body, as it travels: an error's may be packed in a way that is none, or have no end."""
    body = b""
    for block in answer.iter_raw():
        body += block
        if len(body) >= _BODY:
            break
    return body


def _in_words(error: Exception) -> str:
    import httpx

    if isinstance(error, httpx.ConnectTimeout | httpx.ConnectError):
        return "the server can't be connected to"
    if isinstance(error, httpx.TimeoutException):
        return "the server sends nothing any more"
    return "the connection broke"


def _hopeless(error: BaseException | None) -> str:
    """Why a connection will not come about the next time either; empty where it may."""
    cause: Any = error
    while cause is not None:
        if isinstance(cause, socket.gaierror) and cause.errno in (socket.EAI_NONAME, socket.EAI_FAIL):
            return "there is no host of that name"
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not valid ({cause.verify_message})"
        cause = cause.__cause__ or cause.__context__
    return ""
