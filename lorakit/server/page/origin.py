"""Whether a request to the page comes from the page: another site must neither drive it nor hold it in a frame."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.types import Scope

from lorakit.server.requests.exchange import header

_PORTS = {"http": 80, "ws": 80, "https": 443, "wss": 443}

COMMON_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
)


def policy(nonce: str) -> bytes:
    """The Content-Security-Policy: everything from here. NiceGUI makes functions out of text (`unsafe-eval`), and
    writes styles into elements; scripts run by their nonce, or from this server."""
    said = (
        f"default-src 'none'; script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; "
        "base-uri 'none'"
    )
    return said.encode("ascii")


def is_from_here(scope: Scope) -> bool:
    """Whether a browser says that this very server's page asked: by `Sec-Fetch-Site` where it knows that, else by an
    `Origin` that is the `Host`. What says neither is no page that a browser shows."""
    if site := header(scope, b"sec-fetch-site"):
        return site in (b"same-origin", b"none")
    origin = header(scope, b"origin")
    return not origin or is_same(origin.decode("latin-1"), header(scope, b"host").decode("latin-1"))


def is_same(origin: str, host: str) -> bool:
    """Whether `https://lora.example:8443` is the page of `lora.example:8443`."""
    try:
        said, here = urlsplit(origin), urlsplit(f"//{host}")
        port = _PORTS.get(said.scheme)
        return bool(said.hostname) and said.hostname == here.hostname and (said.port or port) == (here.port or port)
    except ValueError:
        return False
