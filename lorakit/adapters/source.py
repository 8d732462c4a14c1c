"""Where an adapter came from: folders with weights, and what was done to them on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.adapters.config import AdapterConfig
from lorakit.adapters.report import MixReport
from lorakit.errors import Conflict
from lorakit.files.digests import file_digest
from lorakit.files.folders import FileState, file_state


@dataclass(frozen=True, slots=True)
class Source:
    """A folder that an adapter was read from, and the weight it was given in a sum.

    `parts` says in words where not all of its modules were taken with that weight.
    """

    folder: Path
    config: AdapterConfig
    file: Path
    state: FileState
    weight: float = 1.0
    parts: tuple[str, ...] = ()

    @property
    def key(self) -> Any:
        """Equal for sources that differ in their weight alone."""
        return self.folder, self.file, self.state, str(dict(self.config.raw)), self.parts

    def files(self) -> Iterator[Source]:
        yield self

    def ensure_unchanged(self) -> None:
        """Raises Conflict when the file was written again since its header was read."""
        if file_state(self.file) != self.state:
            raise Conflict(f"'{self.file}' was written again while it was read: start anew when its writer is done")

    def as_parent(self) -> dict[str, Any]:
        """What lorakit.json says of it."""
        parent: dict[str, Any] = {"path": str(self.folder), "sha256": file_digest(self.file), "weight": self.weight}
        return parent | ({"parts": list(self.parts)} if self.parts else {})


@dataclass(frozen=True, slots=True)
class Stage:
    """What was computed from other sources, and was given a weight itself, as `Source`."""

    operation: str
    settings: Mapping[str, Any] = field(hash=False)
    sources: tuple[Source | Stage, ...]
    weight: float = 1.0
    parts: tuple[str, ...] = ()
    reported: Callable[[], MixReport] | None = field(default=None, compare=False, repr=False)

    @property
    def folder(self) -> Path:
        return self.sources[0].folder

    @property
    def config(self) -> AdapterConfig:
        return self.sources[0].config

    @property
    def key(self) -> Any:
        made_of = tuple((source.key, source.weight) for source in self.sources)
        return self.operation, str(dict(self.settings)), made_of, self.parts

    def files(self) -> Iterator[Source]:
        for source in self.sources:
            yield from source.files()

    def ensure_unchanged(self) -> None:
        for source in self.sources:
            source.ensure_unchanged()

    def as_parent(self) -> dict[str, Any]:
        parent: dict[str, Any] = {
            "operation": self.operation, "settings": dict(self.settings), "weight": self.weight,
            "parents": [source.as_parent() for source in self.sources],
        }  # fmt: skip
        if self.reported is not None:
            parent["truncation_error"] = self.reported().truncation_error
        return parent | ({"parts": list(self.parts)} if self.parts else {})
