"""What is said of `serving/` is said of what is there."""

from __future__ import annotations

import re

from tests.readme import ROOT, blocks
from tests.serving.programs import SERVING

PAGE = (SERVING / "README.md").read_text(encoding="utf-8")


def test_the_table_has_a_row_for_each_thing_that_is_there() -> None:
    rows = "".join(line for line in PAGE.splitlines(keepends=True) if line.startswith("| `"))
    named = {name.partition("/")[0] for name in re.findall(r"`([\w./-]+)`", rows)}
    assert named >= {path.name for path in SERVING.iterdir()} - {"README.md"}


def test_what_is_named_anywhere_is_there() -> None:
    texts = [path.read_text(encoding="utf-8") for path in SERVING.rglob("*") if path.is_file()]
    texts.append((ROOT / "docs" / "howto" / "deploying.md").read_text(encoding="utf-8"))
    named = {name for text in texts for name in re.findall(r"\bserving/[\w./-]*\w", text)}
    assert len(named) > 5
    assert not [name for name in named if not (ROOT / name).exists()]


def test_each_way_takes_five_lines_at_most() -> None:
    assert all(len(block.splitlines()) <= 5 for block in blocks("sh", PAGE))
