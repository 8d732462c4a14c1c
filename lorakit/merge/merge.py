"""`lorakit.merge`: a base and adapters in, a model folder out, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit import __version__
from lorakit.adapters.adapter import Adapter
from lorakit.checkpoints.locate import open_adapter
from lorakit.cluster.joining import ensure_installed
from lorakit.errors import InvalidFile, OutOfSpace, UsageError
from lorakit.files.finite import look_at_numbers
from lorakit.files.folders import free_bytes, refuse_existing, sync_tree, whole_folder
from lorakit.files.hub import ensure_pushable
from lorakit.files.safetensors import read_header
from lorakit.merge.base import BaseModel, base_named_by
from lorakit.merge.companions import Companion, plan_companions
from lorakit.merge.execute import Crew, Progress, execute
from lorakit.merge.fetch import ensure_room_for_shards, open_base, with_values
from lorakit.merge.journal import has_key, take_up_key
from lorakit.merge.output import push, write_beside, write_lineage
from lorakit.merge.plan import DTYPES, MergePlan, plan_merge
from lorakit.merge.report import MergeReport

if TYPE_CHECKING:
    from lorakit.merge.residual import Residuals

AdapterLike = Adapter | str | os.PathLike[str]
Weighted = AdapterLike | tuple[AdapterLike, float]


def merge(
    base: str | os.PathLike[str] | None,
    adapters: Weighted | Sequence[Weighted],
    *,
    out: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str = "keep",
    strict: bool = True,
    dry_run: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    expert_layout: str | None = None,
    onto: str | None = None,
    quantize: str | None = None,
    max_shard_size: int | str | None = None,
    residual: str | os.PathLike[str] | None = None,
    undo: bool = False,
    resume: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    workers: int | None = None,
    ray: str | bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge adapters into a base, streamed; each weight is the exact sum, rounded once.

    Args:
        base: A model folder or a hub id; None for the one that the adapters' configs name.
        adapters: One adapter or several, each alone or as (adapter, weight). The same one twice adds up its weights.
        out: The folder to write. Appears whole or not at all. Only a dry run goes without.
        device: "auto", "cpu", "cuda" or "cuda:<index>".
        dtype: "keep", or "bf16", "fp16", "fp32" for every float tensor.
        strict: Refuse when an adapter's tensor has no place. Otherwise they are left out, and listed in the report.
        dry_run: Check and plan, write nothing.
        rounding: "nearest", or "stochastic", which keeps the mean of changes too small for the dtype.
        seed: For stochastic rounding.
        expert_layout: How fused experts are packed, where the adapter does not tell: see `lorakit merge --help`.
        onto: For a quantised base, what the change is added to: "original" (its 16-bit model, named as `base`),
            "dequantised" (the values that the quantised one has; written in 16 bit), "same" (those, quantised again).
        quantize: "fp8", "int8" or "w4a16": what linear layers are written as, rounded to nearest.
        max_shard_size: In bytes, or as "5GB"; None keeps the base's shards.
        residual: A folder to write too: what rounding to 16 bit lost, as a small adapter of the result.
        undo: Keep beside the result what `unmerge` needs to give the base back, bit for bit.
        resume: Go on with what an interrupted merge of the same has left, and leave it when this one is interrupted.
        push_to_hub: A repository to upload the result to, once it is whole; `private` makes a new one private.
        workers: How many threads; None for one a core. With `ray`, of each task.
        ray: The address of a Ray cluster whose nodes write the shards, one a task; True for the one that RAY_ADDRESS
            names, else for a cluster of this machine. Each node has to see the base, the adapters and the folder of
            `out` under the same paths.
        progress: Called with (bytes written, bytes in all), from several threads, one at a time.

    Raises:
        UsageError: the arguments contradict each other, no base is named, there is no such device, or no Ray.
        NotFound: no such base or adapter; or a node of the cluster does not see it.
        Refused: a subclass says why: InvalidFile, Incomplete, UnsupportedAdapter, UnplacedTensors, WrongBase.
        Conflict: `out` exists, or a source was written again meanwhile.
        OutOfSpace: the disk is full.
        LorakitError: the result is whole, but could not be pushed.
    """
    begun = time.monotonic()
    target = None if out is None else Path(out)
    _check_settings(device, dtype, rounding, workers)
    if ray:
        _check_spread(residual is not None, undo)
    if residual is not None:
        _check_residual(Path(residual), target, resume)
    if private and push_to_hub is None:
        raise UsageError("`private` is for a repository to push to: name one")
    if push_to_hub is not None and not dry_run:
        ensure_pushable(push_to_hub)
    if target is not None:
        refuse_existing(target)
    elif not dry_run:
        raise UsageError("no folder to write is named: give `out`, or ask for a dry run")
    opened = weighted_adapters(adapters)
    model = open_base(base if base is not None else base_named_by(opened))
    size = parse_size(max_shard_size)
    plan = with_values(model, lambda: plan_merge(
        model, opened, dtype=dtype, strict=strict, expert_layout=expert_layout, max_shard_size=size, onto=onto,
        quantise=quantize,
    ))  # fmt: skip
    _ensure_finite(opened)
    companions = companions_of(model, opened, onto)
    settings = {
        "rounding": rounding, "seed": seed, "expert_layout": expert_layout, "max_shard_size": size, "onto": onto,
        "quantize": quantize,
    }  # fmt: skip
    report = MergeReport(target, plan, opened, companions, device, dry_run, settings=settings)
    if dry_run or target is None:
        return report
    key = merge_key(plan, opened, device=device, **settings)
    take_up = (lambda folder: has_key(folder, key)) if resume else None
    with (
        _residuals(plan, residual) as residuals,
        whole_folder(target, take_up=take_up) as beside,
        take_up_key(beside, key, plan.shards) as whole,
    ):
        _ensure_space(plan, target, whole)
        ensure_room_for_shards(plan, target, whole)
        with _crew(ray, plan, opened, beside, device, workers) as crew:
            done = execute(
                plan, beside, device=device, workers=workers, rounding=rounding, seed=seed, residuals=residuals,
                crew=crew, progress=progress,
            )  # fmt: skip
        report = replace(report, device=done.device, survivals=done.survivals, resumed=done.resumed)
        write_beside(report, beside)
        if residuals is not None:
            residuals.write(opened, target)
            report = replace(report, residual=residuals.as_dict(Path(str(residual))))
        if undo:
            from lorakit.merge.undo import write_undo

            report = replace(report, undo=write_undo(plan, beside))
        _ensure_unchanged(model, opened)
        report = replace(report, seconds=time.monotonic() - begun)
        write_lineage(report, beside, arithmetic=done.arithmetic)
        sync_tree(beside)  # all that can fail comes before the journal goes
    if push_to_hub is not None:
        report = replace(report, pushed=push(target, push_to_hub, private=private))
    return replace(report, seconds=time.monotonic() - begun)


