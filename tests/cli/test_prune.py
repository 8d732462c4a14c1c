"""`lorakit prune`: a table with the reasons, a question, and exit codes."""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path

import pytest

from tests.checkpoints.test_pruning import put
from tests.cli.commands import lorakit

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step, loss in ((100, 0.9), (200, 0.1), (300, 0.5)):
        put(tmp_path / "sql", step, loss)
    return tmp_path / "sql"


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_the_table_says_why_each_stays_or_goes_and_a_dry_run_removes_nothing(capsys: Capture, run: Path) -> None:
    ended = lorakit(capsys, "prune", run, "--keep-last", 1, "--keep-best", 1, "--dry-run")
    assert ended.code == 0
    head, *rows = ended.out.splitlines()
    assert head.split() == ["checkpoint", "size", "eval_loss", "why"]
    assert [row.split()[0] for row in rows] == ["checkpoint-100", "checkpoint-200", "checkpoint-300"]
    assert rows[0].endswith("goes   nothing keeps it")
    assert rows[1].endswith("stays  of the best 1 by eval_loss (0.1)")
    assert rows[2].endswith("stays  the newest; of the last 1")
    assert "1 checkpoint (" in ended.err
    assert "nothing was removed" in ended.err
    assert len(steps(run)) == 3


def test_with_yes_it_removes(capsys: Capture, run: Path) -> None:
    ended = lorakit(capsys, "prune", run, "--keep-every", 200, "--yes")
    assert ended.code == 0
    assert "removed 1 checkpoint (" in ended.err
    assert steps(run) == ["checkpoint-200", "checkpoint-300"]


