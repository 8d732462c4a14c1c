"""What the process in front of several engines is told of them by the supervisor, beside the settings."""

from __future__ import annotations

import json
from collections.abc import Mapping

ENGINES = "LORAKIT_ENGINES"


def engines_told(engines: Mapping[str, str], *, base_path: str, max_rank: int, memory: int) -> dict[str, str]:
    """Variables: the engines' addresses by name, and what they do not say of themselves over HTTP."""
    said = {"engines": dict(engines), "base_path": base_path, "max_rank": max_rank, "memory": memory}
    return {ENGINES: json.dumps(said)}
