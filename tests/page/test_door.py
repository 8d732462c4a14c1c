"""The way in to the page, asked as a browser would, and as no browser does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import httpx
import pytest
from nicegui import Client

from lorakit.server.page import door, stage
from lorakit.store.keys import Allowance, KeyStore
from tests.server.fake_engine import Served, put_checkpoint, serving

pytestmark = pytest.mark.anyio

SCREENS = ("/ui/", "/ui/runs/sql", "/ui/traffic", "/ui/playground", "/ui/compare", "/ui/lineage", "/ui/events")


def new_key(home: Path) -> str:
    keys = KeyStore(home)
    try:
        return keys.create(Allowance())[0]
    finally:
        keys.close()


async def sign_in(served: Served, key: str, **headers: str) -> httpx.Response:
    return await served.client.post("/ui/key", data={"key": key}, headers={"host": "lorakit", **headers})


async def socket(served: Served, id: str, **headers: str) -> dict[str, Any]:
    """What a websocket to the page is told first."""
    sent: list[dict[str, Any]] = []
    given = iter([{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1000}])

    async def receive() -> Any:
        return next(given)

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {
        "type": "websocket", "path": "/ui/_nicegui_ws/socket.io/", "raw_path": b"", "scheme": "ws", "root_path": "",
        "query_string": f"EIO=4&transport=websocket&client_id={id}&implicit_handshake=true".encode(),
        "headers": [(b"host", b"lorakit"), (b"connection", b"Upgrade"), (b"upgrade", b"websocket"), *raw],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "subprotocols": [],
    }  # fmt: skip
    await served.gateway(scope, receive, send)
    return sent[0]


def client_id(page: str) -> str:
    found = re.search(r'"client_id": ?"([0-9a-f-]{36})"|\'client_id\': ?\'([0-9a-f-]{36})\'', page)
    assert found, page[-2000:]
    return found[1] or found[2]


async def test_every_answer_has_its_guards_and_every_script_its_nonce(tmp_path: Path, base: Path) -> None:
    async with serving(tmp_path, base) as served:
        for path in (*SCREENS, "/ui/no/such/screen", "/ui/static/page.js"):
            answer = await served.client.get(path)
            assert answer.headers["x-frame-options"] == "DENY"
            assert answer.headers["x-content-type-options"] == "nosniff"
            policy = answer.headers["content-security-policy"]
            assert "frame-ancestors 'none'" in policy
            assert "access-control-allow-origin" not in answer.headers
            if path.startswith("/ui/static"):
                continue
            (nonce,) = re.findall("'nonce-([^']+)'", policy)
            scripts = re.findall("<script[^>]*>", answer.text)
            assert len(scripts) > 5
            assert all(f'nonce="{nonce}"' in script for script in scripts)
            assert answer.headers["cache-control"] == "no-store"
            assert not re.search(r'(?:src|href|url\()\s*=?\s*["\']?(?:https?:)?//', answer.text)


async def test_where_nicegui_is_not_there_is_said_what_to_install(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(door, "find_spec", lambda name: None)
    monkeypatch.setattr(door, "version", missing)
    door._version.cache_clear()
    async with serving(tmp_path, base) as served:
        for path in ("/ui/", "/ui/_nicegui/3.18.0/static/nicegui.js"):
            answer = await served.client.get(path)
            assert answer.status_code == 404
            assert "pip install 'lorakit[ui]'" in answer.json()["error"]["message"]
        assert (await socket(served, "x"))["type"] == "websocket.close"


async def test_a_server_with_keys_shows_a_form_and_nothing_else(tmp_path: Path, base: Path) -> None:
    new_key(tmp_path / "home")
    async with serving(tmp_path, base) as served:
        for path in (*SCREENS, "/ui/no/such/screen", "/ui/runs/nobody"):
            answer = await served.client.get(path)
            assert answer.status_code == 401
            assert "lorakit key create" in answer.text
            assert "client_id" not in answer.text
        refused = await socket(served, "")
        assert (refused["type"], refused["code"]) == ("websocket.close", 1008)


async def test_a_key_lets_its_visitor_in_and_another_visitor_not(tmp_path: Path, base: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    key, other = new_key(tmp_path / "home"), new_key(tmp_path / "home")
    async with serving(tmp_path, base) as served:
        assert (await sign_in(served, "wrong")).status_code == 401
        entered = await sign_in(served, key)
        assert (entered.status_code, entered.headers["location"]) == (303, "/ui/")
        assert key not in str(entered.headers)
        page = await served.client.get("/ui/")
        assert page.status_code == 200
        assert key not in page.text
        mine, id = served.client.cookies["lorakit_page"], client_id(page.text)
        assert (await socket(served, id))["type"] == "websocket.close", "without the cookie"
        served.client.cookies.clear()
        await sign_in(served, other)
        theirs = served.client.cookies["lorakit_page"]
        assert (await socket(served, id, cookie=f"lorakit_page={theirs}"))["code"] == 1008, "it is another's page"
        assert (await socket(served, id, cookie=f"lorakit_page={mine}"))["type"] == "websocket.accept"
        left = await served.client.post("/ui/leave")
        assert left.status_code == 303
        assert (await served.client.get("/ui/")).status_code == 401


async def test_a_key_that_is_revoked_is_asked_for_anew(tmp_path: Path, base: Path) -> None:
    keys = KeyStore(tmp_path / "home")
    key, kept = keys.create(Allowance())
    async with serving(tmp_path, base) as served:
        await sign_in(served, key)
        assert (await served.client.get("/ui/")).status_code == 200
        keys.revoke(kept.id)
        keys.close()

        async def out() -> bool:
            return (await served.client.get("/ui/")).status_code == 401

        await served.until(out)


async def test_another_site_can_neither_sign_in_nor_out_nor_listen(tmp_path: Path, base: Path) -> None:
    key = new_key(tmp_path / "home")
    async with serving(tmp_path, base) as served:
        for foreign in ({"origin": "https://evil"}, {"sec-fetch-site": "cross-site"}, {"origin": "null"}):
            assert (await sign_in(served, key, **foreign)).status_code == 403
        await sign_in(served, key, origin="http://lorakit")
        mine, id = served.client.cookies["lorakit_page"], client_id((await served.client.get("/ui/")).text)
        assert (await served.client.post("/ui/leave", headers={"origin": "https://evil"})).status_code == 403
        for foreign in ({"origin": "https://evil"}, {"origin": "http://lorakit:81"}, {"sec_fetch_site": "same-site"}):
            told = await socket(served, id, cookie=f"lorakit_page={mine}", **foreign)
            assert (told["type"], told["code"]) == ("websocket.close", 1008)
        told = await socket(served, id, cookie=f"lorakit_page={mine}", origin="http://lorakit")
        assert told["type"] == "websocket.accept"


async def test_without_keys_another_site_can_not_listen_either(tmp_path: Path, base: Path) -> None:
    async with serving(tmp_path, base) as served:
        id = client_id((await served.client.get("/ui/")).text)
        assert (await socket(served, id, origin="https://evil"))["code"] == 1008
        assert (await socket(served, id, origin="http://lorakit"))["type"] == "websocket.accept"


async def test_the_page_is_looked_at_and_its_socket_takes_no_plain_requests(tmp_path: Path, base: Path) -> None:
    async with serving(tmp_path, base) as served:
        assert (await served.client.get("/ui")).headers["location"] == "/ui/"
        for method in ("PUT", "DELETE", "PATCH", "POST", "OPTIONS"):
            assert (await served.client.request(method, "/ui/")).status_code == 405
        assert (await served.client.get("/ui/_nicegui_ws/socket.io/?EIO=4&transport=polling")).status_code == 400
        others = ("../door.py", "%2e%2e/door.py", "..%2fdoor.py", "nothing.css", "")
        for name, status in {**dict.fromkeys(others, 404), "page.css/": 200}.items():
            answer = await served.client.get(f"/ui/static/{name}")
            assert answer.status_code == status
            assert "find_spec" not in answer.text


async def test_paths_of_the_framework_that_are_no_files_are_for_visitors_alone(tmp_path: Path, base: Path) -> None:
    new_key(tmp_path / "home")
    async with serving(tmp_path, base) as served:
        for path in ("", "x", "3.18.0/", "3.18.0/nothing", "auto/static/x/y", "client/x", "../v1/models"):
            assert (await served.client.get(f"/ui/_nicegui/{path}")).status_code == 401
        for path in ("3.18.0/static/nothing.js", "3.18.0/libraries/nothing", "3.18.0/resources/x/../../../nicegui.py"):
            assert (await served.client.get(f"/ui/_nicegui/{path}")).status_code in (401, 404)
        assert not Client.instances


async def test_so_many_pages_may_be_open_and_no_more(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "MOST", 2)
    async with serving(tmp_path, base) as served:
        assert [(await served.client.get("/ui/events")).status_code for _ in range(3)] == [200, 200, 503]
        assert (await served.client.get("/v1/models")).status_code == 200


async def test_a_folder_whose_name_is_no_text_is_shown_all_the_same(tmp_path: Path, base: Path) -> None:
    (tmp_path / "runs").mkdir()
    put_checkpoint(Path(os.fsdecode(os.fsencode(tmp_path / "runs") + b"/bad\xff")), 100)
    async with serving(tmp_path, base) as served:
        for path in ("/ui/", "/ui/lineage", "/ui/events", "/ui/compare", "/ui/playground", "/ui/runs/bad%FF"):
            page = await served.client.get(path)
            assert page.status_code == 200
        assert "bad?" in (await served.client.get("/ui/")).text


async def test_a_name_is_text_whatever_is_in_it(tmp_path: Path, base: Path) -> None:
    async with serving(tmp_path, base) as served:
        for name in ("<script>alert(1)</script>", "`${alert(1)}`", "</textarea><img src=x onerror=alert(1)>"):
            for path in (f"/ui/runs/{name}", f"/ui/playground?ask={name}"):
                page = (await served.client.get(path)).text.partition("</title>")[2]
                assert "<script>alert" not in page
                assert "<img" not in page
                assert "`${alert" not in page


def test_nothing_of_nicegui_is_imported_before_the_first_visit() -> None:
    program = "import sys, lorakit.server.gateway, lorakit.server.routes; assert 'nicegui' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
