"""What a conversion did, or would do: as a value, and as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What was done, or with `dry_run` what would be.

    `format` is what was read; `renamed` names the tensors that have another name in the result, by their old one;
    `left_out` names by the reason what is not in the result. `error` is the measured relative one, where the result is
    not exact. `companions`: the files beside the weights, and where each comes from.
    """

    path: Path
    out: Path | None
    kind: Literal["model", "adapter"]
    format: str
    dry_run: bool = False
    tensors: int = 0
    nbytes: int = 0
    dtype: str = "keep"
    renamed: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    companions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    error: float | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for `--json` and `lorakit.json`."""
        return {
            "path": str(self.path),
            "out": None if self.out is None else str(self.out),
            "kind": self.kind,
            "format": self.format,
            "dry_run": self.dry_run,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "dtype": self.dtype,
            **self.settings,
            "renamed": dict(self.renamed),
            "left_out": {reason: list(names) for reason, names in self.left_out.items()},
            "companions": dict(self.companions),
            "error": self.error,
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
        }
