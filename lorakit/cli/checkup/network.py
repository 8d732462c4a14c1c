"""The address that a server would have, the one that is asked, and keys."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from lorakit.cli.checkup.finding import Finding
from lorakit.errors import LorakitError
from lorakit.files.addresses import without_secrets
from lorakit.server.client import DEFAULT_URL, Client

LOOK = 3.0  # seconds for a server to answer


def network(host: str, port: int, environ: Mapping[str, str]) -> Iterator[Finding]:
    """`host` and `port` are where `lorakit serve` would listen."""
    url = environ.get("LORAKIT_URL") or DEFAULT_URL
    answered, error = ask(url, environ.get("LORAKIT_API_KEY", ""))
    there = urlsplit(url).port == port if answered is not None else False
    yield of_port(host, port, trouble_at(host, port), ours=there)
    yield of_server(url, answered, error, named="LORAKIT_URL" in environ)
    yield of_key(given="LORAKIT_API_KEY" in environ)


def of_port(host: str, port: int, trouble: str, *, ours: bool) -> Finding:
    """`trouble` is what listening there says; `ours`: a server of lorakit has it."""
    what = f"{port} on {host}"
    if not trouble:
        return Finding("port", "ok", f"{what} is free")
    if ours:
        return Finding("port", "ok", f"{what} is the running server's")
    why = f"lorakit serve can't listen there: {trouble}"
    return Finding("port", "warning", what, why, "lorakit serve --port N; `ss -ltnp` says whose it is")


def of_server(url: str, models: list[str] | None, error: str, *, named: bool) -> Finding:
    """What a server says that it has, the base first; `named`: LORAKIT_URL says where it is."""
    where = without_secrets(url)
    if models is not None:
        base, names = (models[0] if models else "nothing"), max(0, len(models) - 1)
        return Finding("server", "ok", f"{where} serves {base} and {names} other name{'s' * (names != 1)}")
    if not named and error.startswith("no server answers"):
        return Finding("server", "ok", f"none runs at {where}")
    return Finding("server", "warning", where, error)


def of_key(*, given: bool) -> Finding:
    return Finding("key", "ok", "LORAKIT_API_KEY is set" if given else "LORAKIT_API_KEY is not set")


# looking it up


def ask(url: str, key: str) -> tuple[list[str] | None, str]:
    """The models of a running server; or why there are none."""
    try:
        return [str(card["id"]) for card in Client(url, key, look=LOOK).models()], ""
    except LorakitError as error:
        return None, str(error)
    except (LookupError, TypeError):
        return None, f"{without_secrets(url)} answers, but not as lorakit does: is it another server?"


def trouble_at(host: str, port: int) -> str:
    """Why nobody can listen there now; empty when one can."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, socket.SOCK_STREAM) as bound:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
    except OSError as error:
        return "another program has it" if error.errno == errno.EADDRINUSE else str(error.strerror or error)
    return ""
