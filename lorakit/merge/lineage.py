"""Where a merged model came from, as its `lorakit.json` says, and those sources opened again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.adapters.adapter import Adapter
from lorakit.errors import InvalidFile, NotFound, Refused
from lorakit.files.digests import file_digest
from lorakit.files.folders import read_json
from lorakit.files.provenance import FILE
from lorakit.merge.base import BaseModel, read_base
from lorakit.merge.merge import Weighted, weighted_adapters
from lorakit.merge.plan import MergePlan, plan_merge


@dataclass(frozen=True, slots=True)
class Lineage:
    """What `lorakit.json` in `folder` says of a merge."""

    folder: Path
    base: Mapping[str, Any]
    adapters: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any]

    def open_base(self, given: str | os.PathLike[str] | None = None) -> BaseModel:
        """The base that is given, else the one that was merged into.

        Raises:
            NotFound: it isn't there any more.
        """
        if given is not None:
            return read_base(given)
        path = Path(str(self.base["path"]))
        reference = str(self.base.get("reference", path))
        if "commit" in self.base:
            reference = f"{reference.partition('@')[0]}@{self.base['commit']}"
        try:
            return read_base(path if path.is_dir() else reference)
        except NotFound as error:
            raise NotFound(f"the base that was merged into is gone ({error}): name where it is with --base") from None

    def open_adapters(self, given: Weighted | Sequence[Weighted] | None = None) -> tuple[Adapter, ...]:
        """The adapters that are given, else those that were merged, each with its weight.

        Raises:
            NotFound: one isn't there any more.
        """
        if given is not None:
            return weighted_adapters(given)
        for parent in self.adapters:
            if not Path(str(parent["path"])).is_dir():
                raise NotFound(
                    f"adapter '{parent['path']}', which was merged, is gone: name where it is with --adapter"
                )  # fmt: skip
        return weighted_adapters([(str(parent["path"]), float(parent["weight"])) for parent in self.adapters])

    def plan(self, base: BaseModel, adapters: Sequence[Adapter]) -> MergePlan:
        """The plan of the same merge."""
        settings = self.settings
        return plan_merge(
            base, adapters, dtype=settings.get("dtype", "keep"), strict=settings.get("strict", True),
            expert_layout=settings.get("expert_layout"), max_shard_size=settings.get("max_shard_size"),
            onto=settings.get("onto"), quantise=settings.get("quantize"),
        )  # fmt: skip

    def same_adapters(self, adapters: Sequence[Adapter]) -> dict[str, bool]:
        """By folder, whether an adapter's file and its weight are those that were merged."""
        recorded = {(parent.get("sha256"), parent.get("weight")) for parent in self.adapters}
        return {
            str(source.folder): (file_digest(source.file), source.weight) in recorded
            for adapter in adapters
            for source in adapter.files()
        }

    def same_base(self, base: BaseModel) -> bool | None:
        """None where lorakit.json has nothing to compare with."""
        identity = self.base.get("identity")
        return None if identity is None else bool(base.identity == identity)


def read_lineage(folder: Path) -> Lineage:
    """Where a merged model came from.

    Raises:
        NotFound: there is no such folder, or it holds no lorakit.json.
        Refused: it wasn't written by a merge, or lorakit.json can't be understood.
    """
    if not folder.is_dir():
        raise NotFound(f"there is no folder '{folder}'")
    if not (folder / FILE).is_file():
        raise NotFound(f"'{folder}' has no {FILE}: nothing says what was merged")
    record = read_json(folder / FILE)
    if record.get("operation") != "merge":
        raise Refused(f"'{folder}' was not written by `lorakit merge`, but by `lorakit {record.get('operation')}`")
    parents, settings = record.get("parents"), record.get("settings")
    if not isinstance(parents, list) or not isinstance(settings, dict):
        raise InvalidFile(f"'{folder / FILE}' names no parents, or no settings")
    by_kind: dict[str, list[Mapping[str, Any]]] = {"base": [], "adapter": []}
    for parent in parents:
        if not isinstance(parent, dict) or parent.get("kind") not in by_kind or "path" not in parent:
            raise InvalidFile(f"'{folder / FILE}' names a parent that is neither a base nor an adapter: {parent!r}")
        by_kind[parent["kind"]].append(parent)
    if len(by_kind["base"]) != 1:
        raise InvalidFile(f"'{folder / FILE}' names {len(by_kind['base'])} bases")
    return Lineage(folder, by_kind["base"][0], tuple(by_kind["adapter"]), settings)
