"""NiceGUI in this process. It knows one app and one event loop, so all gateways of a process share it."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI
from nicegui import Client, core, ui
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from lorakit.server.page.door import PLACE, SESSION, STATIC, address_of
from lorakit.server.page.screens import SCREENS
from lorakit.server.page.sessions import Session

MOST = 200  # pages that may be open at once
RECONNECT = 10.0  # seconds for which what a page shows is kept when its connection broke
_HEAD = "".join(
    (
        f'<link rel="stylesheet" href="{address_of("page.css")}">',
        f'<script src="{address_of("theme.js")}"></script>',
        f'<script defer src="{address_of("page.js")}"></script>',
    )
)


class Stage:
    """An ASGI app of what lies below `/ui`, for visitors that were let in."""

    _life: AbstractAsyncContextManager[Any] | None = None
    _users = 0

    @classmethod
    async def opened(cls) -> Stage:
        """NiceGUI's timers begin with the first, and end with the last."""
        _configure()
        Stage._users += 1
        if Stage._users == 1:
            Stage._life = core.app.router.lifespan_context(core.app)
            try:
                await Stage._life.__aenter__()
            except BaseException:
                Stage._users = 0
                raise
        return cls()

    async def close(self) -> None:
        Stage._users -= 1
        if Stage._users == 0 and Stage._life is not None:
            for client in list(Client.instances.values()):
                client.delete()
            await Stage._life.__aexit__(None, None, None)

    def refusal(self, scope: Scope) -> Response | None:
        """Each page that is open takes memory."""
        if SESSION in scope and len(Client.instances) >= MOST:
            return PlainTextResponse(f"{MOST} pages are open already: close some", 503, {"Retry-After": "10"})
        return None

    def is_of(self, scope: Scope, session: Session) -> bool:
        """Whether a websocket asks for a page that this visitor was given."""
        asked = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("client_id", [""])[0]
        client = Client.instances.get(asked)
        if client is None:
            return bool(asked)  # it is told to load anew; and whatever it asks for later has to be what it names here
        return client.request.scope.get(SESSION) is session

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await core.app({**scope, "root_path": PLACE}, receive, send)


def _configure() -> None:
    """Once a process."""
    if core.app.config.has_run_config:
        return
    core.app.config.socket_io_js_transports = ["websocket"]
    ui.run_with(
        FastAPI(openapi_url=None), title="lorakit", language="en-US", favicon=(STATIC / "icon.svg").read_text(),
        dark=False, binding_refresh_interval=None, reconnect_timeout=RECONNECT, message_history_length=200,
        tailwind=False, gzip_middleware_factory=None, show_welcome_message=False, mount_path=PLACE,
    )  # fmt: skip
    ui.add_head_html(_HEAD, shared=True)
    for path, screen in SCREENS.items():
        ui.page(path, title=f"lorakit: {screen.title}")(screen.opener())