def test_as_json_it_is_the_same_as_data(capsys: Capture, run: Path) -> None:
    (run / "checkpoint-100" / "trainer_state.json").write_text(
        '{"global_step": 100, "log_history": [{"step": 100, "eval_loss": NaN}]}'
    )
    ended = lorakit(capsys, "prune", run, "--keep-best", 1, "-y", "--json")
    report = json.loads(ended.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert [(one["step"], one["stays"]) for one in report["checkpoints"]] == [(100, True), (200, True), (300, True)]
    assert report["checkpoints"][0]["metrics"]["eval_loss"] is None
    assert report["checkpoints"][0]["reasons"] == ["written last"]
    assert (report["removed"], report["dry_run"]) == ([], False)
    gone = json.loads(lorakit(capsys, "prune", run, "--keep-last", "0", "--keep-best", 1, "-y", "--json").out)
    assert gone["removed"] == ["checkpoint-100", "checkpoint-300"]
    assert steps(run) == ["checkpoint-200"]
    assert gone["bytes_staying"] == sum(file.stat().st_size for file in (run / "checkpoint-200").iterdir())


@pytest.mark.parametrize(("answer", "code", "left"), [("y\n", 0, 1), ("n\n", 1, 3), ("\n", 1, 3), ("", 130, 3)])
def test_a_terminal_is_asked(
    capsys: Capture, run: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, left: int
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    ended = lorakit(capsys, "prune", run, "--keep-last", 1)
    assert (ended.code, len(steps(run))) == (code, left)
    assert "Remove 2 checkpoints (" in ended.err
    assert "Remove" not in ended.out


def test_it_asks_nothing_when_nothing_goes(capsys: Capture, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    assert lorakit(capsys, "prune", run, "--keep-last", 3).code == 0


@pytest.mark.parametrize(
    "flags",
    [
        [], ["-y"], ["--keep-last", "0", "-y"], ["--keep-last", "1"], ["--keep-last", "1", "--json"],
        ["--keep-best", "0", "-y"], ["--keep-every", "0", "-y"], ["--keep-for", "7", "-y"],
        ["--max-bytes", "much", "-y"],
        ["--keep-last", "1", "--metric", "eval_f1", "-y"], ["--keep-best", "1", "--metric", "eval_f1", "-y"],
        ["--keep-last", "1", "--mode", "max", "-y"],
    ],
)  # fmt: skip
def test_what_makes_no_sense_ends_with_2_and_removes_nothing(
    capsys: Capture, run: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("y\n"))
    assert lorakit(capsys, "prune", run, *flags).code == 2
    assert len(steps(run)) == 3


def test_what_is_not_there_ends_with_3(capsys: Capture, run: Path) -> None:
    assert lorakit(capsys, "prune", run / "nowhere", "--keep-last", 1, "-y").code == 3
    assert lorakit(capsys, "prune", run.parent, "--keep-last", 1, "-y").code == 3
    ended = lorakit(capsys, "prune", run, "--keep-best", 1, "--metric", "eval_f1", "--mode", "max", "-y")
    assert ended.code == 3
    assert "there are eval_loss" in ended.err
    assert len(steps(run)) == 3


def test_bytes_that_something_else_needs_are_told(capsys: Capture, run: Path) -> None:
    ended = lorakit(capsys, "prune", run, "--max-bytes", "1kB", "-y")
    assert ended.code == 0
    assert "more than --max-bytes 1.0 kB" in ended.err
    assert steps(run) == ["checkpoint-300"]


def test_the_store_may_be_named(capsys: Capture, run: Path, tmp_path: Path) -> None:
    from tests.checkpoints.test_pruning import aliased

    aliased(tmp_path / "other", run / "checkpoint-100")
    ended = lorakit(capsys, "prune", run, "--keep-last", 1, "--home", tmp_path / "other", "-y")
    assert "the store's 'sql@prod' points at it" in ended.out
    assert steps(run) == ["checkpoint-100", "checkpoint-300"]


def test_a_file_says_it_too_and_the_options_keep_more(capsys: Capture, run: Path, tmp_path: Path) -> None:
    (tmp_path / "keep.yaml").write_text("keep_best: 1\n")
    ended = lorakit(capsys, "prune", run, "--config", tmp_path / "keep.yaml", "--keep-every", 100, "--dry-run")
    assert ended.code == 0
    assert all("a multiple of 100 steps" in row for row in ended.out.splitlines()[1:])
    ended = lorakit(capsys, "prune", run, "--config", tmp_path / "keep.yaml", "-y")
    assert ended.code == 0
    assert steps(run) == ["checkpoint-200", "checkpoint-300"]


def test_of_two_sizes_the_larger_counts_and_the_newest_is_spared_unless_either_says_so(
    capsys: Capture, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "keep.yaml").write_text("keep_last: 0\nmax_bytes: 1kB\n")
    lorakit(capsys, "prune", run, "--config", tmp_path / "keep.yaml", "--max-bytes", "1GB", "-y")
    assert len(steps(run)) == 3
    lorakit(capsys, "prune", run, "--config", tmp_path / "keep.yaml", "--keep-best", 1, "-y")
    assert steps(run) == ["checkpoint-200"]


def test_a_file_with_a_mistake_removes_nothing(capsys: Capture, run: Path, tmp_path: Path) -> None:
    (tmp_path / "keep.yaml").write_text("keep_lats: 1\n")
    ended = lorakit(capsys, "prune", run, "--config", tmp_path / "keep.yaml", "-y")
    assert ended.code == 2
    assert "unknown key 'keep_lats'; did you mean 'keep_last'?" in ended.err
    assert lorakit(capsys, "prune", run, "--config", tmp_path / "none.yaml", "-y").code == 3
    assert len(steps(run)) == 3


def test_what_goes_to_the_trash_can_be_taken_back_as_it_was(
    capsys: Capture, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    ended = lorakit(capsys, "prune", run, "--keep-last", 1, "--trash", "-y", "--json")
    said = json.loads(ended.out)
    assert said["removed"] == list(said["trash"]) == ["checkpoint-100", "checkpoint-200"]
    assert f"lorakit undelete {run}/checkpoint-200" in ended.err
    assert steps(run) == [".lorakit", "checkpoint-300"]
    for meant in (run / "checkpoint-100", said["trash"]["checkpoint-200"]):
        assert lorakit(capsys, "undelete", meant).code == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
