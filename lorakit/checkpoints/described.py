"""What a checkpoint is, for the store: from its own files and its trainer's log."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lorakit.checkpoints.metadata import metadata_of
from lorakit.checkpoints.recognise import recognise
from lorakit.checkpoints.runs import Candidate, of_file, one_named
from lorakit.store.catalog import Facts
from lorakit.store.kept import Described


def describe(path: Path, run: str, *, final: bool = False) -> Described:
    """What is known of a folder or file; `final` for a run's last save, in its own folder."""
    candidate = Candidate(path, run, "final") if final else _candidate(path, run)
    known, found = metadata_of(candidate), recognise(path)
    facts = Facts(known.step, known.epoch, known.train_loss, known.eval_loss, known.eval_step, known.metrics or {})
    return Described(
        kind=known.kind or "regular",
        writer=found.writer if found else "torch",
        step=known.step,
        facts=facts,
        base=known.base,
        rank=known.rank,
        final=candidate.kind == "final",
    )


def _candidate(path: Path, run: str) -> Candidate:
    if path.is_file():
        return of_file(path, run)
    named = one_named(path)
    return replace(named, run=run) if named else Candidate(path, run, "plain")
