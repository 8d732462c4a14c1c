"""The way in to the page: who visits, from where, and what a browser may do with what it is given.

Nothing of NiceGUI is there before the first visit, nor for whoever has no key where one is wanted.
"""

from __future__ import annotations

import asyncio
import html
import secrets
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.files.digests import file_digest
from lorakit.server.file_work import file_work
from lorakit.server.page.api import Api, NotTold, SignedOut
from lorakit.server.page.origin import COMMON_HEADERS, is_from_here, policy
from lorakit.server.page.sessions import Session, Sessions, cookie
from lorakit.server.requests.answers import error_response, unavailable

if TYPE_CHECKING:
    from lorakit.server.page.stage import Stage

PLACE = "/ui"
STATIC = Path(__file__).with_name("static")
SESSION = "lorakit.page.session"  # where a request's scope has them
GATEWAY = "lorakit.page.gateway"
_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
_FILES = frozenset({"static", "libraries", "components", "resources", "esm", "dynamic_resources"})
_LONGEST = 8192  # bytes of a form
_FOR_EVER = b"public, max-age=31536000, immutable"
_SOCKET = f"{PLACE}/_nicegui_ws/"
_INSTALL = "pip install 'lorakit[ui]'"
_MISSING = f"there is no page here: it takes NiceGUI, which is installed by: {_INSTALL}"


def is_page(path: str) -> bool:
    return path == PLACE or path.startswith(f"{PLACE}/")


def _is_of_nicegui(path: str) -> bool:
    """Whether it is a file of NiceGUI's own, the same for everybody, whose path holds the version."""
    begin, _, rest = path.removeprefix(f"{PLACE}/_nicegui/").partition("/")
    return path.startswith(f"{PLACE}/_nicegui/") and begin == _version() and rest.split("/")[0] in _FILES


@cache
def _version() -> str:
    """NiceGUI's, which is read from the disk."""
    return version("nicegui")


