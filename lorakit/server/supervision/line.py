"""A line between two processes of one server: words as JSON, and open sockets beside them.

A packet a word (SOCK_SEQPACKET), so that a handle arrives with the word that it belongs to.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_LARGEST = 1 << 17  # bytes of a word
_HANDLES = 4


@dataclass(frozen=True, slots=True)
class Word:
    """`handles` are open file descriptors, which no process that is started from here inherits."""

    say: str
    data: dict[str, Any]
    handles: Sequence[int] = ()


class Line:
    """One end."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        end.setblocking(False)

    async def say(self, word: str, *, handles: Sequence[int] = (), **more: Any) -> None:
        """Raises OSError where the other end is gone, or the word too long."""
        raw = packed(word, more)
        while True:
            try:
                socket.send_fds(self._end, [raw], list(handles))
                return
            except BlockingIOError:
                await self._until(asyncio.get_running_loop().add_writer, asyncio.get_running_loop().remove_writer)

    async def hear(self) -> Word | None:
        """The next word; None when the other end is gone."""
        while True:
            try:
                return received(self._end)
            except BlockingIOError:
                await self._until(asyncio.get_running_loop().add_reader, asyncio.get_running_loop().remove_reader)
            except OSError:
                return None

    async def _until(self, add: Callable[..., Any], remove: Callable[[int], Any]) -> None:
        handle, able = self._end.fileno(), asyncio.Event()
        add(handle, able.set)
        try:
            await able.wait()
        finally:
            remove(handle)

    def close(self) -> None:
        self._end.close()


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a line."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def packed(word: str, more: dict[str, Any]) -> bytes:
    return json.dumps({"say": word, **more}).encode()


def received(end: socket.socket) -> Word | None:
    """A word from a plain socket; None when the other end is gone. Raises OSError as the socket does."""
    raw, handles, _, _ = socket.recv_fds(end, _LARGEST, _HANDLES)
    for handle in handles:
        os.set_inheritable(handle, False)
    if not raw:
        return None
    data = json.loads(raw)
    return Word(data.pop("say"), data, tuple(handles))
