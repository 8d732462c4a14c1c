"""A real Chromium for the page, and a server that it looks at."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.page.visit import Visit

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# Nothing of the browser's own goes out, either.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--force-color-profile=srgb",
]  # fmt: skip
LIMIT = 60_000  # milliseconds that anything may take


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base made of numbers alone."""
    from tests.folders import write_base

    return write_base(tmp_path_factory.mktemp("bases") / "numbers")


@pytest.fixture(scope="module")  # as long as it is there, an event loop runs in this thread, and no other can
def chromium() -> Iterator[Any]:
    """A browser; skipped where there is none."""
    pytest.importorskip("nicegui", reason="the page takes NiceGUI: pip install 'lorakit[ui]'")
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright: it drives the browser")
    program = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("there is no Chromium here: make setup-browser, as root, or apt-get install chromium")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Visit]:
    """A new visitor, who sees that nothing is loaded from elsewhere and nothing goes wrong in the browser."""
    context = chromium.new_context(
        viewport={"width": 1280, "height": 900}, color_scheme="light", reduced_motion="reduce"
    )
    context.set_default_timeout(LIMIT)
    visitor = Visit(context)
    yield visitor
    context.close()
    assert not visitor.elsewhere, "a request left for another host"
    assert not visitor.wrong, "the browser complains"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
