"""How a new server gets the address of a running one, over a socket in the store that only its own user can open.

New: `takeover`. Old: `address`, with the listening socket and the processes of its engine. Both then share one socket;
the new one does not accept yet. When its engine answers, it says `hold`: the old one changes nothing in the store any
more, and says `held`. When all that was served before answers in the new engine, that begins to accept, and the new one
says `over`: the old one accepts no more, finishes what is in flight, and ends. Before that, an end of the line leaves
the old one as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import Conflict, NotFound
from lorakit.server.supervision import line
from lorakit.server.supervision.line import Line
from lorakit.store.serving import serving_now

SUFFIX = ".sock"  # beside the file that says that a server runs
_WAIT = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class Taken:
    """The address of a running server, the line to it, and the processes of its engine."""

    public: socket.socket
    end: socket.socket
    members: Sequence[int]


@contextmanager
def door(path: Path | None) -> Iterator[socket.socket | None]:
    """Where another server may ask for the address: a socket that only this user can open; none without a path."""
    if path is None:
        yield None
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening, _short(path) as short:
        listening.bind(short)
        try:
            os.chmod(short, 0o600)
            listening.listen(1)  # nobody could connect before this
            listening.setblocking(False)
            yield listening
        finally:
            with contextlib.suppress(OSError):
                os.unlink(short)


async def accepted(listening: socket.socket) -> Line:
    """The next server of this user that asks."""
    while True:
        end, _ = await asyncio.get_running_loop().sock_accept(listening)
        if _user_of(end) in (0, os.geteuid()):
            return Line(end)
        end.close()


def take_over(home: Path, base: str, url: str) -> Taken:
    """Ask the server of a base at an address for that address; it serves on.

    Raises:
        NotFound: there is none, on this store.
        Conflict: it does not answer.
    """
    found = [server for server in serving_now(home) if server.base == base and server.url == url]
    if not found:
        raise NotFound(
            f"no server of this base runs at {url} with the store '{home}': start this one without --takeover"
        )
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        end.settimeout(_WAIT)
        with _short(found[0].file.with_suffix(SUFFIX)) as short:
            end.connect(short)
        end.send(line.packed("takeover", {}))
        word = line.received(end)
        if word is None or not word.handles:
            raise ConnectionError("it has closed the line")
    except OSError as error:
        end.close()
        raise Conflict(f"{found[0]} can't be taken over from: {error}. Stop it, then start this one") from None
    return Taken(socket.socket(fileno=word.handles[0]), end, word.data["members"])


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name for a path that fits into a socket's address, which may have 108 bytes."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _user_of(end: socket.socket) -> int:
    _, user, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(user)
