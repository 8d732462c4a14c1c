"""A key that was typed in: found by its cookie, until its visitor leaves, or stays away."""

from __future__ import annotations

from typing import Any

import pytest

from lorakit.server.page import sessions
from lorakit.server.page.sessions import Sessions, cookie


def asking(id: str, **more: Any) -> dict[str, Any]:
    return {"headers": [(b"cookie", f"other=1; lorakit_page={id}".encode())], **more}


def test_a_visitor_is_known_by_a_cookie_that_says_nothing_of_the_key() -> None:
    known = Sessions()
    id = known.begin("lk-secret")
    found = known.find(asking(id))
    assert found is not None
    assert found.key == "lk-secret"
    assert "lk-secret" not in id + repr(found) + cookie(id, {"scheme": "http"})
    assert known.find(asking("another")) is None
    assert known.find({"headers": []}) is None
    assert known.find({"headers": [(b"cookie", b"\xff\xfe=;;=")]}) is None


def test_whoever_leaves_takes_the_key_away_from_what_is_still_open() -> None:
    known = Sessions()
    id = known.begin("lk-secret")
    open_page = known.find(asking(id))
    assert open_page is not None
    known.end(asking(id))
    assert open_page.over
    assert open_page.key == ""
    assert known.find(asking(id)) is None


def test_a_visitor_who_stays_away_has_to_type_the_key_in_again(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Sessions()
    id = known.begin("lk-secret")
    monkeypatch.setattr(sessions, "IDLE", -1.0)
    assert known.find(asking(id)) is None


def test_visitors_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MOST", 2)
    known = Sessions()
    ids = [known.begin(f"key-{number}") for number in range(3)]
    assert [known.find(asking(id)) is not None for id in ids] == [False, True, True]


def test_a_cookie_is_for_this_page_alone_and_for_no_script() -> None:
    given = cookie("abc", {"scheme": "https"})
    assert given == "lorakit_page=abc; Path=/ui; HttpOnly; SameSite=Lax; Secure"
    assert "Secure" not in cookie("abc", {"scheme": "http"})
    assert "Max-Age=0" in cookie("", {"scheme": "http"})
