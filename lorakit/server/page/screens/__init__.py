"""One screen a module."""

from __future__ import annotations

from collections.abc import Mapping

from lorakit.server.page.screens.compare import Compare
from lorakit.server.page.screens.events import Happened
from lorakit.server.page.screens.lineage import Lineage
from lorakit.server.page.screens.lost import Lost
from lorakit.server.page.screens.playground import Playground
from lorakit.server.page.screens.run import RunScreen
from lorakit.server.page.screens.runs import Runs
from lorakit.server.page.screens.screen import Screen
from lorakit.server.page.screens.traffic import Traffic

# The last one is where nothing else is.
SCREENS: Mapping[str, type[Screen]] = {
    "/": Runs, "/runs/{name}": RunScreen, "/traffic": Traffic, "/playground": Playground, "/compare": Compare,
    "/lineage": Lineage, "/events": Happened, "/{rest:path}": Lost,
}  # fmt: skip
