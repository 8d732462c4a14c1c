"""What a server was told: one typed object, from flags or `LORAKIT_*`, that the supervisor hands to the gateway."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from lorakit.checkpoints.finished import QUIET
from lorakit.errors import UsageError
from lorakit.store.store import default_home

Follow = Literal["latest", "best", "manual"]
FOLLOWS: tuple[Follow, ...] = ("latest", "best", "manual")

VARIABLE = "LORAKIT_SERVE"  # the whole object as JSON, from the supervisor
# What a person who starts vLLM by hand may set instead, one at a time.
SINGLE = {
    "LORAKIT_WATCH": "watch",
    "LORAKIT_ADAPTERS": "adapters",
    "LORAKIT_ROOTS": "roots",
    "LORAKIT_FOLLOW": "follow",
    "LORAKIT_HOME": "home",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Paths are absolute; `adapters` maps names to folders; 0 slots means: as many as the engine has."""

    home: str = ""
    watch: tuple[str, ...] = ()
    adapters: Mapping[str, str] = field(default_factory=dict)
    roots: tuple[str, ...] = ()
    follow: Follow = "latest"
    max_loras: int = 0
    poll: float = 0.5  # seconds between two looks at the watched folders
    quiet: float = QUIET  # seconds that a folder without its writer's last file has to stay as it is
    load_wait: float = 60.0  # seconds that a request waits for a slot in the engine
    drain: float = 10.0  # seconds that requests in flight have when the server ends

    @property
    def store_home(self) -> Path:
        return Path(self.home) if self.home else default_home()

    @property
    def allowed_roots(self) -> tuple[Path, ...]:
        """Where adapters may be loaded from over HTTP."""
        return tuple(Path(folder).resolve() for folder in (*self.watch, *self.roots, *self.adapters.values()))

    def as_environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}


def from_environment(environ: Mapping[str, str] = os.environ) -> Settings:
    """The supervisor's object, or what single `LORAKIT_*` variables say.

    Raises:
        UsageError: a variable can't be read, or has a value that does not exist.
    """
    if text := environ.get(VARIABLE):
        try:
            given = json.loads(text)
        except ValueError as error:
            raise UsageError(f"{VARIABLE} can't be read: {error}") from None
        if not isinstance(given, dict):
            raise UsageError(f"{VARIABLE} has to be a JSON object, and is {text[:40]}")
        return from_mapping(given)
    given = {}
    for variable, name in SINGLE.items():
        if not (value := environ.get(variable)):
            continue
        if name in ("watch", "roots"):
            given[name] = [str(Path(part).absolute()) for part in value.split(os.pathsep) if part]
        elif name == "adapters":
            given[name] = dict(named_path(part) for part in value.split(os.pathsep) if part)
        else:
            given[name] = value
    return from_mapping(given)


def from_mapping(given: Mapping[str, Any]) -> Settings:
    """Settings from plain data; an unknown key is an error that offers the nearest known one."""
    known = [entry.name for entry in fields(Settings)]
    for key in given:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            raise UsageError(f"unknown setting '{key}'" + (f"; did you mean '{near[0]}'?" if near else ""))
    values = dict(given)
    for name in ("watch", "roots"):
        values[name] = tuple(values.get(name, ()))
    if values.get("follow", "latest") not in FOLLOWS:
        raise UsageError(f"follow is '{values['follow']}', and has to be one of {', '.join(FOLLOWS)}")
    return Settings(**values)


def named_path(text: str) -> tuple[str, str]:
    """`sql=runs/sql` as a name and an absolute path.

    Raises:
        UsageError: there is no `=`.
    """
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise UsageError(f"'{text}' has to be NAME=PATH")
    return name, str(Path(path).absolute())
