"""What several servers tell in Prometheus' text format, as one text: each sample with a label that says whose it is."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SAMPLE = re.compile(rb"([a-zA-Z_:][a-zA-Z0-9_:]*)(\{)?(.*)", re.S)
_COMMENT = re.compile(rb"# (?:HELP|TYPE) (\S+)")


def joined(texts: Mapping[str, bytes], label: str) -> bytes:
    """One text of all: the samples of a family stand together, as the format asks, and its comments once."""
    families: dict[bytes, tuple[list[bytes], list[bytes]]] = {}
    for whose, text in texts.items():
        said = b'%b="%b"' % (label.encode(), _escaped(whose).encode())
        family = b""
        comments_of: set[bytes] = set()
        for line in text.splitlines():
            if (comment := _COMMENT.match(line)) is not None:
                family = comment[1]
                if family not in families or family in comments_of:
                    families.setdefault(family, ([], []))[0].append(line)
                    comments_of.add(family)
            elif line and not line.startswith(b"#"):
                families.setdefault(family, ([], []))[1].append(_labelled(line, said))
    return b"".join(b"%b\n" % line for comments, samples in families.values() for line in (*comments, *samples))


def _labelled(line: bytes, said: bytes) -> bytes:
    match = _SAMPLE.match(line)
    if match is None:
        return line
    name, opens, rest = match.groups()
    if opens is None:
        return b"%b{%b}%b" % (name, said, rest)
    return b"%b{%b%b%b" % (name, said, b"" if rest.startswith(b"}") else b",", rest)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
