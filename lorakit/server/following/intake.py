"""The way of a finished checkpoint into the store: copied, checked, repaired where that is exact, kept by content."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lorakit.adapters.config import canonical
from lorakit.adapters.reading import WEIGHTS, load_adapter
from lorakit.adapters.writing import write_adapter_files
from lorakit.checkpoints.finished import Look, look_at
from lorakit.checkpoints.trainer_state import read_facts
from lorakit.convert.adapters.pickled import PICKLED
from lorakit.convert.check import Verdict, check_adapter, check_numbers
from lorakit.convert.own_tokens import same_tokens
from lorakit.errors import Incomplete, InvalidFile, Refused
from lorakit.files.finite import look_at_numbers
from lorakit.files.folders import copy_file, read_json, write_json
from lorakit.files.provenance import FILE, write_provenance
from lorakit.files.safetensors import read_header
from lorakit.merge.base import BaseModel
from lorakit.server.requests.templates import own_templates
from lorakit.store.catalog import Finish, Label, Revision
from lorakit.store.store import Source, Store

CONFIG = "adapter_config.json"


def why_never_served(look: Look) -> str | None:
    """Why no server takes in what looks like this, however long one waits; None when it may."""
    if look.state == "refused":
        if any((look.path / name).is_file() for name in PICKLED):
            return f"{look.reason}, or lorakit convert '{look.path}' --out DIR, which runs none"
        return look.reason
    if look.kind == "regular":
        return (
            f"it is a regular checkpoint (written by {look.writer}), and adapters alone are served beside a base: "
            f"lorakit extract '{look.path}' --base BASE --out DIR makes an adapter of it, "
            f"lorakit convert '{look.path}' --out DIR a model of its own"
        )
    if look.state in ("finished", "whole") and not (look.path / WEIGHTS).is_file():
        return (
            f"it is an adapter as {look.writer} writes it, without {WEIGHTS}: "
            f"lorakit convert '{look.path}' --out DIR makes one that can be served"
        )
    return None


@dataclass(frozen=True, slots=True)
class Taken:
    """What went into the store; `finish` is None when the same content was there and only its facts are new. `seconds`
    it took, by phase: copy, check."""

    revision: Revision
    finish: Finish | None
    seconds: Mapping[str, float] = field(default_factory=dict)


def take_in(
    store: Store, base: BaseModel, look: Look, *, run: str, kind: Label, step: int | None, max_rank: int,
    finished: bool = True, late: bool = False, shown: str = "",
) -> Taken:  # fmt: skip
    """Copy a finished adapter into the store, unless it can't be served right.

    Args:
        finished: it finished now; False when only its metadata was written again.
        late: it was there before the server looked first, so it begins no new attempt.
        shown: where it came from, if not from the folder that was looked at.

    Raises:
        Incomplete: it was written again while it was copied.
        Refused: with the reason and the cure.
    """
    began = time.monotonic()
    facts = read_facts(look.path, step)
    with store.staging() as staged:
        try:
            copy_file(look.path / WEIGHTS, staged / WEIGHTS)
            write_json(staged / CONFIG, canonical(read_json(look.path / CONFIG)))
            if (look.path / FILE).is_file():  # which may tell the base that it was made for
                copy_file(look.path / FILE, staged / FILE)
        except (FileNotFoundError, InvalidFile):
            raise Incomplete(f"'{look.path}' went away or was written again while it was copied") from None
        if look_at(look.path).signature != look.signature:
            raise Incomplete(f"'{look.path}' was written again while it was copied")
        if problem := same_tokens(look.path, base.folder).problem:
            raise Refused(problem, cause="tokenizer")
        for name, text in own_templates(look.path, base.folder).items():
            (staged / name).write_text(text, encoding="utf-8")
        copied = time.monotonic()
        adapter = load_adapter(staged)
        verdict = check_adapter(adapter, base, max_rank=max_rank)
        numbers = _bad_numbers(staged, certain=look.state == "finished")
        problems = [*verdict.problems, *verdict.open_questions, *numbers]
        if problems:
            wrong = next((check.name for check in verdict.checks if check.problem or check.question), "finite")
            raise Refused("; ".join(problems), cause=wrong)
        if verdict.repairs:
            _repair(verdict, staged)
        checked = time.monotonic()
        origin = shown or str(look.path)
        write_provenance(staged, "store", parents=[{"path": origin}], settings={}, repaired=verdict.repairs)
        digest, _, size = store.keep(staged)
    revision, finish = store.add(
        run, kind, digest, facts, rank=max(1, verdict.rank), size=size, path=origin,
        source=Source(look.signature, look.weights_signature), repaired="; ".join(verdict.repairs) or None,
        finished=finished, late=late,
    )  # fmt: skip
    seconds = {"copy": copied - began + time.monotonic() - checked, "check": checked - copied}
    return Taken(revision, finish, seconds)


def _bad_numbers(staged: Path, *, certain: bool) -> list[str]:
    content = look_at_numbers(read_header(staged / WEIGHTS))
    if problem := check_numbers(content).problem:
        return [problem]
    if content.all_zero and not certain:
        # some writers make the file in its full size first, and fill it then
        raise Incomplete(f"all numbers of {WEIGHTS} are zero, so it may be a file that is still being filled")
    return []


def _repair(verdict: Verdict, staged: Path) -> None:
    """Write the same change in the form that every vLLM reads, in place of what was copied."""
    assert verdict.plain is not None
    beside = staged / "repaired"
    beside.mkdir()
    write_adapter_files(verdict.plain, beside, rename=verdict.rename)
    for name in (WEIGHTS, CONFIG):
        (beside / name).replace(staged / name)
    beside.rmdir()
