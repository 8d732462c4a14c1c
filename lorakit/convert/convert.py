"""`lorakit.convert`: a checkpoint of any trainer in, what vLLM loads out, whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.adapters.config import parse_config
from lorakit.checkpoints.finished import examine, is_adapter
from lorakit.checkpoints.locate import find_checkpoint, nothing_named, on_hub
from lorakit.checkpoints.writers.layout import Kind
from lorakit.cluster.joining import ensure_installed
from lorakit.convert.beside import Beside, chosen, find_beside, write_model_files
from lorakit.convert.described import is_described
from lorakit.convert.expected import Expected, expected_like, expected_of
from lorakit.convert.planning import MAX_SHARD, ConvertPlan, plan_convert
from lorakit.convert.readers import WEIGHTS, read_source
from lorakit.convert.report import ConvertReport
from lorakit.convert.source import Source
from lorakit.convert.vocabulary import tokens_of
from lorakit.convert.writer import write_shards
from lorakit.errors import Incomplete, InvalidFile, LorakitError, NotFound, OutOfSpace, Refused, UsageError
from lorakit.files.digests import sampled_digest
from lorakit.files.folders import free_bytes, read_json, refuse_existing, whole_folder
from lorakit.files.hub import hub_folder, looks_like_hub_id
from lorakit.files.provenance import write_provenance
from lorakit.files.safetensors import read_header
from lorakit.merge.base import HUB_PATTERNS, INDEX, SINGLE, read_base
from lorakit.merge.companions import CONFIG
from lorakit.merge.execute import Progress
from lorakit.merge.fetch import ALL_BUT_WEIGHTS, open_base
from lorakit.merge.merge import parse_size
from lorakit.merge.plan import DTYPES

PARTS = ("model", "tokenizer")
_ON_HUB = (*HUB_PATTERNS, "pytorch_model*.bin")


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    like: str | os.PathLike[str] | None = None,
    *,
    dtype: str = "keep",
    weights: str = "model",
    only: Collection[str] | None = None,
    quantize: str | None = None,
    max_shard_size: int | str | None = None,
    strict: bool = True,
    max_rank: int | None = None,
    rank: int | None = None,
    approximate: bool = False,
    target: str = "vllm",
    dry_run: bool = False,
    workers: int | None = None,
    ray: str | bool = False,
    progress: Progress | None = None,
) -> ConvertReport:
    """Write a checkpoint as a model folder, streamed; an adapter as one that vLLM serves right.

    Args:
        path: A folder, a file, a hub id or a name in the store; a run means its newest finished checkpoint.
        out: The folder to write. Appears whole or not at all. Only a dry run goes without.
        like: A folder or hub id of the model that was trained: what the checkpoint lacks of config, tokenizer and code
            comes from there; of an adapter it is the base.
        dtype: "keep", or "bf16", "fp16", "fp32" for every float tensor.
        weights: "model", or "ema" for the moving average of them.
        only: The parts to write, of "model" and "tokenizer".
        quantize: "fp8", "int8" or "w4a16": what linear layers are written as, rounded to nearest.
        max_shard_size: In bytes, or as "5GB", which is the default.
        strict: Refuse when the model has no place for a tensor. Otherwise they are left out, and listed in the report.
        max_rank: Of an adapter: the `--max-lora-rank` of the server that it is for.
        rank: Of an adapter that has no exact form as a LoRA: the rank of the approximate one.
        approximate: Whether such a one is written at all; the error is measured.
        target: For whom an adapter is written.
        dry_run: Check and plan, write nothing.
        workers: How many threads; None for one a core. With `ray`, of each task.
        ray: Of a whole model: the address of a Ray cluster whose nodes write the files, one a task; True for the one
            that RAY_ADDRESS names, else for a cluster of this machine. Each node has to see the checkpoint and the
            folder of `out` under the same paths.
        progress: Called with (bytes written, bytes in all), from several threads, one at a time.

    Raises:
        UsageError: the arguments contradict each other, or ask for what the checkpoint doesn't have.
        NotFound: no such checkpoint or model; or a node of the cluster does not see it.
        Refused: a subclass says why: Incomplete, InvalidFile, UnplacedTensors, WrongBase, UnsupportedAdapter.
        Conflict: `out` exists, or a source was written again meanwhile.
        OutOfSpace: the disk is full.
    """
    parts = _checked(dtype, weights, only, workers)
    if "model" not in parts and (dtype != "keep" or quantize is not None):
        raise UsageError("the tokenizer alone has no dtype, and can't be quantised: leave out --dtype and --quantize")
    if ray:
        ensure_installed()
    if "model" not in parts and ray:
        raise UsageError("the tokenizer alone is a copy, with nothing to spread: leave out --ray")
    place = None if out is None else Path(out)
    if place is not None:
        refuse_existing(place)
    elif not dry_run:
        raise UsageError("no folder to write is named: give `out`, or ask for a dry run")
    checkpoint = _located(os.fspath(path))
    if _kind_of_whole(checkpoint) == "adapter":
        if only is not None or quantize is not None or weights != "model" or dtype != "keep":
            raise UsageError(
                f"'{checkpoint}' is an adapter, which has no parts, dtype or quantised form to choose: for a whole "
                f"model merge it first (lorakit merge)"
            )
        _ensure_for_adapter(strict, max_shard_size, workers, ray)
        from lorakit.convert.adapters.convert import convert_adapter

        return convert_adapter(
            checkpoint, place, base=None if like is None else os.fspath(like), max_rank=max_rank, rank=rank,
            approximate=approximate, target=target, dry_run=dry_run,
        )  # fmt: skip
    _ensure_for_model(max_rank, rank, approximate, target)
    shard_size = parse_size(max_shard_size)
    if shard_size == 0:
        raise UsageError("a file of 0 bytes holds no tensor: name a larger --max-shard-size")
    wanted = _Wanted(parts, dtype, weights, quantize, shard_size, strict)
    return _convert_model(checkpoint, place, like, wanted, dry_run=dry_run, workers=workers, ray=ray, progress=progress)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a model shall be written as."""

    parts: list[str]
    dtype: str
    weights: str
    quantize: str | None
    max_shard_size: int | None
    strict: bool

    def as_dict(self) -> dict[str, Any]:
        return {
            "weights": self.weights, "quantize": self.quantize, "max_shard_size": self.max_shard_size,
            "only": self.parts, "strict": self.strict,
        }  # fmt: skip


