"""Names of runs, adapters, aliases and revisions, and what a `model` in a request asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lorakit.errors import Refused

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
RESERVED = frozenset({"latest", "best", "final", "mix"})
_STEP = re.compile(r"step-(\d{1,18})(?:-([0-9a-f]{4,64}))?")
_FINAL = re.compile(r"final(?:-([0-9a-f]{4,64}))?")
_DIGEST = re.compile(r"[0-9a-f]{4,64}")


def check_name(name: str, base: str | None = None) -> None:
    """Raises Refused when `name` can't be the name of a run or an adapter."""
    if not _NAME.fullmatch(name):
        raise Refused(
            f"'{name}' can't be a name: letters, digits, '.', '_' and '-' alone, the first a letter or digit, "
            f"128 at most; rename the folder",
            cause="name",
        )
    if name in RESERVED or name == base:
        raise Refused(f"the name '{name}' is reserved; rename the folder", cause="name")


def check_alias(alias: str) -> None:
    """Raises Refused when `alias` can't be one that a person sets."""
    check_name(alias)
    if _STEP.fullmatch(alias) or _FINAL.fullmatch(alias) or _DIGEST.fullmatch(alias):
        raise Refused(f"the alias '{alias}' would read as a step or a digest; choose another word")


def model_name(run: str, alias: str) -> str:
    """What a request asks for to get what an alias means: `sql@best`; for the default one, which is empty, `sql`."""
    return f"{run}@{alias}" if alias else run


@dataclass(frozen=True, slots=True)
class Selector:
    """What follows the `@`: at most one of the fields is set, none for the default alias."""

    alias: str | None = None
    step: int | None = None
    final: bool = False
    digest: str | None = None


def parse_selector(text: str) -> Selector:
    """`step-500`, `step-500-3fa9c1d2`, `final-3fa9c1d2`, `3fa9c1d2`; anything else is an alias."""
    if match := _STEP.fullmatch(text):
        return Selector(step=int(match[1]), digest=match[2])
    if (match := _FINAL.fullmatch(text)) and match[1]:
        return Selector(final=True, digest=match[1])
    if _DIGEST.fullmatch(text):
        return Selector(digest=text)
    return Selector(alias=text)


def split_model(model: str) -> tuple[str, str | None]:
    """`sql@best` is ("sql", "best"), `sql` is ("sql", None)."""
    name, separator, rest = model.partition("@")
    return name, rest if separator else None


def revision_name(run: str, label: str, digest: str) -> str:
    """`sql@step-500-3fa9c1d2`; without a label `chat@3fa9c1d2`."""
    return f"{run}@{label}-{digest[:8]}" if label else f"{run}@{digest[:8]}"
