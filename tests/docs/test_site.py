"""`make docs`: the site is whole, and nothing in it is loaded from elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.docs.pages import PAGES
from tests.readme import ROOT

BUILDER = ROOT / ".venv" / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built strictly: a link that leads nowhere, a place in a page that is not there, and a page that nothing leads to
    are errors."""
    if not BUILDER.is_dir():
        pytest.skip("make docs lays what builds the site into .venv/docs")
    folder = tmp_path_factory.mktemp("docs") / "site"
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(BUILDER), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return folder


class Loads(HTMLParser):
    """What a browser fetches for a page by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") in ("canonical", "prev", "next"):
            return
        wanted = given.get("href") if tag == "link" else given.get("src") if tag != "a" else None
        if wanted:
            self.found.append(wanted)


def loads(site: Path) -> Iterator[tuple[Path, str]]:
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # its paths are those of where the site is put
            continue
        parser = Loads()
        parser.feed(page.read_text(encoding="utf-8"))
        yield from ((page, found) for found in parser.found)


def test_every_page_is_in_the_site(site: Path) -> None:
    made = {page.relative_to(site).as_posix() for page in site.rglob("*.html")}
    assert {name.removesuffix(".md") + ".html" for name in PAGES} < made
    assert {f"reference/{name}.html" for name in ("commands", "http", "metrics", "errors", "python")} < made
    assert not list(site.rglob("*.py"))


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    found = list(loads(site))
    assert found
    for page, wanted in found:
        assert not wanted.startswith(("http:", "https:", "//")), (page, wanted)
        assert (page.parent / wanted.partition("?")[0].partition("#")[0]).exists(), (page, wanted)
