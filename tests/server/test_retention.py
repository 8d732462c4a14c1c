"""Which revisions leave the store: decisions over what is known of a run, without a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.errors import NotFound, UsageError
from lorakit.server.following.retention import going, retention_of
from lorakit.store.catalog import Run
from tests.server.test_following import run_of

NOW = 1000.0
STEPS = [{"step": step, "loss": loss} for step, loss in ((100, 0.2), (200, 0.4), (300, 0.3), (400, 0.9))]


def gone(run: Run, keep: int = 0, file: str = "", held: dict[int, str] | None = None) -> list[int | None]:
    retention = retention_of(keep, file)
    assert retention is not None
    return [revision.facts.step for revision in going(run, retention, held or {}, NOW)]


def said(folder: Path, text: str) -> str:
    (folder / "keep.yaml").write_text(text)
    return str(folder / "keep.yaml")


def test_nothing_asked_keeps_all() -> None:
    assert retention_of(0, "") is None


def test_the_last_that_finished_stay_whatever_their_steps() -> None:
    assert gone(run_of(*STEPS), 2) == [100, 200]
    began_again = [*STEPS, {"step": 50, "attempt": 2}, {"step": 60, "attempt": 2}]
    assert gone(run_of(*began_again), 2) == [100, 200, 300, 400]


def test_what_is_held_stays(tmp_path: Path) -> None:
    assert gone(run_of(*STEPS), 1, held={1: "an alias points at it"}) == [200, 300]


def test_a_file_keeps_by_the_policies_of_prune(tmp_path: Path) -> None:
    assert gone(run_of(*STEPS), file=said(tmp_path, "keep_best: 2")) == [200, 400]
    assert gone(run_of(*STEPS), file=said(tmp_path, "keep_every: 200")) == [100, 300]
    assert gone(run_of(*STEPS), file=said(tmp_path, "max_bytes: 250")) == [100, 200]
    assert gone(run_of(*STEPS), 1, said(tmp_path, "keep_best: 1")) == [200, 300]


def test_a_clock_that_was_set_back_removes_nothing_by_age(tmp_path: Path) -> None:
    run = run_of(*STEPS)
    retention = retention_of(0, said(tmp_path, "keep_for: 1h"))
    assert retention is not None
    assert going(run, retention, {}, -1e6) == []


def test_a_runs_last_save_counts_as_its_newest(tmp_path: Path) -> None:
    assert gone(run_of(*STEPS, {"kind": "final"}), file=said(tmp_path, "keep_last: 1")) == [100, 200, 300, 400]


def test_a_file_that_says_nothing_or_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        retention_of(0, str(tmp_path / "nowhere"))
    with pytest.raises(UsageError):
        retention_of(3, said(tmp_path, "keep: 3"))
