"""A checkpoint on disk is put into the store, when it is finished."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorakit.checkpoints import adding
from lorakit.checkpoints.adding import add_checkpoint, to_add
from lorakit.errors import Incomplete, Refused
from lorakit.store.kept import find_kept
from tests.checkpoints.written import evaluated, write_checkpoint
from tests.folders import write_adapter
from tests.training.capturing.captures import files_of


def test_a_checkpoint_is_kept_with_all_that_is_known_of_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "sql" / "checkpoint-500", [evaluated(500, 0.25)])
    kept = add_checkpoint(to_add(folder), tmp_path / "home")
    assert (kept.run, kept.step, kept.facts.eval_loss, kept.writer) == ("sql", 500, 0.25, "transformers")
    assert files_of(kept.folder) == files_of(folder)
    assert add_checkpoint(to_add(folder), tmp_path / "home").uid == kept.uid
    assert add_checkpoint(to_add(folder, "mine"), tmp_path / "home").run == "mine"


def test_a_runs_last_save_is_kept_without_its_checkpoints(tmp_path: Path) -> None:
    run = write_adapter(tmp_path / "sql")
    write_checkpoint(run / "checkpoint-5")
    (run / "mine").symlink_to("checkpoint-5")
    addition = to_add(run)
    kept = add_checkpoint(addition, tmp_path / "home")
    assert (addition.name, kept.label) == ("sql@final", "final")
    assert sorted(files_of(kept.folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert find_kept("sql@final", tmp_path / "home") == kept


def test_a_single_file_and_a_name_that_was_given(tmp_path: Path) -> None:
    import torch

    write_checkpoint(tmp_path / "sql" / "checkpoint-5")
    (tmp_path / "sql" / "mine").symlink_to("checkpoint-5")
    assert to_add(tmp_path / "sql" / "mine").name == "sql@step-5"
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "sql" / "step_7.pt")
    kept = add_checkpoint(to_add(tmp_path / "sql" / "step_7.pt"), tmp_path / "home")
    assert [path.name for path in kept.folder.iterdir()] == ["step_7.pt"]


def test_what_is_not_finished_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_adapter(tmp_path / "checkpoint-5")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(Incomplete, match="can't be kept: adapter_model"):
        to_add(folder)
    going_on = write_adapter(tmp_path / "other")
    monkeypatch.setattr(adding.time, "sleep", lambda _: os.utime(going_on / "adapter_config.json"))
    with pytest.raises(Incomplete, match="was written to just now"):
        to_add(going_on)
    assert not (tmp_path / "home").exists()


def test_what_was_left_alone_for_long_is_waited_for_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_adapter(tmp_path / "a")
    monkeypatch.setattr(adding.time, "time", lambda: folder.stat().st_ctime + 60)
    monkeypatch.setattr(adding.time, "sleep", lambda seconds: None if seconds == 0 else pytest.fail("it waits"))
    assert to_add(folder).name == "a"


def test_what_is_written_to_between_the_look_and_the_copy_is_not_kept(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "sql" / "checkpoint-5")
    addition = to_add(folder)
    (folder / "adapter_config.json").write_text((folder / "adapter_config.json").read_text() + " ")
    with pytest.raises(Incomplete):
        add_checkpoint(addition, tmp_path / "home")
    assert find_kept("sql", tmp_path / "home") is None


def test_a_run_that_can_not_be_called_so_is_refused(tmp_path: Path) -> None:
    addition = to_add(write_checkpoint(tmp_path / "latest" / "checkpoint-5"))
    with pytest.raises(Refused, match="latest"):
        add_checkpoint(addition, tmp_path / "home")
