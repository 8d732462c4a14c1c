"""The page in a real Chromium, against a gateway on an engine without a model.

Of each visit it is seen that no request leaves for another host, and that the browser complains of nothing.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorakit.store.catalog import Finish
from lorakit.store.keys import Allowance, KeyStore
from tests.page.runs import ANSWERS, TalkingEngine, put_step
from tests.page.visit import Visit
from tests.server.running import Running, running

pytestmark = pytest.mark.timeout(300)
SCREENS = ("/ui/", "/ui/runs/sql", "/ui/traffic", "/ui/playground", "/ui/compare", "/ui/lineage", "/ui/events")


@pytest.fixture
def there(tmp_path: Path, base: Path, chromium: Any) -> Iterator[Running]:
    """A server of two runs."""
    for step in (100, 200, 300):
        put_step(tmp_path / "runs" / "sql", step)
    put_step(tmp_path / "runs" / "chat", 100, seed=2)
    with running(tmp_path, base, engine=TalkingEngine(base, slots=8), max_mix_error=1.0) as server:
        yield server


def meant(there: Running, name: str = "sql", key: str = "") -> str:
    """The revision that a name means, as the API says it."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return str(httpx.get(f"{there.url}/v1/models/{name}", headers=headers).json()["root"])


def test_a_checkpoint_that_arrives_is_seen_without_loading_the_page_anew(
    tmp_path: Path, base: Path, visit: Visit
) -> None:
    with running(tmp_path, base, engine=TalkingEngine(base)) as there, visit:
        page = visit.open(there.url)
        page.get_by_text("Nothing is served yet").wait_for()
        put_step(tmp_path / "runs" / "sql", 100)
        page.get_by_role("link", name="sql", exact=True).click()
        row = page.get_by_role("group", name="Revisions").get_by_role("row")
        row.filter(has_text="step-100").wait_for()
        page.locator(".chart canvas").first.wait_for()
        put_step(tmp_path / "runs" / "sql", 200)
        arrived = row.filter(has_text="step-200")
        arrived.filter(has_text="latest").wait_for()
        assert arrived.get_by_text("ready").is_visible()
        page.locator("h1 + .pill + span", has_text="step-200").wait_for()


def test_a_revision_is_promoted_and_rolled_back(there: Running, visit: Visit) -> None:
    page = visit.open(there.url, "/ui/runs/sql")
    before = meant(there)
    row = page.get_by_role("region", name="Revisions").get_by_role("row").filter(has_text="step-200")
    row.get_by_role("button", name="Promote").click()
    page.get_by_role("status").get_by_text("sql is now step-200").wait_for()
    assert meant(there).startswith("sql@step-200")
    page.get_by_text("kept there by hand").wait_for()
    page.get_by_role("button", name="Roll back to step-300").click()
    page.get_by_role("status").get_by_text("sql is back at step-300").wait_for()
    assert meant(there) == before
    page.get_by_role("button", name="Follow latest").click()
    page.get_by_text("follows latest").wait_for()


def test_an_alias_is_set(there: Running, visit: Visit) -> None:
    page = visit.open(there.url, "/ui/runs/sql")
    page.get_by_label("Alias", exact=True).fill("prod")
    page.get_by_label("Revision", exact=True).select_option(label="step-100")
    page.get_by_role("button", name="Set").click()
    page.get_by_role("region", name="Aliases").get_by_role("cell", name="prod", exact=True).wait_for()
    assert meant(there, "sql@prod").startswith("sql@step-100")


