"""An address as it may be printed and stored: without what may be secret in it."""

from __future__ import annotations

import re

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/+")
_USER = re.compile(r"[^/@]*:[^/@]*@")  # a name of a checkpoint may have an @, and has no colon before it


def without_secrets(address: str) -> str:
    """Without user, password, query and fragment; of what is no whole address, be it a path, without the same.

    A password may hold what begins a path or a query elsewhere: then only what stands behind it is left.
    """
    scheme = _SCHEME.match(address)
    rest = address[scheme.end() :] if scheme else address
    known = scheme is not None and scheme[0].endswith("://")
    place, _, query = _split(rest, "?#" if known else "?")
    host, slash, path = place.partition("/")
    looks_like_user = scheme is not None and ":" in host and "@" not in host
    if scheme is None:
        shown = _USER.sub("", place, count=1)
    elif looks_like_user and "@" in path:
        shown = f"…@{path.rpartition('@')[2]}"
    elif looks_like_user and "@" in query and not slash:
        shown = "…"
    else:
        shown = host.rpartition("@")[2] + slash + path
    begins = scheme[0].lower() if scheme else ""
    return "".join(letter if letter.isprintable() else "�" for letter in begins + shown)


def without_queries(text: str) -> str:
    """A message of somebody else's, in which an address may stand anywhere."""
    return re.sub(r"\?[^\s'\"]+", "?…", re.sub(r"://[^\s/'\"@]+@", "://", text))


def _split(text: str, separators: str) -> tuple[str, str, str]:
    found = re.search(f"[{separators}]", text)
    return (text[: found.start()], found[0], text[found.end() :]) if found else (text, "", "")
