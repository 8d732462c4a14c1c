"""Who may drive the page: itself."""

from __future__ import annotations

from typing import Any

import pytest

from lorakit.server.page.origin import is_from_here, is_same, policy


@pytest.mark.parametrize(
    ("origin", "host", "same"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1:8000", True),
        ("https://lora.example", "lora.example", True),
        ("https://lora.example", "lora.example:443", True),
        ("http://lora.example:80", "lora.example", True),
        ("https://LORA.example", "lora.example", True),
        ("http://[::1]:8000", "[::1]:8000", True),
        ("http://127.0.0.1:8001", "127.0.0.1:8000", False),
        ("http://localhost:8000", "127.0.0.1:8000", False),
        ("https://lora.example.evil", "lora.example", False),
        ("https://evil/lora.example", "lora.example", False),
        ("https://lora.example@evil", "lora.example", False),
        ("http://lora.example:99999999", "lora.example", False),
        ("null", "lora.example", False),
        ("null", "", False),
        ("file://", "", False),
    ],
)
def test_an_origin_is_the_pages_own_where_host_and_port_are(origin: str, host: str, same: bool) -> None:
    assert is_same(origin, host) is same


def scope(**headers: str) -> dict[str, Any]:
    return {"headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]}


def test_what_a_browser_knows_of_its_site_counts_more_than_an_origin() -> None:
    assert is_from_here(scope(sec_fetch_site="same-origin", origin="https://behind.a.proxy", host="inside:8000"))
    assert not is_from_here(scope(sec_fetch_site="cross-site", host="inside:8000"))
    assert not is_from_here(scope(sec_fetch_site="same-site", origin="http://inside:8000", host="inside:8000"))
    assert not is_from_here(scope(origin="https://elsewhere", host="inside:8000"))
    assert is_from_here(scope(host="inside:8000")), "no browser"


def test_the_policy_lets_nothing_in_from_elsewhere_and_nobody_frame_it() -> None:
    rules = dict(rule.strip().split(" ", 1) for rule in policy("abc").decode().split(";"))
    assert rules["default-src"] == rules["frame-ancestors"] == rules["base-uri"] == "'none'"
    assert rules["script-src"] == "'self' 'nonce-abc' 'unsafe-eval'"
    assert "http" not in policy("abc").decode()
