"""`lorakit.merge`: a base and adapters in, a model folder out, whole or not at all."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.adapters.adapter import Adapter
from lorakit.errors import InvalidFile, OutOfSpace, UsageError
from lorakit.files.digests import file_digest
from lorakit.files.finite import look_at_numbers
from lorakit.files.folders import free_bytes, refuse_existing, whole_folder, write_json
from lorakit.files.provenance import write_provenance
from lorakit.files.safetensors import read_header
from lorakit.merge.base import INDEX, BaseModel, base_named_by, read_base
from lorakit.merge.companions import Companion, plan_companions, write_config
from lorakit.merge.copies import ensure_equal_copies
from lorakit.merge.execute import Progress, execute
from lorakit.merge.plan import DTYPES, MergePlan, plan_merge
from lorakit.store.locate import open_adapter

AdapterLike = Adapter | str | os.PathLike[str]
Weighted = AdapterLike | tuple[AdapterLike, float]


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was done, or with `dry_run` what would be."""

    out: Path | None
    plan: MergePlan
    adapters: tuple[Adapter, ...]
    companions: tuple[Companion, ...]
    device: str
    dry_run: bool
    seconds: float = 0.0

    @property
    def unplaced(self) -> tuple[str, ...]:
        """Adapter tensors that were left out, each with the reason; only with `strict=False`."""
        return self.plan.unplaced

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for `--json` and `lorakit.json`."""
        changed = [tensor for tensor in self.plan.computed if tensor.terms]
        return {
            "out": None if self.out is None else str(self.out),
            "base": str(self.plan.base.folder),
            "adapters": [
                {"path": str(source.folder), "weight": source.weight, "rank": adapter.rank}
                for adapter in self.adapters
                for source in adapter.sources
            ],
            "dry_run": self.dry_run,
            "device": self.device,
            "dtype": self.plan.dtype,
            "bytes": self.plan.nbytes,
            "seconds": round(self.seconds, 3),
            "tensors": sum(len(shard.target.tensors) for shard in self.plan.shards),
            "merged": [
                {
                    "weight": tensor.target.name,
                    "shard": tensor.source.file.name,
                    "dtype": tensor.target.dtype,
                    "shape": list(tensor.target.shape),
                    "transposed": tensor.transposed,
                    "terms": [
                        {"adapter": str(term.B.file.parent), "rank": term.rank, "factor": term.factor}
                        for term in tensor.terms
                    ],
                }
                for tensor in changed
            ],
            "placements": [
                {"adapter": placed.adapter, "tensor": placed.tensor, "weight": placed.weight, "role": placed.role}
                for placed in self.plan.placements
            ],
            "unplaced": list(self.unplaced),
            "companions": {companion.name: str(companion.source) for companion in self.companions},
        }


def merge(
    base: str | os.PathLike[str] | None,
    adapters: Weighted | Sequence[Weighted],
    *,
    out: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str = "keep",
    strict: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge adapters into a base, streamed: W' = round(W + Σ weight · scale · B A), each weight rounded once.

    Args:
        base: A model folder or a hub id; None for the one that the adapters' configs name.
        adapters: One adapter or several, each alone or as (adapter, weight). The same one twice adds up its weights.
        out: The folder to write. Appears whole or not at all. Only a dry run goes without.
        device: "auto", "cpu", "cuda" or "cuda:<index>".
        dtype: "keep", or "bf16", "fp16", "fp32" for every float tensor.
        strict: Refuse when an adapter's tensor has no place. Otherwise they are left out, and listed in the report.
        dry_run: Check and plan, write nothing.
        progress: Called with (bytes written, bytes in all), from several threads, one at a time.

    Raises:
        UsageError: the arguments contradict each other, no base is named, or there is no such device.
        NotFound: no such base or adapter.
        Refused: a subclass says why: InvalidFile, Incomplete, UnsupportedAdapter, UnplacedTensors, WrongBase.
        Conflict: `out` exists, or a source was written again meanwhile.
        OutOfSpace: the disk is full.
    """
    begun = time.monotonic()
    target = None if out is None else Path(out)
    _check_settings(device, dtype)
    if target is not None:
        refuse_existing(target)
    elif not dry_run:
        raise UsageError("no folder to write is named: give `out`, or ask for a dry run")
    opened = tuple(_weighted(*pair) for pair in _pairs(adapters))
    model = read_base(base if base is not None else base_named_by(opened))
    plan = plan_merge(model, opened, dtype=dtype, strict=strict)
    _ensure_finite(opened)
    ensure_equal_copies(plan.copies)
    folders = [source.folder for adapter in opened for source in adapter.sources]
    report = MergeReport(target, plan, opened, plan_companions(model.folder, folders), device, dry_run)
    if dry_run or target is None:
        return report
    _ensure_space(plan, target)
    with whole_folder(target) as beside:
        report = replace(report, device=execute(plan, beside, device=device, progress=progress))
        _write_companions(report, beside)
        _ensure_unchanged(model, opened)
        report = replace(report, seconds=time.monotonic() - begun)
        _write_provenance(report, beside)
    return replace(report, seconds=time.monotonic() - begun)