def _convert_model(
    checkpoint: Path, out: Path | None, like: str | os.PathLike[str] | None, wanted: _Wanted, *, dry_run: bool,
    workers: int | None, ray: str | bool, progress: Progress | None,
) -> ConvertReport:  # fmt: skip
    begun = time.monotonic()
    like_folder = _folder_of(like)
    if ray:
        from lorakit.convert.spread import ensure_spreadable

        ensure_spreadable(checkpoint)
    source = read_source(checkpoint, weights=wanted.weights)
    beside = find_beside(source.beside, like_folder)
    if "model" not in wanted.parts and not chosen(beside.companions, wanted.parts):
        raise Refused(f"there is no tokenizer beside '{checkpoint}': name the model that was trained with --like")
    plan = None
    if "model" in wanted.parts:
        expectations = _expectations(source, beside, like_folder, like)
        plan = _first_that_fits(expectations, lambda expected: _planned(source, expected, beside, wanted))
    report = _report(source, plan, beside, wanted, out, dry_run=dry_run)
    if dry_run or out is None:
        return report
    with whole_folder(out) as folder:
        if plan is not None:
            _ensure_space(plan, out)
            if ray:
                from lorakit.convert.spread import write_spread

                write_spread(ray, plan, source, folder, workers=workers, progress=progress)
            else:
                write_shards(plan, folder, workers=workers, progress=progress)
            write_model_files(plan, beside, folder)
        for companion in chosen(beside.companions, wanted.parts):
            companion.write(folder)
        source.ensure_unchanged()
        report = replace(report, seconds=time.monotonic() - begun)
        parents = _parents(source, like, like_folder)
        write_provenance(
            folder, "convert", parents, {"dtype": wanted.dtype, **wanted.as_dict()}, report=report.as_dict()
        )
    return replace(report, seconds=time.monotonic() - begun)


