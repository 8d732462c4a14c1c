"""`lorakit.verify`: plan a merge once more, compute every tensor again, and compare with what is on disk."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lorakit.adapters.adapter import Adapter
from lorakit.merge.base import BaseModel, read_base
from lorakit.merge.compare import same_files
from lorakit.merge.execute import Progress
from lorakit.merge.lineage import Lineage, read_lineage
from lorakit.merge.merge import Weighted, companions_of
from lorakit.merge.output import write_beside
from lorakit.merge.plan import MergePlan
from lorakit.merge.report import MergeReport

if TYPE_CHECKING:
    from lorakit.merge.recompute import TensorResult


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Whether a folder holds what merging its sources gives.

    `equal`: the number of tensors that are, bit for bit. `wrong` aren't; `close` differ in last bits that other
    hardware explains. `files`: what stands beside the weights and is not as the merge writes it. `spot_checked`: rows
    that were compared with float64. `adapters`: by folder, whether it is the one that was merged.
    """

    out: Path
    device: str
    equal: int
    results: tuple[TensorResult, ...]
    files: tuple[str, ...]
    spot_checked: int
    adapters: Mapping[str, bool] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    nbytes: int = 0
    seconds: float = 0.0

    @property
    def close(self) -> tuple[TensorResult, ...]:
        return tuple(result for result in self.results if result.state == "close")

    @property
    def wrong(self) -> tuple[TensorResult, ...]:
        return tuple(result for result in self.results if result.state != "close")

    @property
    def ok(self) -> bool:
        """No tensor is wrong, none is missing or too many, and what stands beside them is the same."""
        return not self.wrong and not self.files

    def as_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "ok": self.ok,
            "device": self.device,
            "equal": self.equal,
            "wrong": [result.as_dict() for result in self.wrong],
            "close": [result.as_dict() for result in self.close],
            "files": list(self.files),
            "spot_checked_rows": self.spot_checked,
            "adapters_as_merged": dict(self.adapters),
            "notes": list(self.notes),
            "bytes": self.nbytes,
            "seconds": round(self.seconds, 3),
        }


def verify(
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    adapters: Weighted | Sequence[Weighted] | None = None,
    *,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Merge again, in blocks, and compare with the folder: every tensor, config, index and companion. Writes nothing.

    Args:
        out: What `lorakit merge` wrote.
        base: The base; None for the one that `lorakit.json` names.
        adapters: As for `merge`; None for those that `lorakit.json` names.
        device: "auto" is the kind that merged, where this machine has it.
        workers: How many threads; None for one a core.
        progress: Called with (bytes compared, bytes in all), from several threads, one at a time.

    Raises:
        NotFound: `out`, its lorakit.json or a source isn't there.
        Refused: `out` is no merge, or a file can't be read.
        Conflict: a source was written again meanwhile.
    """
    begun = time.monotonic()
    lineage = read_lineage(Path(out))
    found = read_base(lineage.folder)
    model, opened = lineage.open_base(base), lineage.open_adapters(adapters)
    plan = lineage.plan(model, opened)
    from lorakit.merge.blocks import arithmetic
    from lorakit.merge.recompute import recompute

    device = _device(device, lineage)
    done = recompute(plan, found, lineage.settings, device=device, workers=workers, progress=progress)
    files = (*_other_files(lineage, plan, opened), *_other_layout(plan, found))
    same = lineage.same_adapters(opened)
    notes = tuple(_notes(lineage, model, same, arithmetic(device)))
    found.ensure_unchanged()
    model.ensure_unchanged()
    for adapter in opened:
        adapter.ensure_unchanged()
    return VerifyReport(
        lineage.folder, device, done.equal, done.results, files, done.spot_checked, same, notes, plan.nbytes,
        time.monotonic() - begun,
    )  # fmt: skip


def _device(wanted: str, lineage: Lineage) -> str:
    import torch

    from lorakit.merge.blocks import usable_device

    if wanted != "auto":
        return usable_device(wanted)
    on_gpu = str(lineage.settings.get("device", "")).startswith("cuda")
    return "cuda" if on_gpu and torch.cuda.is_available() else "cpu"


def _other_files(lineage: Lineage, plan: MergePlan, adapters: Sequence[Adapter]) -> Iterator[str]:
    """Config, index and companions that are not as the merge writes them; all of them are small."""
    companions = companions_of(plan.base, adapters, lineage.settings.get("onto"))
    report = MergeReport(lineage.folder, plan, tuple(adapters), companions, "cpu", dry_run=False)
    with TemporaryDirectory(prefix="lorakit-verify-") as place:
        write_beside(report, Path(place))
        for file in sorted(path for path in Path(place).rglob("*") if path.is_file()):
            name = file.relative_to(place)
            if not (lineage.folder / name).is_file():
                yield f"{name} is missing"
            elif not same_files(file, lineage.folder / name):
                yield f"{name} is different"


def _other_layout(plan: MergePlan, found: BaseModel) -> Iterator[str]:
    """Shards whose heads aren't as planned: other tensors, another order, other metadata."""
    heads = {shard.name: shard.head for shard in plan.shards}
    for shard in found.shards:
        with shard.file.open("rb") as stream:
            if heads.get(shard.file.name) != stream.read(shard.data_start):
                yield f"{shard.file.name} has another head"


def _notes(lineage: Lineage, base: BaseModel, same: Mapping[str, bool], now: str) -> Iterator[str]:
    then = lineage.settings.get("arithmetic")
    if then is not None and then != now:
        yield f"merged with {then}; compared with {now}: last bits of sums may differ"
    if lineage.same_base(base) is False:
        yield f"base '{base.folder}' is not the one that was merged into"
    for folder, is_same in same.items():
        if not is_same:
            yield f"adapter '{folder}' is not one that was merged with that weight: its file or its weight is another"
