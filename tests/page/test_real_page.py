"""The page of a real vLLM: its own process, its own event loop, tokens that it makes."""

from __future__ import annotations

import pytest

from tests.page.visit import Visit
from tests.world import World

pytestmark = pytest.mark.timeout(600)


def test_a_real_engine_answers_in_the_playground_and_tells_its_traffic(visit: Visit, world: World) -> None:
    url, base = world.server.url, world.base.name
    page = visit.open(url, f"/ui/playground?ask={base}")
    page.get_by_label("As", exact=True).select_option("completion")
    page.get_by_label("Tokens at most").fill("8")
    page.get_by_role("textbox", name="Question").fill("abc")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator("#end-0", has_text="all in").wait_for()
    assert page.locator("#answer-0").inner_text()
    visit.open(url, "/ui/traffic")
    page.get_by_role("heading", name="Since the engine started").wait_for()
    page.get_by_role("group", name="Names").get_by_role("row").filter(has_text=base).wait_for()