def _planned(source: Source, expected: Expected, beside: Beside, wanted: _Wanted) -> ConvertPlan:
    tokenizer = beside.tokenizer if "tokenizer" in wanted.parts else None
    return plan_convert(
        source, expected, beside.config, tokens=None if tokenizer is None else tokens_of(tokenizer),
        trained=tokenizer is not None and tokenizer.parent == source.beside, dtype=wanted.dtype,
        quantise=wanted.quantize, max_shard_size=wanted.max_shard_size or MAX_SHARD, strict=wanted.strict,
    )  # fmt: skip


def _checked(dtype: str, weights: str, only: Collection[str] | None, workers: int | None) -> list[str]:
    """The parts to write."""
    if dtype != "keep" and dtype not in DTYPES:
        raise UsageError(f"dtype '{dtype}' is none of keep, {', '.join(DTYPES)}")
    if weights not in WEIGHTS:
        raise UsageError(f"weights '{weights}' are none of {', '.join(WEIGHTS)}")
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers do no work: ask for 1 or more")
    wrong = [part for part in only or () if part not in PARTS]
    if wrong or (only is not None and not only):
        raise UsageError(f"there is no part '{wrong[0] if wrong else ''}': name some of {', '.join(PARTS)}")
    return [part for part in PARTS if only is None or part in only]


def _ensure_for_model(max_rank: int | None, rank: int | None, approximate: bool, target: str) -> None:
    """Raises UsageError when something is asked for that is of adapters alone."""
    asked = {"max-lora-rank": max_rank, "rank": rank, "approximate": approximate, "for": target != "vllm"}
    wrong = [name for name, value in asked.items() if value]
    if wrong:
        raise UsageError(f"the checkpoint is a whole model, and --{wrong[0]} is for adapters: leave it out")


def _ensure_for_adapter(strict: bool, max_shard_size: int | str | None, workers: int | None, ray: str | bool) -> None:
    """Raises UsageError when something is asked for that is of whole models alone."""
    asked = {
        "no-strict": not strict, "max-shard-size": max_shard_size is not None, "workers": workers is not None,
        "ray": bool(ray),
    }  # fmt: skip
    wrong = [name for name, value in asked.items() if value]
    if wrong:
        raise UsageError(f"the checkpoint is an adapter, and --{wrong[0]} is for whole models: leave it out")


def _located(reference: str) -> Path:
    found = find_checkpoint(reference)
    if found is not None:
        is_part = found.is_file() and found.name.startswith("adapter_") and is_adapter(found.parent)
        return found.parent if is_part else found
    if not looks_like_hub_id(reference):
        raise nothing_named(reference)
    return on_hub(reference, what="checkpoint", patterns=_ON_HUB)


def _kind_of_whole(checkpoint: Path) -> Kind | None:
    """A config may come from elsewhere.

    Raises:
        Incomplete: a file is missing, or still being written.
        InvalidFile: one is all there, and damaged.
    """
    look, layout = examine(checkpoint)
    lacks_config_alone = layout is not None and layout.missing == (CONFIG,)
    if look.state == "incomplete" and look.writer is not None and not lacks_config_alone:
        if layout is not None:
            _ensure_undamaged(checkpoint, layout.files)
        _refuse_wrong_config(checkpoint)
        raise Incomplete(f"'{checkpoint}' is incomplete: {look.reason}; wait for its writer, or use an earlier one")
    return look.kind


def _ensure_undamaged(checkpoint: Path, names: Collection[str]) -> None:
    """Raises InvalidFile for a file that can't be read and is not just cut short, as one is that is being written."""
    for file in [checkpoint] if checkpoint.is_file() else [checkpoint / name for name in names]:
        try:
            if file.suffix == ".safetensors":
                read_header(file)
            elif file.suffix == ".json":
                read_json(file)
        except NotFound:
            continue
        except InvalidFile as error:
            if "cut short" not in str(error):
                raise InvalidFile(f"{error}: copy it again") from None


