"""An adapter of any kind as what an engine serves right: by its names and sizes plain LoRA of its base.

Exact wherever the change that it makes is of low rank; else near it, when that is asked for, by a measured error.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.config import read_config
from lorakit.adapters.keys import parse_key
from lorakit.adapters.reading import WEIGHTS, load_adapter
from lorakit.adapters.writing import write_adapter_files
from lorakit.checkpoints.finished import look_at
from lorakit.convert.adapters.pickled import PICKLED, as_safetensors
from lorakit.convert.answers import MERGE
from lorakit.convert.check import Verdict, check_adapter, check_numbers
from lorakit.convert.readers.adapters import LITGPT, as_peft, is_foreign
from lorakit.convert.report import ConvertReport
from lorakit.errors import LorakitError, Refused, UnplacedTensors, UsageError
from lorakit.files.digests import file_digest
from lorakit.files.finite import look_at_numbers
from lorakit.files.folders import copy_file, refuse_existing, whole_folder
from lorakit.files.provenance import write_provenance
from lorakit.files.safetensors import read_header
from lorakit.merge.base import BaseModel, base_named_by
from lorakit.merge.fetch import open_base, with_values
from lorakit.merge.plan import WITHOUT_THEM

if TYPE_CHECKING:
    from lorakit.adapters.report import MixReport
    from lorakit.mix.extraction.report import ExtractReport

DEFAULT_RANK = 64
CONFIG = "adapter_config.json"
_WORK = ".work"
_NAME_IT = re.compile(": name [a-z ]+ with --base$")
# What low-rank factors may be near to; what is for another base is near to nothing.
_APPROXIMABLE = frozenset({"features", "tensors", "rank"})


Judge = Callable[[Adapter], Verdict]


@dataclass(frozen=True, slots=True)
class _Made:
    """What is to be written, and how near it is: 0 where it is exact. `as_it_is`: the file itself, copied."""

    adapter: Adapter
    verdict: Verdict
    error: float = 0.0
    notes: tuple[str, ...] = ()
    as_it_is: bool = False


def convert_adapter(
    path: Path,
    out: Path | None,
    *,
    base: str | None = None,
    max_rank: int | None = None,
    approximate: bool = False,
    rank: int | None = None,
    target: str = "vllm",
    dry_run: bool = False,
) -> ConvertReport:
    """Write an adapter in the form that `target` serves right, whatever it was written as.

    Args:
        path: a folder in PEFT layout, of any method; or what torchtune or litgpt wrote.
        out: appears whole or not at all. Only a dry run goes without.
        base: a folder or hub id; None for the one that its config names.
        max_rank: the largest that the server allows.
        approximate: where it can't be exact, write what is nearest, of the rank `max_rank` or else 64.
        rank: as `approximate`, with this largest rank.

    Raises:
        UsageError: the arguments contradict each other.
        NotFound: there is no such base.
        Refused: it can't be written exactly, or at all; with the reason and what helps.
        Conflict: `out` exists, or the adapter was written again meanwhile.
    """
    begun = time.monotonic()
    if rank is not None and max_rank is not None and rank > max_rank:
        raise UsageError(f"rank {rank} is above the {max_rank} that the server allows")
    if out is None and not dry_run:
        raise UsageError("no folder to write is named: give `out`, or ask for a dry run")
    if out is not None:
        refuse_existing(out)
    with _place(None if dry_run else out) as beside:
        work = beside / _WORK
        work.mkdir()
        folder, written_by = in_peft_layout(path, work / "read")
        with _called(path, folder):
            adapter = load_adapter(folder)
            model, notes = _base_of(adapter, base)
            _require_finite(folder)
            largest = max_rank if rank is None else rank
            judge = partial(_verdict, base=model, max_rank=largest, engine=target)
            verdict = judge(adapter)
            near = approximate or rank is not None
            if target == "peft" and not near and _is_peft_alone(verdict, adapter):
                made = _copied(adapter, verdict)
            else:
                made = _made(adapter, verdict, model, folder, largest, work, judge, approximate=near)
            if made.as_it_is:
                _copy(folder, beside, target)
            else:
                _write(_with_base(made, model), target, model, beside)
            adapter.ensure_unchanged()
            if model is not None:
                model.ensure_unchanged()
        settings = {"target": target, "max_rank": max_rank, "rank": rank, "approximate": approximate}
        report = _report(made, path, out, written_by, beside)
        notes = (*report.notes, *notes, *_of_open_questions(verdict))
        notes = tuple(note.replace(str(folder), str(path)) for note in notes)
        seconds = time.monotonic() - begun
        report = replace(report, dry_run=dry_run, settings=settings, notes=notes, seconds=seconds)
        parents = [{"kind": "adapter", "path": str(path.resolve()), "sha256": _digest(adapter, folder, path)}]
        shutil.rmtree(work)
        write_provenance(
            beside, "convert", [*parents, *_base_parent(model)], settings, steps=list(made.verdict.repairs),
            truncation_error=made.error, report=report.as_dict(),
        )  # fmt: skip
    return report


@contextmanager
def _called(path: Path, folder: Path) -> Iterator[None]:
    """Errors about the folder that is read speak of what was named."""
    try:
        yield
    except LorakitError as error:
        if folder == path:
            raise
        raise type(error)(str(error).replace(str(folder), str(path))) from error


@contextmanager
def _place(out: Path | None) -> Iterator[Path]:
    """The folder to write into; of a dry run, one that is gone at the end."""
    if out is not None:
        with whole_folder(out) as beside:
            yield beside
        return
    with TemporaryDirectory() as folder:
        yield Path(folder)


def in_peft_layout(path: Path, place: Path) -> tuple[Path, str]:
    """Where the adapter stands as PEFT's safetensors, which may be made at `place`; and what wrote it.

    Raises:
        Refused: it is no adapter that can be read.
    """
    if (path / WEIGHTS).is_file():
        return path, "peft"
    if is_foreign(path):
        as_peft(path, place)
        return place, str(look_at(path).writer)
    if any((path / name).is_file() for name in PICKLED):
        read_config(path)
        as_safetensors(path, place)
        return place, "peft, pickled"
    return path, "peft"  # which says what is missing


def _base_of(adapter: Adapter, base: str | None) -> tuple[BaseModel | None, tuple[str, ...]]:
    """The base that is named, or the one of its config where that is at hand."""
    if base is not None:
        return open_base(base), ()
    try:
        return open_base(base_named_by([adapter])), ()
    except LorakitError as error:
        return None, (f"names and sizes are not compared with any base: {without_cure(error)}",)


def without_cure(error: LorakitError) -> str:
    """Why the base that an adapter names is not at hand; that one can name it is said by whoever tells."""
    return _NAME_IT.sub("", str(error))


def _require_finite(folder: Path) -> None:
    problem = check_numbers(look_at_numbers(read_header(folder / WEIGHTS))).problem
    if problem:
        raise Refused(problem)


def _is_peft_alone(verdict: Verdict, adapter: Adapter) -> bool:
    """Whether it is right for its base, has more than plain LoRA, and is named as PEFT names it."""
    if _wrong(verdict) != {"features"}:
        return False
    names = (parse_key(name) for name in read_header(adapter.files()[0].file).tensors)
    return adapter.config.peft_type != "LORA" or all(
        key.adapter is None and key.name.startswith("base_model.model.") for key in names
    )


def _copied(adapter: Adapter, verdict: Verdict) -> _Made:
    (first, *_) = (check.reason for check in verdict.checks if check.ok is False)
    return _Made(adapter, verdict, notes=(f"copied as it is, as PEFT loads it: {first}",), as_it_is=True)


def _wrong(verdict: Verdict) -> set[str]:
    return {check.name for check in verdict.checks if check.ok is False}


def _of_open_questions(verdict: Verdict) -> tuple[str, ...]:
    """Whether it is the right base, where that is not known."""
    return tuple(str(check.reason) for check in verdict.checks if check.name == "base" and check.ok is None)


def _made(
    adapter: Adapter, verdict: Verdict, model: BaseModel | None, folder: Path, largest: int | None, work: Path,
    judge: Judge, *, approximate: bool,
) -> _Made:  # fmt: skip
    wrong = _wrong(verdict)
    unknown = [check for check in verdict.checks if check.ok is None and check.name in ("features", "tensors")]
    if unknown:
        raise Refused(f"'{folder}': {unknown[0].reason}: name its base with --base")
    if not wrong and verdict.plain is not None:
        return _Made(verdict.plain, verdict, as_it_is=bool(verdict.stacked))
    if not approximate or not wrong <= _APPROXIMABLE or verdict.plain is None or verdict.stacked:
        raise Refused("; ".join(verdict.problems))
    rank = largest or DEFAULT_RANK
    if wrong == {"rank"}:
        return _shrunk(verdict, rank)
    if model is None:
        raise UsageError("what is near to it depends on the base: name it with --base")
    return _extracted(folder, model, rank, work, judge)


def _verdict(adapter: Adapter, *, base: BaseModel | None, max_rank: int | None, engine: str) -> Verdict:
    def judged() -> Verdict:
        return check_adapter(adapter, base, max_rank=max_rank, engine=engine)

    return judged() if base is None else with_values(base, judged)


def _shrunk(verdict: Verdict, rank: int) -> _Made:
    from lorakit.mix.shrink import shrink

    assert verdict.plain is not None
    adapter = shrink(verdict.plain, rank=rank, own_ranks=False)
    report: MixReport | None = adapter.report
    error = report.truncation_error if report else 0.0
    return _Made(adapter, verdict, error, (f"cut to rank {rank}, which loses {error:.2e} of its change",))


def _extracted(folder: Path, model: BaseModel, rank: int, work: Path, judge: Judge) -> _Made:
    """The change that merging it would make, as plain LoRA of that rank.

    Raises:
        Refused: it can't be merged either; or a part of it is no low-rank change, or on layers that are not served.
    """
    from lorakit.mix.extraction.extract import extract

    near = work / "near"
    try:
        report: ExtractReport = extract(folder, model.reference, near, rank=rank, own_ranks=False)
    except UnplacedTensors as unplaced:
        raise UnplacedTensors(str(unplaced).removesuffix(f", or {WITHOUT_THEM}")) from None
    error = report.relative_error
    if report.lost or error is None:
        first, more = report.lost[0], f", and {len(report.lost) - 1} more" if len(report.lost) > 1 else ""
        reason = f"it changes '{first.tensor}' ({first.reason}){more}, which no low-rank factors carry"
        raise Refused(f"{reason}: {MERGE}")
    verdict = judge(load_adapter(near))
    if verdict.problems or verdict.plain is None:
        raise Refused("; ".join(verdict.problems))
    said = f"its change at rank {rank}, which lacks {error:.2e} of it"
    return _Made(verdict.plain, verdict, error, (said, *report.notes))


def _with_base(made: _Made, model: BaseModel | None) -> _Made:
    """What names no base gets the name of the one that it was compared with."""
    if made.adapter.base is not None or model is None:
        return made
    config = replace(made.adapter.config, base=model.reference)
    return replace(made, adapter=replace(made.adapter, config=config))


def _copy(folder: Path, beside: Path, target: str) -> None:
    """What vLLM takes as it is alone."""
    if target not in ("vllm", "peft"):
        raise Refused(f"'{folder}' has factors of all experts at once, which are written for vLLM and PEFT alone")
    for name in (WEIGHTS, CONFIG):
        copy_file(folder / name, beside / name)


def _write(made: _Made, target: str, model: BaseModel | None, folder: Path) -> None:
    if target == "vllm":
        write_adapter_files(made.adapter, folder, rename=made.verdict.rename)
        return
    from lorakit.convert.targets import write_for

    names: Mapping[str, str] = made.verdict.rename
    deltas = {names.get(module, module): delta for module, delta in made.adapter.deltas.items()}
    write_for(target, replace(made.adapter, deltas=deltas), folder, model)


def _report(made: _Made, path: Path, out: Path | None, written_by: str, folder: Path) -> ConvertReport:
    weights = folder / WEIGHTS
    written = read_header(weights).tensors if weights.is_file() else {}
    copies = {"copies of the base's own tensors": made.verdict.copies} if made.verdict.copies else {}
    return ConvertReport(
        path, out, "adapter", written_by, tensors=len(written) or 2 * len(made.adapter.deltas),
        dtype="keep" if made.as_it_is else "fp32",
        nbytes=sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        renamed={} if made.as_it_is else made.verdict.rename,
        left_out={} if made.as_it_is else copies, error=made.error, notes=(*made.verdict.repairs, *made.notes),
    )  # fmt: skip


def _digest(adapter: Adapter, folder: Path, path: Path) -> str:
    """Of the file that was read, as it was written."""
    if folder == path:
        return file_digest(adapter.files()[0].file)
    names = (*PICKLED, LITGPT)
    files = [path] if path.is_file() else [file for name in names if (file := path / name).is_file()]
    return file_digest(files[0]) if files else ""


def _base_parent(model: BaseModel | None) -> list[dict[str, Any]]:
    if model is None or model.remote is not None:
        return []
    path = str(model.folder.absolute())
    said = {"path": path, "reference": model.reference, "identity": model.identity, "weights": model.weights_digest}
    return [{"kind": "base", **said}]