class Page:
    """`gateway` is what it asks, and what it stands in."""

    def __init__(self, gateway: ASGIApp) -> None:
        self._gateway = gateway
        self._sessions = Sessions()
        self._anybody = Session()  # whoever has no key, where none is wanted
        self._stage: Stage | None = None
        self._opening = asyncio.Lock()

    async def close(self) -> None:
        self._sessions.close()
        if self._stage is not None:
            await self._stage.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        # NiceGUI would write a prefix into its pages that a client says
        headers = [(name, value) for name, value in scope["headers"] if name != b"x-forwarded-prefix"]
        scope = {**scope, "path": path, "root_path": "", "headers": headers}
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
            return
        nonce = secrets.token_urlsafe(16)
        await self._http(scope, receive, _guarded(send, nonce, scope["path"]))

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self._answered(scope, receive)
        taking: ASGIApp
        if isinstance(answer, Response):
            taking = answer
        else:
            if answer is not None:
                scope = {**scope, SESSION: answer, GATEWAY: self._gateway}
            try:
                stage = await self._open()
                taking = stage.refusal(scope) or stage
            except ImportError as error:
                taking = unavailable(f"the NiceGUI that is installed can't be used ({error}): {_INSTALL}")
        await taking(scope, receive, send)

    async def _answered(self, scope: Scope, receive: Receive) -> Response | Session | None:
        """What is answered here; else whose visit it is, or None of a file that NiceGUI gives to everybody."""
        path, method = scope["path"], scope["method"]
        if find_spec("nicegui") is None:
            return error_response(404, "NotFoundError", _MISSING)
        if method == "POST" and path in (f"{PLACE}/key", f"{PLACE}/leave"):
            return await self._signed(scope, receive)
        if method not in ("GET", "HEAD"):
            return PlainTextResponse("the page is only looked at", 405, {"Allow": "GET, HEAD"})
        if path == PLACE:
            return RedirectResponse(f"{PLACE}/", 307)
        if path.startswith(f"{PLACE}/static/"):
            return await _static(path.removeprefix(f"{PLACE}/static/"))
        if path.startswith(_SOCKET):
            return PlainTextResponse("a websocket is wanted here", 400)
        if _is_of_nicegui(path):
            return None
        return await self._visitor(scope) or HTMLResponse(sign_in(), 401)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Of a page that was given to this very visitor, and asked for by it."""
        if find_spec("nicegui") is not None and is_from_here(scope):
            stage = await self._open()
            if stage.is_of(scope, self._sessions.find(scope) or self._anybody):
                await stage(scope, receive, send)
                return
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": "this is not the page's own"})

    async def _visitor(self, scope: Scope) -> Session | None:
        """None where a key is wanted that is not there."""
        session = self._sessions.find(scope) or self._anybody
        try:
            await Api(self._gateway, session).get("/v1/key")
        except SignedOut:
            self._sessions.end(scope)
            return None
        except NotTold:  # no engine answers, or the key has asked too often: the page says so
            pass
        return session

    async def _signed(self, scope: Scope, receive: Receive) -> Response:
        """In, with the key that a form holds, or out."""
        if not is_from_here(scope):
            return PlainTextResponse("another site may not do this", 403)
        if scope["path"] == f"{PLACE}/leave":
            self._sessions.end(scope)
            return RedirectResponse(f"{PLACE}/", 303, {"Set-Cookie": cookie("", scope)})
        key = await _key_in_form(receive)
        if not (key and key.isascii() and key.isprintable()):
            return HTMLResponse(sign_in("Type a key in."), 401)
        try:
            await Api(self._gateway, Session(key, wanted=True)).get("/v1/key")
        except SignedOut:
            return HTMLResponse(sign_in("This key is not one of this server."), 401)
        except NotTold:
            pass
        self._sessions.end(scope)
        return RedirectResponse(f"{PLACE}/", 303, {"Set-Cookie": cookie(self._sessions.begin(key), scope)})

    async def _open(self) -> Stage:
        """NiceGUI takes a second to import, and the engine goes on meanwhile."""
        async with self._opening:
            if self._stage is None:
                self._stage = await (await asyncio.to_thread(_stage_class)).opened()
            return self._stage


def _stage_class() -> type[Stage]:
    from lorakit.server.page.stage import Stage

    return Stage


def _guarded(send: Send, nonce: str, path: str) -> Send:
    """Gives every answer its headers, and the scripts of a page the nonce by which they may run. What a page says of
    adapters is JSON with every `<` escaped, so no name can be a script."""
    is_html = False

    async def guarded(message: Message) -> None:
        nonlocal is_html
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), *COMMON_HEADERS, (b"content-security-policy", policy(nonce))]
            is_html = any(name == b"content-type" and value.startswith(b"text/html") for name, value in headers)
            if is_html:
                headers = _without(headers, b"content-length")
            if message["status"] == 200 and _is_of_nicegui(path):
                headers = [*_without(headers, b"cache-control"), (b"cache-control", _FOR_EVER)]
            elif is_html and not any(name == b"cache-control" for name, _ in headers):
                headers.append((b"cache-control", b"no-store"))
            message = {**message, "headers": headers}
        elif is_html:
            # NiceGUI's pages come in one piece
            body = message.get("body", b"").replace(b"<script", f'<script nonce="{nonce}"'.encode())
            message = {**message, "body": body}
        await send(message)

    return guarded


def _without(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> list[tuple[bytes, bytes]]:
    return [pair for pair in headers if pair[0] != name]


async def _key_in_form(receive: Receive) -> str:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > _LONGEST:
            return ""
        if not message.get("more_body"):
            found: str = parse_qs(body.decode("ascii", "replace")).get("key", [""])[0]
            return found.strip()


async def _static(name: str) -> Response:
    file = STATIC / name
    if file.parent != STATIC or file.suffix not in _TYPES or not await file_work(file.is_file):
        return PlainTextResponse("there is no such file", 404)
    raw = await file_work(file.read_bytes)
    return Response(raw, headers={"Content-Type": _TYPES[file.suffix], "Cache-Control": _FOR_EVER.decode()})


@cache
def address_of(name: str) -> str:
    """Of one of our own files, with its content in it: a browser keeps it until there is another."""
    return f"{PLACE}/static/{name}?{file_digest(STATIC / name)[:12]}"


def sign_in(wrong: str = "") -> str:
    """What whoever has no key is shown: a form, and no script but the one that knows dark from light."""
    said = f'<p class="wrong" role="alert">{html.escape(wrong)}</p>' if wrong else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>lorakit: sign in</title>
<link rel="icon" href="{address_of("icon.svg")}">
<link rel="stylesheet" href="{address_of("page.css")}">
<script src="{address_of("theme.js")}"></script>
</head>
<body class="door">
<main>
<h1 class="brand">lorakit</h1>
<form method="post" action="{PLACE}/key">
<p>This server wants a key. Make one on its machine: <code>lorakit key create</code></p>
{said}
<label for="key">Key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus spellcheck="false">
<button class="main">Sign in</button>
<p class="quiet">The key stays in this server's memory until you sign out, or for 12 hours without a visit.</p>
</form>
</main>
</body>
</html>
"""