def _refuse_wrong_config(checkpoint: Path) -> None:
    """Raises InvalidFile when it is an adapter whose config is all there, and wrong: waiting helps nobody then."""
    file = checkpoint / "adapter_config.json"
    try:
        raw = read_json(file)
    except (LorakitError, OSError):
        return
    parse_config(raw, file)


def _folder_of(like: str | os.PathLike[str] | None) -> Path | None:
    """Of a model on the hub everything but its weights."""
    if like is None:
        return None
    name = os.fspath(like)
    folder = Path(name) if Path(name).is_dir() else hub_folder(name, what="model", patterns=ALL_BUT_WEIGHTS)
    if not (folder / CONFIG).is_file():
        raise Refused(f"'{name}' is no model to be like, it has no config.json: name the one that was trained")
    return folder


def _expectations(
    source: Source, beside: Beside, like_folder: Path | None, like: str | os.PathLike[str] | None
) -> Iterator[Expected]:
    """What may be expected, what is cheap to know first: transformers takes seconds to import.

    The names in another model's files are good as long as the checkpoint has the same.
    """
    own = source.beside
    described = own if own is not None and is_described(own) else like_folder
    has_tensors = like_folder is not None and any((like_folder / name).is_file() for name in (INDEX, SINGLE))
    if like_folder is not None and has_tensors and described == like_folder:
        yield expected_like(read_base(like_folder))
    try:
        found = None if described is None else expected_of(described, beside.config)
    except InvalidFile:
        raise
    except Refused:  # of a model that transformers does not know, another's files say as much
        if like is None:
            raise
        found = None
    if found is not None:
        yield found
    if like_folder is not None and has_tensors and described != like_folder:
        yield expected_like(read_base(like_folder))
    elif found is None and like is not None and not has_tensors:
        yield expected_like(open_base(like))


def _first_that_fits(expectations: Iterator[Expected], plan: Callable[[Expected], ConvertPlan]) -> ConvertPlan:
    """Raises what the first one raises, when none fits."""
    refused: Refused | None = None
    for expected in expectations:
        try:
            return plan(expected)
        except Refused as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _report(
    source: Source, plan: ConvertPlan | None, beside: Beside, wanted: _Wanted, out: Path | None, *, dry_run: bool
) -> ConvertReport:
    report = ConvertReport(
        source.path,
        out,
        "model",
        source.format,
        dry_run=dry_run,
        dtype=wanted.dtype,
        companions={one.name: str(one.source) for one in chosen(beside.companions, wanted.parts)},
        settings=wanted.as_dict(),
    )
    if plan is None:
        return report
    return replace(
        report,
        tensors=sum(len(shard.target.tensors) for shard in plan.shards),
        nbytes=plan.nbytes,
        renamed=plan.renamed,
        left_out=plan.left_out,
        notes=(*beside.notes, *plan.notes),
    )


def _ensure_space(plan: ConvertPlan, out: Path) -> None:
    free = free_bytes(out)
    if free < plan.nbytes:
        raise OutOfSpace(
            f"'{out}' needs {plan.nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there: free some space or "
            f"name another --out"
        )


def _parents(source: Source, like: str | os.PathLike[str] | None, like_folder: Path | None) -> list[dict[str, Any]]:
    files = [
        {"file": os.path.relpath(file, source.path if source.path.is_dir() else source.path.parent),
         "sampled_sha256": sampled_digest(file)}
        for file in source.states
    ]  # fmt: skip
    parents: list[dict[str, Any]] = [
        {"kind": "checkpoint", "path": str(source.path.absolute()), "format": source.format, "files": files}
    ]
    if like is not None and like_folder is not None:
        parents.append({"kind": "like", "path": str(like_folder.absolute()), "reference": os.fspath(like)})
    return parents