def test_a_canary_is_set_by_sliders_and_promoted(there: Running, visit: Visit) -> None:
    page = visit.open(there.url, "/ui/runs/sql")
    card = page.locator("section[aria-label=Canary]")
    card.get_by_label("Revision 1").select_option(label="step-200")
    card.get_by_label("Revision 2").select_option(label="step-300")
    card.get_by_label("Share 1 in percent").fill("30")
    assert card.get_by_label("Share 2 in percent").input_value() == "70", "the other share gives way"
    card.get_by_role("button", name="Split").click()
    page.get_by_role("status").get_by_text("sql is split").wait_for()
    (split,) = httpx.get(f"{there.url}/v1/adapters/sql").json()["splits"].values()
    assert {one["revision"][:12]: one["share"] for one in split["shares"]} == {"sql@step-200": 0.3, "sql@step-300": 0.7}
    for number in range(20):
        httpx.post(f"{there.url}/v1/completions", json={"model": "sql", "prompt": "a", "user": f"u{number}"})
    page.reload()
    table = page.get_by_role("group", name="Side by side")
    table.get_by_role("row").filter(has_text="step-200").get_by_role("button", name="Promote").click()
    page.get_by_text("kept there by hand").wait_for()
    assert meant(there).startswith("sql@step-200")
    assert not httpx.get(f"{there.url}/v1/adapters/sql").json()["splits"]


def test_two_revisions_and_a_mix_answer_the_same_question_side_by_side(there: Running, visit: Visit) -> None:
    page = visit.open(there.url, "/ui/playground")
    page.get_by_label("Ask").nth(0).fill("sql@step-100")
    page.get_by_label("Ask").nth(1).fill("chat")
    page.get_by_text("A mix beside them").click()
    page.get_by_label("ask it as well").check()
    page.get_by_label("Adapter 1 of the mix").select_option("sql")
    page.get_by_label("Adapter 2 of the mix").select_option("chat")
    page.get_by_label("Weight 1").fill("0.6")
    page.get_by_role("textbox", name="Question").fill("Who are our top five customers?")
    page.get_by_role("textbox", name="Question").press("Control+Enter")
    for place, (name, text) in enumerate([("sql@step-100", "sql"), ("chat", "chat"), ("mix(sql=0.6,chat=0.3)", "mix")]):
        answer = page.locator(f"section[aria-label='{name}']")
        answer.get_by_text("all in").wait_for()
        assert answer.locator(f"#answer-{place}").inner_text() == ANSWERS[text]
    assert page.locator("#by-0").inner_text().startswith("step-100-")
    assert {asked["messages"][0]["content"] for asked in there.engine.asked if "messages" in asked} == {
        "Who are our top five customers?"
    }


def test_adapters_are_compared_as_a_heat_map(there: Running, visit: Visit) -> None:
    page = visit.open(there.url, "/ui/compare")
    page.get_by_label("Others").fill("sql@step-100")
    page.get_by_role("button", name="Compare").click()
    page.locator("section[aria-label=Cosines] canvas").first.wait_for()
    rows = page.get_by_role("group", name="Pairs").get_by_role("row")
    rows.filter(has_text="chat and sql@step-100").wait_for()
    assert rows.count() == 4, "each two of three, and a head"


