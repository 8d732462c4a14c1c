"""JSON that is always written, and errors in OpenAI's shape."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse


class PlainJSON(JSONResponse):
    """ASCII alone: names of files and models may hold halves of characters, which UTF-8 can't write."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_response(
    status: int, kind: str, message: str, param: str | None = None, *, after: int | None = None
) -> JSONResponse:
    """An error in OpenAI's shape; with 429 and 503 a `Retry-After`, of `after` seconds where they are known."""
    headers = {"Retry-After": str(after or {429: 1, 503: 2}[status])} if status in (429, 503) else None
    return PlainJSON(
        {"error": {"message": message, "type": kind, "param": param, "code": status}}, status, headers=headers
    )


def unavailable(reason: str) -> JSONResponse:
    """503 with the reason."""
    return error_response(503, "ServiceUnavailableError", f"not served at the moment: {reason}")
