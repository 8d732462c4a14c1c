"""What people called checkpoints."""

from __future__ import annotations

from pathlib import Path

from lorakit.checkpoints.given_names import with_given_names
from lorakit.checkpoints.metadata import Metadata, metadata_of
from lorakit.checkpoints.runs import checkpoints_of
from lorakit.training.requests import name_checkpoint
from tests.checkpoints.written import write_checkpoint


def test_a_name_that_a_save_was_asked_for_under_is_an_alias_of_that_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "sql"
    for step in (5, 10):
        write_checkpoint(run / f"checkpoint-{step}")
    for name in ("before-lr-drop", "again"):
        assert name_checkpoint(run, name, "checkpoint-5") is None
    (run / "elsewhere").symlink_to(tmp_path)
    rows = [metadata_of(candidate) for candidate in checkpoints_of(run)]
    assert [row.aliases for row in with_given_names(rows)] == [("again", "before-lr-drop"), ()]


def test_what_the_store_calls_it_stands_first_and_what_is_gone_has_no_more(tmp_path: Path) -> None:
    (tmp_path / "mine").symlink_to("checkpoint-5")
    row = Metadata("sql@step-5", str(tmp_path / "checkpoint-5"), "sql", 5, aliases=("prod",))
    gone = Metadata("a@step-5", str(tmp_path / "nowhere" / "checkpoint-5"), "a", 5)
    assert [one.aliases for one in with_given_names([row, gone])] == [("prod", "mine"), ()]