def test_a_key_sees_its_own_adapters_alone_and_stays_where_no_script_reads_it(
    tmp_path: Path, base: Path, visit: Visit, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("sql", "chat"):
        put_step(tmp_path / "runs" / name, 100, seed=len(name))
    keys = KeyStore(tmp_path / "home")
    key, _ = keys.create(Allowance(adapters=("sql*",), base=False))
    keys.close()
    with running(tmp_path, base, engine=TalkingEngine(base)) as there, visit:
        visit.allowed = ("401",)
        visit.page.goto(f"{there.url}/ui/")
        page = visit.page
        page.get_by_label("Key").fill("not-it")
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("alert").get_by_text("not one of this server").wait_for()
        page.get_by_label("Key").fill(key)
        page.get_by_label("Key").press("Enter")
        page.get_by_role("link", name="sql", exact=True).wait_for()
        assert page.get_by_role("link", name="chat", exact=True).count() == 0
        assert key not in page.content()
        (cookie,) = [one for one in visit.context.cookies() if one["name"] == "lorakit_page"]
        assert cookie["httpOnly"]
        assert cookie["sameSite"] == "Lax"
        assert key not in cookie["value"]
        page.goto(f"{there.url}/ui/runs/chat")
        page.get_by_text("There is no adapter of this name").wait_for()
        page.goto(f"{there.url}/ui/runs/sql")
        page.get_by_role("region", name="Revisions").wait_for()
        assert page.get_by_role("button", name="Promote").count() == 0, "it is no admin's"
        page.get_by_role("button", name="Sign out").click()
        page.get_by_label("Key").wait_for()
        assert not any(key in url for url in visit.asked)
    assert key not in caplog.text
    assert not (Path.cwd() / ".nicegui").exists()


def test_an_engine_that_ends_is_said_and_its_return_is_seen(
    there: Running, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.server.page.screens.screen.Screen.every", 0.2)
    monkeypatch.setattr("lorakit.server.page.screens.screen.AGAIN", 0.2)
    page = visit.open(there.url)
    page.get_by_role("link", name="sql", exact=True).wait_for()
    there.engine.dead = True
    page.get_by_role("alert").get_by_text("the engine does not answer").wait_for()
    there.engine.dead = False
    page.get_by_role("alert").wait_for(state="detached")


def test_what_does_not_exist_and_what_fails_say_what_to_do(there: Running, visit: Visit) -> None:
    visit.allowed = ("404",)
    page = visit.open(there.url, "/ui/runs/nobody")
    page.get_by_text("There is no adapter of this name").wait_for()
    visit.open(there.url, "/ui/no/such/screen")
    page.get_by_text("There is nothing here").wait_for()
    visit.open(there.url, "/ui/playground")
    page.get_by_label("Ask").nth(0).fill("nobody")
    page.get_by_role("textbox", name="Question").fill("?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text("No answer: The model `nobody` does not exist").wait_for()


def test_all_can_be_done_by_keys(there: Running, visit: Visit) -> None:
    page = visit.open(there.url)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the content"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    order = []
    for _ in range(3):
        order.append(page.evaluate("document.activeElement.textContent"))
        page.keyboard.press("Tab")
    assert {"chat", "sql"} <= set(order)
    page.keyboard.press("?")
    page.get_by_role("dialog", name="Keys").wait_for()
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    page.keyboard.press("e")
    page.get_by_role("heading", name="Events").wait_for()
    page.wait_for_function("() => window.socket && window.socket.connected")
    page.keyboard.press("/")
    page.keyboard.type("step-200")
    log = page.locator(".log li")
    log.filter(has_text="step-300").first.wait_for(state="detached")
    log.filter(has_text="step-200").first.wait_for()


def test_what_somebody_set_and_where_the_focus_is_stays_when_it_is_drawn_anew(
    tmp_path: Path, there: Running, visit: Visit
) -> None:
    page = visit.open(there.url, "/ui/runs/sql")
    row = page.get_by_role("group", name="Revisions").get_by_role("row")
    card = page.locator("section[aria-label=Canary]")
    card.get_by_label("Revision 1").select_option(label="step-100")
    card.get_by_label("Share 1 in percent").fill("25")
    page.get_by_label("Alias", exact=True).fill("prod")
    row.filter(has_text="step-200").get_by_role("button", name="Promote").focus()
    put_step(tmp_path / "runs" / "sql", 400)
    row.filter(has_text="step-400").wait_for()
    card.locator("option", has_text="step-400").first.wait_for(state="attached")
    assert "step-100" in card.get_by_label("Revision 1").input_value()
    shares = [card.get_by_label(f"Share {number} in percent").input_value() for number in (1, 2)]
    assert shares == ["25", "75"]
    assert [one.inner_text() for one in card.locator("output").all()] == ["25 %", "75 %"]
    assert page.get_by_label("Alias", exact=True).input_value() == "prod"
    page.wait_for_function("() => document.activeElement.dataset.act === 'promote'")
    assert "step-200" in page.evaluate("document.activeElement.dataset.revision")


def test_dark_and_light_are_as_the_system_says_until_a_person_does(there: Running, visit: Visit) -> None:
    page = visit.open(there.url, "/ui/runs/sql")
    ground = "() => getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"() => ({ground})() !== {light!r}")
    page.get_by_role("button", name="Theme").click()
    page.wait_for_function(f"() => ({ground})() === {light!r}")
    page.reload()
    assert page.evaluate(ground) == light


@pytest.mark.parametrize("wide", [390, pytest.param(820, marks=pytest.mark.slow)])
def test_nothing_lies_outside_of_a_narrow_window(tmp_path: Path, there: Running, visit: Visit, wide: int) -> None:
    visit.page.set_viewport_size({"width": wide, "height": 844})
    for path in SCREENS:
        page = visit.open(there.url, path)
        page.get_by_role("heading", level=1).wait_for()
        assert visit.overflow() == [], path
    visit.open(there.url, "/ui/runs/sql").get_by_role("button", name="Promote").first.wait_for()
    assert visit.covered() == []


class Foreign(BaseHTTPRequestHandler):
    """Another site on this machine."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<title>foreign</title>")

    def log_message(self, *_: Any) -> None:
        pass


OPENED = """(address) => new Promise((done) => {
  const socket = new WebSocket(address);
  socket.onopen = () => done("opened");
  socket.onerror = () => done("refused");
})"""
FRAMED = """(address) => new Promise((done) => {
  const frame = document.createElement("iframe");
  frame.onload = done;
  frame.src = address;
  document.body.append(frame);
})"""


def test_another_site_can_neither_drive_it_nor_hold_it_in_a_frame(there: Running, visit: Visit) -> None:
    """Though it is on the same machine, and the browser would send cookies along."""
    site = HTTPServer(("127.0.0.1", 0), Foreign)
    answering = threading.Thread(target=site.serve_forever)
    answering.start()
    try:
        page = visit.open(there.url)
        query = f"EIO=4&transport=websocket&client_id={page.evaluate('window.clientId')}"
        address = f"{there.url.replace('http', 'ws')}/ui/_nicegui_ws/socket.io/?{query}"
        other = visit.context.new_page()
        other.goto(f"http://127.0.0.1:{site.server_port}/")
        assert other.evaluate(OPENED, address) == "refused"
        other.evaluate(FRAMED, f"{there.url}/ui/")
        assert not any("lorakit" in frame.title() for frame in other.frames[1:])
    finally:
        site.shutdown()
        site.server_close()
        answering.join()


def test_a_run_of_ten_thousand_checkpoints_is_drawn_thinned_and_a_page_at_a_time(there: Running, visit: Visit) -> None:
    async def grow() -> None:
        run = there.served.reconciler.runs["sql"]
        first = next(iter(run.revisions.values()))
        for number in range(10_000):
            facts = replace(first.facts, step=1000 + number, eval_loss=2.0, eval_step=1000 + number)
            made = replace(first, id=100_000 + number, digest=f"{number:064x}", facts=facts, source="")
            run.revisions[made.id] = made
            run.finishes.append(Finish(made.id, 1))

    there.do(grow())
    page = visit.open(there.url, "/ui/runs/sql")
    page.get_by_text("1–25 of 10\u202f003").wait_for()
    page.locator(".chart canvas").first.wait_for()
    assert page.get_by_role("group", name="Revisions").get_by_role("row").count() == 26
    page.get_by_role("button", name="Older").click()
    page.get_by_text("26–50 of 10\u202f003").wait_for()
    told = httpx.get(f"{there.url}/v1/adapters/sql/losses?points=400").json()
    assert len(told["checkpoints"]) == 400
    assert len(httpx.get(f"{there.url}/v1/adapters?revisions=12").content) < 50_000


@pytest.mark.slow
def test_the_page_of_a_run_that_is_gone_says_so(tmp_path: Path, there: Running, visit: Visit) -> None:
    page = visit.open(there.url, "/ui/runs/chat")
    page.get_by_role("region", name="Revisions").wait_for()
    shutil.rmtree(tmp_path / "runs" / "chat")
    assert httpx.delete(f"{there.url}/v1/adapters/chat").status_code == 200
    page.get_by_text("There is no adapter of this name").wait_for()
