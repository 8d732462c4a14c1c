"""What one check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`what` there is; `why` that matters, and the `cure`, where something is to be done."""

    name: str
    state: State
    what: str
    why: str = ""
    cure: str = ""
