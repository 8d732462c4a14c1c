"""A running server, as the command line asks it: JSON over HTTP, and its errors in its own words.

Python's own client: to import another takes longer than the question.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

from lorakit.errors import Conflict, LorakitError, NotFound, Refused, UsageError

DEFAULT_URL = "http://127.0.0.1:8000"
LOOK = 30.0  # seconds that a question may take
CHANGE = 600.0  # and a change: to load a large adapter into a busy engine takes its time
_KINDS: dict[int, type[LorakitError]] = {400: Refused, 404: NotFound, 409: Conflict, 422: Refused}


@dataclass(frozen=True, slots=True)
class Client:
    """Asks the server at `url`; `key` goes nowhere but into the header; `look` is how many seconds a question may take.

    Raises:
        UsageError: the URL is none, or holds a password.
    """

    url: str = DEFAULT_URL
    key: str = field(default="", repr=False)
    look: float = LOOK

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            has_port = parts.port is None or parts.port > 0
            has_place = parts.scheme in ("http", "https") and bool(parts.hostname) and has_port and self.url.isascii()
        except ValueError:
            raise UsageError(f"--url '{self.url}' is no address") from None
        if "@" in parts.netloc:
            raise UsageError("--url holds a name or a password: set LORAKIT_API_KEY instead")
        if not has_place:
            raise UsageError(f"--url '{self.url}' has to be like {DEFAULT_URL}")
        if not (self.key.isascii() and self.key.isprintable()):
            raise UsageError("LORAKIT_API_KEY holds what no header can")

    def served(self) -> list[dict[str, Any]]:
        """The adapters, then the mixes."""
        return [one for path in ("/v1/adapters", "/v1/mixes") for one in self._ask("GET", path)["data"]]

    def models(self) -> list[dict[str, Any]]:
        """What a request may name: the base first."""
        cards: list[dict[str, Any]] = self._ask("GET", "/v1/models")["data"]
        return cards

    def adapter(self, name: str) -> dict[str, Any]:
        return self._ask("GET", f"/v1/adapters/{_part(name)}")

    def meaning(self, model: str) -> str:
        """The revision that a request for a model would be answered by."""
        return str(self._ask("GET", f"/v1/models/{_part(model)}")["root"])

    def load(self, name: str, source: str) -> dict[str, Any]:
        return self._ask("POST", "/v1/adapters", {"name": name, "source": source})

    def unload(self, name: str) -> dict[str, Any]:
        return self._ask("DELETE", f"/v1/adapters/{_part(name)}")

    def mix(self, name: str) -> dict[str, Any]:
        return self._ask("GET", f"/v1/mixes/{_part(name)}")

    def name_mix(self, name: str, mix: str) -> dict[str, Any]:
        """Have a name mean a mix, and follow the adapters in it."""
        return self._ask("POST", "/v1/mixes", {"name": name, "mix": mix})

    def forget_mix(self, name: str) -> dict[str, Any]:
        return self._ask("DELETE", f"/v1/mixes/{_part(name)}")

    def rollback(self, name: str) -> dict[str, Any]:
        return self._ask("POST", f"/v1/adapters/{_part(name)}/rollback")

    def comparison(self, name: str) -> dict[str, Any]:
        """How the revisions that answer for a name compare."""
        return self._ask("GET", f"/v1/adapters/{_part(name)}/comparison")

    def point(self, name: str, alias: str, revision: str) -> dict[str, Any]:
        """Have an alias, `name` for the default one, mean a revision."""
        return self._ask("PUT", _alias(name, alias), {"revision": revision})

    def split(
        self, name: str, alias: str, shares: Sequence[tuple[str, float]], shadows: Sequence[str] = (),
        seed: int | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Have revisions share an alias, or one have it; `shadows` answer beside them."""
        given = [{"revision": revision, "share": share} for revision, share in shares]
        meant: dict[str, Any] = {"shares": given} if len(given) > 1 else {"revision": given[0]["revision"]}
        settled = {} if seed is None else {"seed": seed}
        return self._ask("PUT", _alias(name, alias), {**meant, "shadow": list(shadows), **settled})

    def _ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """What the server answers.

        Raises:
            NotFound, Refused, Conflict: it says so.
            LorakitError: it does not answer, has no engine at the moment, or wants another key.
        """
        status, raw = self._exchange(method, path, body)
        try:
            told = json.loads(raw)
            if status < 300 and isinstance(told, dict):
                return told
            words = str(told["error"]["message"])
        except (ValueError, LookupError, TypeError):
            raise LorakitError(f"{self.url} answers {status}, but not as lorakit does: is it another server?") from None
        if status in (401, 403):
            words = f"{words}: {'LORAKIT_API_KEY is not the one' if self.key else 'set LORAKIT_API_KEY'}"
        raise _KINDS.get(status, LorakitError)(words)

    def _exchange(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        headers = {"Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        raw = None
        if body is not None:
            raw = json.dumps(body)
            headers["Content-Type"] = "application/json"
        connection = kind(str(parts.hostname), parts.port, timeout=self.look if method == "GET" else CHANGE)
        try:
            connection.request(method, f"{parts.path.rstrip('/')}{path}", raw, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            reason = str(error) or type(error).__name__
            raise LorakitError(
                f"no server answers at {self.url} ({reason}): start one (lorakit serve BASE), or name another with "
                f"--url or LORAKIT_URL"
            ) from None
        finally:
            connection.close()


def _alias(name: str, alias: str) -> str:
    return f"/v1/adapters/{_part(name)}/aliases/{_part(alias)}"


def _part(name: str) -> str:
    """One part of a path, whatever is in it."""
    return quote(name, safe="", errors="surrogateescape")
