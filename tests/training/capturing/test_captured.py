"""The folder of a capture: whose it is, whether its program lives, and that nothing is removed that is not kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorakit.training.capturing.appearing import Spot, Stamp, spots_in
from lorakit.training.capturing.captured import Captured, abandoned_captures, new_capture
from tests.checkpoints.written import write_checkpoint


@pytest.fixture
def captured(tmp_path: Path) -> Captured:
    with new_capture(tmp_path, "sql", None) as captured:
        assert list(abandoned_captures(tmp_path)) == []
        return captured


def test_it_is_abandoned_when_its_process_is_gone(captured: Captured, tmp_path: Path) -> None:
    assert list(abandoned_captures(tmp_path)) == [captured]


def test_its_program_lives_while_anybody_has_the_lock(captured: Captured) -> None:
    assert not captured.trainer_lives
    lock = captured.trainer_lock()
    inherited = os.dup(lock)
    os.close(lock)
    assert captured.trainer_lives
    os.close(inherited)
    assert not captured.trainer_lives


def test_what_is_kept_goes_and_all_else_stays(captured: Captured) -> None:
    write_checkpoint(captured.output / "checkpoint-1")
    write_checkpoint(captured.output / "sql" / "checkpoint-2")
    (captured.output / "notes.txt").write_text("mine")
    assert not captured.clear(spots_in(captured.output), all_kept=True)
    assert [path.name for path in captured.output.iterdir()] == ["notes.txt"]
    (captured.output / "notes.txt").unlink()
    assert not captured.clear((), all_kept=False)
    assert captured.folder.exists()
    assert captured.clear((), all_kept=True)
    assert not captured.folder.exists()


def test_a_root_of_files_and_folders_goes_too(captured: Captured) -> None:
    inner = captured.output / "pytorch_model_fsdp_0" / "__0_0.distcp"
    inner.parent.mkdir()
    inner.write_bytes(b"x")
    (captured.output / "random_states_0.pkl").write_bytes(b"x")
    root = Spot(captured.output, ".", frozenset({"pytorch_model_fsdp_0", "random_states_0.pkl", "gone.json"}))
    assert captured.clear([root], all_kept=True)


def test_a_folder_that_was_named_stays_as_it_is(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out" / "checkpoint-1")
    with new_capture(tmp_path / "home", "sql", tmp_path / "out") as captured:
        assert list(captured.recorded()) == ["checkpoint-1"]
        captured.holds.mkdir(parents=True)
        assert captured.clear(spots_in(captured.output), all_kept=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-1"]


def test_one_that_can_not_be_read_is_told_and_removed_only_if_nothing_is_in_it(
    captured: Captured, tmp_path: Path
) -> None:
    write_checkpoint(captured.output / "checkpoint-1")
    (captured.folder / "capture.json").write_bytes(bytes(40))
    assert [(other.run, other.output) for other in abandoned_captures(tmp_path)] == [("", captured.output)]
    assert (captured.output / "checkpoint-1").is_dir()
    captured.clear(spots_in(captured.output), all_kept=False)
    assert list(abandoned_captures(tmp_path)) == []
    assert not captured.folder.exists()


def test_lines_that_a_crash_cut_short_are_passed_over(captured: Captured) -> None:
    stamp = Stamp("1", 2, frozenset({("file", 3, 4, 5)}))
    captured.record("a", stamp)
    with (captured.folder / "taken").open("a") as lines:
        lines.write('["b", "2')
    assert captured.recorded() == {"a": stamp}
    assert captured.recorded()["a"].entries == stamp.entries
