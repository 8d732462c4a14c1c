"""What all screens share: the frame around them, how they hear what happens, and how they do what somebody asks.

A screen looks at the API when it opens, when an event concerns it, and, while somebody sees it, every few seconds;
never more than once a second. What it draws is replaced where it differs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, ClassVar

from markupsafe import Markup
from nicegui import background_tasks, ui
from nicegui.events import GenericEventArguments
from starlette.requests import Request

from lorakit.server.page.api import Api, NotTold, SignedOut
from lorakit.server.page.charts import Theme
from lorakit.server.page.door import GATEWAY, SESSION
from lorakit.server.page.markup import NOTHING, banner
from lorakit.server.page.screens.frame import BESIDE, rail, room_head
from lorakit.server.page.sessions import Session
from lorakit.server.sight.logs import log

FIRST = 1.5  # seconds that a page waits for its first look before it shows itself
PAUSE = 1.0  # between two looks
AGAIN = 3.0  # after one that failed

Said = Mapping[str, Any]  # what a click or a form says
Act = Callable[[Said], Awaitable[None]]


class Screen:
    """One page in one tab. `build` makes its places, `look` asks the API and fills them."""

    title: ClassVar[str]
    place: ClassVar[str] = ""  # its entry in the rail
    every: ClassVar[float] = 5.0  # seconds between two looks while somebody sees it; 0: only when something happens
    replays: ClassVar[bool] = False  # whether it wants what happened before it was opened

    def __init__(self, request: Request) -> None:
        session: Session = request.scope[SESSION]
        self.request = request
        self.session = session
        self.api = Api(request.scope[GATEWAY], session)
        self.client = ui.context.client
        self.theme: Theme = "dark" if request.cookies.get("lorakit_theme") == "dark" else "light"
        self.acts: dict[str, Act] = {}
        self.admin = self.whole = self.base = self._key_is_known = False
        self._places: dict[str, ui.html] = {}
        self._tasks: list[asyncio.Task[Any]] = []
        self._stale = asyncio.Event()
        self._seen = asyncio.Event()
        self._seen.set()
        self._heard = "" if self.replays else session.heard

    @classmethod
    def opener(cls) -> Callable[[Request], Coroutine[Any, Any, None]]:
        """What NiceGUI calls for each visit."""

        async def opened(request: Request) -> None:
            await cls(request).open()

        return opened

    # for each screen to say

    def build(self) -> None:
        raise NotImplementedError

    async def look(self) -> None:
        """Raises NotTold."""

    def concerns(self, event: Said) -> bool:
        """Whether to look again because of it."""
        return True

    def turned(self) -> None:
        """Dark is light now, or the other way round: charts have colours of their own."""

    # what they use

    def add(self, name: str, markup: Markup = NOTHING, tag: str = "div") -> ui.html:
        """A place that `show` fills."""
        made = self._places[name] = ui.html(str(markup), sanitize=False, tag=tag)
        return made

    def show(self, name: str, markup: Markup) -> None:
        # names of folders may hold halves of characters, which no browser can be sent
        self._places[name].set_content(str(markup).encode("utf-8", "replace").decode())

    def say(self, text: str, kind: str = "done") -> None:
        """A line that goes away by itself."""
        self.run(f"lorakit.say({json.dumps(text)}, {json.dumps(kind)})")

    def run(self, script: str) -> None:
        self.client.run_javascript(script)

    def go(self, path: str) -> None:
        self.client.open(path)

    def wake(self) -> None:
        """Look again soon."""
        self._stale.set()

    # life

    async def open(self) -> None:
        with contextlib.suppress(NotTold):  # a look says so
            await self._ask_of_key()
        with ui.element("div").classes("frame"):
            ui.html(str(rail(self.place, signed_in=self.session.wanted)), sanitize=False, tag="aside").classes("rail")
            with ui.element("div").classes("room").props('id="content" tabindex="-1"'):  # NiceGUI makes the main of it
                self.add("trouble")
                self.build()
        ui.html(str(BESIDE), sanitize=False)
        ui.on("act", self._acted)
        ui.on("seen", self._saw)
        ui.on("theme", self._turned)
        try:
            async with asyncio.timeout(FIRST):
                await self._look()
        except TimeoutError:
            self.wake()
        self.client.on_connect(self._begin)
        self.client.on_disconnect(self._end)
        self.client.on_delete(self._end)

    def head(self, title: str, beside: Markup = NOTHING, end: Markup = NOTHING) -> Markup:
        return room_head(title, beside, end)

    async def _ask_of_key(self) -> None:
        key = await self.api.get("/v1/key")
        self.admin, self.whole, self.base = (bool(key.get(name)) for name in ("admin", "all", "base"))
        self._key_is_known = True

    def _begin(self) -> None:
        self._end()
        self._tasks = [
            background_tasks.create(self._listen(), name="what happens"),
            background_tasks.create(self._keep_up(), name="what is seen"),
        ]

    def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks = []

    async def _listen(self) -> None:
        while True:
            try:
                async for id, event in self.api.events(self._heard):
                    self._heard = self.session.heard = id
                    if self.concerns(event):
                        self.wake()
                self._leave()
                return
            except SignedOut:
                self._leave()
                return
            except Exception:  # a look says what it is
                await asyncio.sleep(AGAIN)

    async def _keep_up(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.every or None):
                    await self._stale.wait()
            await self._seen.wait()
            self._stale.clear()
            if await self._look():
                await asyncio.sleep(PAUSE)
            else:
                await asyncio.sleep(AGAIN)
                self.wake()

    async def _look(self) -> bool:
        try:
            if not self._key_is_known:
                await self._ask_of_key()
            await self.look()
        except SignedOut:
            self._leave()
            return False
        except NotTold as error:
            self.show("trouble", banner("The server does not say:", f"{error}. This page asks again by itself."))
            return False
        except Exception as error:  # one bad moment must not end it
            named = f"{type(error).__name__}: {error}"
            log.warning("the page can't show what it was told: %s", named)
            self.show("trouble", banner("This page can't show what it was told:", named))
            return False
        self.show("trouble", NOTHING)
        return True

    def _leave(self) -> None:
        self.go("/ui/")

    # what a browser tells

    async def _acted(self, event: GenericEventArguments) -> None:
        said = event.args if isinstance(event.args, dict) else {}
        act = self.acts.get(str(said.get("act")))
        if act is None:
            return
        try:
            await act(said)
        except SignedOut:
            self._leave()
        except NotTold as error:
            self.say(str(error), "wrong")

    def _saw(self, event: GenericEventArguments) -> None:
        if isinstance(event.args, dict) and event.args.get("seen") is False:
            self._seen.clear()
        else:
            self._seen.set()

    def _turned(self, event: GenericEventArguments) -> None:
        theme: Theme = "dark" if isinstance(event.args, dict) and event.args.get("theme") == "dark" else "light"
        if theme != self.theme:
            self.theme = theme
            self.turned()


def text(said: Said, name: str) -> str:
    """What a button says of itself, or the first value of a form's field."""
    values = said.get("values")
    if isinstance(said.get(name), str):
        return str(said[name])
    found = values.get(name) if isinstance(values, dict) else None
    return str(found[0]) if isinstance(found, list) and found else ""


def texts(said: Said, name: str) -> list[str]:
    """All values of a form's field."""
    values = said.get("values")
    found = values.get(name) if isinstance(values, dict) else None
    return [str(value) for value in found] if isinstance(found, list) else []


def number(said: Said, name: str, least: float, most: float, usual: float) -> float:
    """A field's number, within its limits."""
    try:
        value = float(text(said, name))
    except ValueError:
        return usual
    return min(most, max(least, value)) if value == value else usual
