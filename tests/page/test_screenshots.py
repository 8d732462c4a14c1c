"""The pictures of the page in the README and the documentation, and that nothing in them lies over another.

LORAKIT_SCREENSHOTS=docs/images pytest tests/page/test_screenshots.py      writes those in SHOWN anew: look at each
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.page.runs import TalkingEngine, put_step
from tests.page.visit import Visit
from tests.server.fake_engine import put_adapter
from tests.server.running import Running, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SHOWN = {
    "run-light", "run-dark", "run-light-narrow", "run-dark-narrow", "playground-light", "playground-dark",
    "playground-dark-narrow", "traffic-light", "compare-light-narrow", "runs-dark",
}  # fmt: skip

# Texts that lie over one another: the boxes of two elements with text of their own, neither inside the other.
COLLISIONS = """() => {
  const hidden = ".unseen, .skip, dialog:not([open]), option, svg, select, .text, .wide";
  const own = (one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  const seen = (one) => {
    const box = one.getBoundingClientRect();
    return box.width > 1 && box.height > 1 && getComputedStyle(one).visibility !== "hidden" && !one.closest(hidden);
  };
  const texts = [...document.querySelectorAll(".frame *")].filter((one) => own(one) && seen(one));
  const found = [];
  texts.forEach((one, place) => {
    const a = one.getBoundingClientRect();
    for (const other of texts.slice(place + 1)) {
      if (one.contains(other) || other.contains(one)) continue;
      const b = other.getBoundingClientRect();
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const tall = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 2 && tall > 4) found.push(`${one.textContent.trim()} / ${other.textContent.trim()}`);
    }
  });
  return found.slice(0, 5);
}"""


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory, base: Path, chromium: Any) -> Iterator[Running]:
    """A server as it may be on an afternoon: runs, a refused checkpoint, a canary, a mix, and requests."""
    folder = tmp_path_factory.mktemp("busy")
    for step in range(100, 1300, 100):
        put_step(folder / "runs" / "sql", step, best=900)
    for step in (200, 400, 600):
        put_step(folder / "runs" / "chat", step, seed=2)
    for step in (100, 200, 300, 400):
        put_step(folder / "runs" / "support-de", step, seed=3, like=20200)
    put_adapter(folder / "runs" / "code" / "checkpoint-500", 9, rank=64)
    (folder / "runs" / "code" / "checkpoint-500" / "trainer_state.json").write_text('{"global_step": 500}')
    with (
        running(folder, base, engine=TalkingEngine(base, slots=4, memory=10), max_mix_error=1.0) as there,
        httpx.Client(base_url=there.url, timeout=60) as client,
    ):
        client.put("/v1/adapters/sql/aliases/prod", json={"revision": "step-900"}).raise_for_status()
        shares = [{"revision": "step-1200", "share": 0.1}, {"revision": "step-900", "share": 0.9}]
        client.put("/v1/adapters/sql/aliases/sql", json={"shares": shares})
        mixed = client.post("/v1/mixes", json={"name": "helpdesk", "mix": "mix(sql@best=0.6,chat=0.4)"})
        assert mixed.status_code == 201, mixed.text
        ask_around(client, 200, random.Random(7))
        yield there


def ask_around(client: httpx.Client, times: int, chance: random.Random) -> None:
    for _ in range(times):
        model = chance.choices(["sql", "chat", "support-de", "sql@prod", "helpdesk", "numbers"], [8, 4, 3, 3, 2, 1])[0]
        user = f"user-{chance.randrange(40)}"
        client.post(
            "/v1/completions", json={"model": model, "prompt": "a", "user": user, "stream": True}
        ).raise_for_status()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("wide", [1280, 390])
def test_each_screen_is_whole_in_light_and_dark_wide_and_narrow(
    busy: Running, visit: Visit, tmp_path: Path, theme: str, wide: int
) -> None:
    page = visit.page
    page.emulate_media(color_scheme=theme, reduced_motion="reduce")
    page.set_viewport_size({"width": wide, "height": 900 if wide > 500 else 844})
    screens = {
        "runs": ("/ui/", lambda: page.get_by_role("link", name="sql", exact=True).wait_for()),
        "run": ("/ui/runs/sql", lambda: page.locator("canvas").first.wait_for()),
        "traffic": ("/ui/traffic", lambda: see_traffic(busy, page)),
        "playground": ("/ui/playground", lambda: ask(page)),
        "compare": ("/ui/compare", lambda: compare(page)),
        "lineage": ("/ui/lineage", lambda: page.get_by_text("helpdesk").wait_for()),
        "events": ("/ui/events", lambda: page.locator(".log li").nth(3).wait_for()),
    }
    for name, (path, until) in screens.items():
        visit.open(busy.url, path)
        until()
        page.wait_for_timeout(300)  # ECharts draws after it was told
        assert visit.overflow() == [], name
        assert page.evaluate(COLLISIONS) == [], name
        picture = f"{name}-{theme}{'' if wide > 500 else '-narrow'}"
        page.screenshot(path=tmp_path / f"{picture}.png", full_page=True)
        keep(tmp_path / f"{picture}.png")


def keep(picture: Path) -> None:
    """In fewer colours, which nobody sees, and a third of the bytes."""
    from PIL import Image

    folder = os.environ.get("LORAKIT_SCREENSHOTS")
    if folder and (picture.stem in SHOWN or "LORAKIT_EVERY_SCREENSHOT" in os.environ):
        Path(folder).mkdir(exist_ok=True, parents=True)
        with Image.open(picture) as drawn:
            drawn.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
                Path(folder) / picture.name, optimize=True
            )


def see_traffic(there: Running, page: Any) -> None:
    """A few looks, with requests in between."""
    chance = random.Random(3)
    page.locator("canvas").wait_for()
    with httpx.Client(base_url=there.url, timeout=60) as client:
        ends = time.monotonic() + (40 if "LORAKIT_SCREENSHOTS" in os.environ else 5)
        while time.monotonic() < ends:
            ask_around(client, chance.randrange(1, 12), chance)
            page.wait_for_timeout(200)
    page.get_by_role("heading", name="Since the engine started").wait_for()


def ask(page: Any) -> None:
    page.get_by_label("Ask").nth(0).fill("sql")
    page.get_by_label("Ask").nth(1).fill("chat")
    page.get_by_text("A mix beside them").click()
    page.get_by_label("ask it as well").check()
    page.get_by_label("Adapter 1 of the mix").select_option("sql")
    page.get_by_label("Adapter 2 of the mix").select_option("chat")
    page.get_by_role("textbox", name="Question").fill("Who are our five best customers this year?")
    page.get_by_role("button", name="Ask", exact=True).click()
    for place in range(3):
        page.locator(f"#end-{place}", has_text="all in").wait_for()
    page.get_by_role("textbox", name="Question").blur()


def compare(page: Any) -> None:
    for name in ("chat", "sql", "support-de"):
        page.get_by_label(name, exact=True).check()
    page.get_by_label("Others").fill("sql@step-100")
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("region", name="Pairs").wait_for()
