"""Who visits: a key that was typed in stays in this process' memory, and the browser has an id of it that no script
there can read.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie

from starlette.types import Scope

from lorakit.server.requests.exchange import header

COOKIE = "lorakit_page"
IDLE = 12 * 3600.0  # seconds after which a key has to be typed in again
MOST = 1000  # visitors


@dataclass(slots=True)
class Session:
    """`key` is empty where the server wants none, and when its visitor has left; `used` is when it last asked for
    something, as an open page does."""

    key: str = field(default="", repr=False)
    wanted: bool = False  # whether there has to be one
    used: float = 0.0
    heard: str = ""  # the id of the last event that was told to its visitor

    @property
    def over(self) -> bool:
        return self.wanted and not self.key


class Sessions:
    """Those with a key; the least recently seen make room for others."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Session] = OrderedDict()

    def begin(self, key: str) -> str:
        """The id of a new one, for the cookie."""
        self._forget_idle()
        id = secrets.token_urlsafe(32)
        self._known[id] = Session(key, wanted=True, used=time.monotonic())
        while len(self._known) > MOST:
            _end(self._known.popitem(last=False)[1])
        return id

    def find(self, scope: Scope) -> Session | None:
        """Whose a request is."""
        self._forget_idle()
        id = _id_in(scope)
        session = self._known.get(id)
        if session is not None:
            session.used = time.monotonic()
            self._known.move_to_end(id)
        return session

    def _forget_idle(self) -> None:
        latest = time.monotonic() - IDLE
        for id in [id for id, session in self._known.items() if session.used < latest]:
            _end(self._known.pop(id))

    def end(self, scope: Scope) -> None:
        """Its key is forgotten; what is still open of it can do nothing more."""
        if session := self._known.pop(_id_in(scope), None):
            _end(session)

    def close(self) -> None:
        for session in self._known.values():
            _end(session)
        self._known.clear()


def cookie(id: str, scope: Scope) -> str:
    """The header that gives an id to a browser; an empty one takes it away."""
    secure = "; Secure" if scope.get("scheme") in ("https", "wss") else ""
    ends = "" if id else "; Max-Age=0"
    return f"{COOKIE}={id}; Path=/ui; HttpOnly; SameSite=Lax{secure}{ends}"


def _end(session: Session) -> None:
    session.key = ""


def _id_in(scope: Scope) -> str:
    try:
        found = SimpleCookie(header(scope, b"cookie").decode("latin-1")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""