def _check_residual(folder: Path, out: Path | None, resume: bool) -> None:
    refuse_existing(folder)
    if out is not None and folder.absolute() == out.absolute():
        raise UsageError(f"the merged model and its residual can't both be '{out}'")
    if resume:
        raise UsageError("the residual of weights that an interrupted merge has done isn't known: leave out --resume")


def _residuals(plan: MergePlan, folder: str | os.PathLike[str] | None) -> AbstractContextManager[Residuals | None]:
    """Appears after the result, which is renamed first."""
    if folder is None:
        return nullcontext()
    from lorakit.merge.residual import residual_folder

    return residual_folder(plan, Path(folder))


def _check_spread(residual: bool, undo: bool) -> None:
    ensure_installed()
    if residual or undo:
        named = "--residual" if residual else "--undo"
        raise UsageError(f"{named} is made by one process that sees every weight: leave it out, or --ray")


def _crew(
    ray: str | bool, plan: MergePlan, adapters: Sequence[Adapter], folder: Path, device: str, workers: int | None
) -> AbstractContextManager[Crew | None]:
    """Who writes the shards, if it is not this process."""
    if not ray:
        return nullcontext()
    from lorakit.merge.spread import crew_on

    files = [shard.file for shard in plan.base.shards if shard.file.is_file()]  # of a hub's, others are to come
    files += [source.file for adapter in adapters for source in adapter.files()]
    return crew_on(ray, folder, files, device=device, workers=workers)


