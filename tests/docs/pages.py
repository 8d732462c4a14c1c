"""The pages of docs/, the commands in them, and what they say that those print."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from tests.readme import ROOT, blocks

DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}


@dataclass(frozen=True)
class Shown:
    """A command, and what stands below it; `...` in that is anything."""

    command: str
    output: str

    def is_what(self, printed: str) -> bool:
        """Spaces and ends of lines count as one another."""
        parts = [r"\s+".join(re.escape(word) for word in part.split()) for part in self.output.split("...")]
        return re.fullmatch(r"\s*" + r".*?".join(parts) + r"\s*", printed, re.S) is not None


def sessions(page: str) -> list[Shown]:
    """What a page's `console` blocks show, in order."""
    found = []
    for block in blocks("console", page):
        for entry in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, output = entry.partition("\n")
            found.append(Shown(command, output))
    return found


def command_lines(page: str) -> list[list[str]]:
    """The words of every command of lorakit in a page's blocks."""
    text = "\n".join([*blocks("", page), *blocks("sh", page), *(shown.command for shown in sessions(page))])
    lines = re.findall(r"^(?:\w+=\S* )*(lorakit .*)", text.replace("\\\n", " "), re.M)
    return [shlex.split(line, comments=True) for line in lines]


def named(page: str) -> list[str]:
    """What stands of lorakit between backticks, in the text."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)
    return re.findall(r"`(lorakit [^`]+)`", text)