def _check_settings(device: str, dtype: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"device '{device}' is none of auto, cpu, cuda, cuda:<index>")
    if dtype != "keep" and dtype not in DTYPES:
        raise UsageError(f"dtype '{dtype}' is none of keep, {', '.join(DTYPES)}")


def _pairs(adapters: Weighted | Sequence[Weighted]) -> list[tuple[AdapterLike, float]]:
    """One adapter, one (adapter, weight), or several of either, as pairs."""
    if isinstance(adapters, Adapter | str | os.PathLike):
        return [(adapters, 1.0)]
    if isinstance(adapters, tuple) and len(adapters) == 2 and isinstance(adapters[1], int | float):
        return [(adapters[0], float(adapters[1]))]
    several: list[Any] = list(adapters)
    if not several:
        raise UsageError("no adapter is named: there is nothing to merge")
    return [item if isinstance(item, tuple) else (item, 1.0) for item in several]


def _weighted(adapter: AdapterLike, weight: float) -> Adapter:
    opened = adapter if isinstance(adapter, Adapter) else open_adapter(os.fspath(adapter))
    return opened if weight == 1 else opened.weighted(float(weight))


def _ensure_finite(adapters: Sequence[Adapter]) -> None:
    for file in dict.fromkeys(source.file for adapter in adapters for source in adapter.sources):
        name = look_at_numbers(read_header(file)).not_finite
        if name:
            raise InvalidFile(f"'{name}' in '{file}' holds NaN or infinity: use an earlier checkpoint")


def _ensure_space(plan: MergePlan, target: Path) -> None:
    free = free_bytes(target)
    if free < plan.nbytes:
        raise OutOfSpace(
            f"'{target}' needs {plan.nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there: "
            f"free some space or name another --out"
        )


def _write_companions(report: MergeReport, folder: Path) -> None:
    base = report.plan.base
    write_config(base.folder, folder, report.plan.dtype)
    for companion in report.companions:
        companion.write(folder)
    if base.index is not None:
        metadata = base.index.get("metadata")
        total = sum(tensor.nbytes for shard in report.plan.shards for tensor in shard.target.tensors.values())
        index = {**base.index, "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}}
        write_json(folder / INDEX, index)


def _ensure_unchanged(base: BaseModel, adapters: Sequence[Adapter]) -> None:
    base.ensure_unchanged()
    for adapter in adapters:
        adapter.ensure_unchanged()


def _write_provenance(report: MergeReport, folder: Path) -> None:
    plan = report.plan
    parents: list[dict[str, Any]] = [{"kind": "base", "path": str(plan.base.folder), "reference": plan.base.reference}]
    for adapter in report.adapters:
        for source in adapter.sources:
            parents.append(
                {
                    "kind": "adapter",
                    "path": str(source.folder),
                    "sha256": file_digest(source.file),
                    "weight": source.weight,
                }
            )
    settings = {"dtype": plan.dtype, "device": report.device, "strict": not report.unplaced}
    write_provenance(folder, "merge", parents, settings, report=report.as_dict())