def companions_of(base: BaseModel, adapters: Sequence[Adapter], onto: str | None) -> tuple[Companion, ...]:
    """The files that stand beside the weights of the result."""
    folders = [source.folder for adapter in adapters for source in adapter.files()]
    companions = plan_companions(base.folder, folders)
    if onto == "dequantised":
        from lorakit.merge.quantised import LEFT_BEHIND

        companions = tuple(companion for companion in companions if companion.name not in LEFT_BEHIND)
    return companions


def merge_key(plan: MergePlan, adapters: Sequence[Adapter], **settings: Any) -> str:
    """The same for the same work on the same files, so that an interrupted one can be gone on with."""
    sources = [
        [str(source.file), source.state, source.weight, sorted(map(str, source.config.raw.items()))]
        for adapter in adapters
        for source in adapter.files()
    ]
    shards = [
        [shard.name, shard.target.size, hashlib.sha256(shard.head).hexdigest(), len(shard.computed)]
        for shard in plan.shards
    ]
    said = [plan.dtype, list(plan.unplaced), sorted(map(str, settings.items()))]
    whole = [__version__, sources, plan.base.versions, shards, said]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


def _check_settings(device: str, dtype: str, rounding: str, workers: int | None) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"device '{device}' is none of auto, cpu, cuda, cuda:<index>")
    if dtype != "keep" and dtype not in DTYPES:
        raise UsageError(f"dtype '{dtype}' is none of keep, {', '.join(DTYPES)}")
    if rounding not in ("nearest", "stochastic"):
        raise UsageError(f"rounding '{rounding}' is none of nearest, stochastic")
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers do no work: ask for 1 or more")


_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]i?)?B?", re.IGNORECASE)


def parse_size(size: int | str | None) -> int | None:
    """Bytes of 5000000, "5GB" (10^9) or "5GiB" (2^30), as transformers and huggingface_hub read sizes."""
    if size is None or isinstance(size, int):
        return size
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise UsageError(f"'{size}' is no size: write it as 5GB, 500MB or 2GiB")
    unit = (match["unit"] or "").upper()
    step = 1024 if unit.endswith("I") else 1000
    return int(float(match["number"]) * step ** ("KMGT".index(unit[0]) + 1 if unit else 0))


def weighted_adapters(adapters: Weighted | Sequence[Weighted]) -> tuple[Adapter, ...]:
    """Each opened, its deltas times its weight."""
    return tuple(_weighted(*pair) for pair in _pairs(adapters))


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
    opened.ensure_stored(work="merged")
    return opened if weight == 1 else opened.weighted(float(weight))


def _ensure_finite(adapters: Sequence[Adapter]) -> None:
    for file in dict.fromkeys(source.file for adapter in adapters for source in adapter.files()):
        name = look_at_numbers(read_header(file)).not_finite
        if name:
            raise InvalidFile(f"'{name}' in '{file}' holds NaN or infinity: use an earlier checkpoint")


def _ensure_space(plan: MergePlan, target: Path, whole: Collection[str] = ()) -> None:
    free = free_bytes(target)
    needed = sum(shard.target.size for shard in plan.shards if shard.name not in whole)
    if free < needed:
        raise OutOfSpace(
            f"'{target}' needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there: "
            f"free some space or name another --out"
        )


def _ensure_unchanged(base: BaseModel, adapters: Sequence[Adapter]) -> None:
    base.ensure_unchanged()
    for adapter in adapters:
        adapter.ensure_unchanged()
