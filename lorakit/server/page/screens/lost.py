"""Where there is no screen."""

from __future__ import annotations

from lorakit.server.page.markup import empty
from lorakit.server.page.screens.screen import Screen


class Lost(Screen):
    title = "nothing here"
    place = "nowhere"
    every = 0

    def build(self) -> None:
        self.client.status_code = 404
        self.add("nothing", empty("There is nothing here", "The screens are beside this, or above it."))

    async def look(self) -> None:
        pass
