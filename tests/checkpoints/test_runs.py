"""Where runs and adapters are in a watched folder, and what they are called."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.checkpoints.metadata import metadata_of, newest_finished
from lorakit.checkpoints.runs import (
    Candidate,
    candidates_of,
    checkpoints_in,
    checkpoints_of,
    find_candidates,
    originals,
)
from lorakit.errors import NotFound
from tests.checkpoints.writings import WRITINGS, Disk, torch_bytes
from tests.checkpoints.written import evaluated, write_checkpoint


def put(*folders: Path) -> None:
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)


def adapter(folder: Path) -> Path:
    put(folder)
    (folder / "adapter_config.json").touch()
    return folder


def found(root: Path) -> list[tuple[str, str, int | None]]:
    return [(one.run, one.kind, one.step) for one in find_candidates(root)]


def test_each_folder_that_holds_checkpoints_is_a_run_of_its_name_in_the_order_of_steps(tmp_path: Path) -> None:
    put(tmp_path / "sql" / "checkpoint-1000", tmp_path / "sql" / "checkpoint-90", tmp_path / "chat" / "checkpoint-5")
    assert found(tmp_path) == [("chat", "step", 5), ("sql", "step", 90), ("sql", "step", 1000)]


def test_a_folder_that_is_an_adapter_is_an_adapter_of_that_name(tmp_path: Path) -> None:
    adapter(tmp_path / "chat")
    put(tmp_path / "nothing")
    assert found(tmp_path) == [("chat", "plain", None)]


def test_a_runs_own_root_is_final_and_comes_last(tmp_path: Path) -> None:
    put(adapter(tmp_path / "sql") / "checkpoint-5")
    assert found(tmp_path) == [("sql", "step", 5), ("sql", "final", None)]


def test_a_watched_folder_with_checkpoints_is_the_run_itself(tmp_path: Path) -> None:
    run = tmp_path / "sql"
    put(run / "checkpoint-5", run / "logs")
    assert found(run) == [("sql", "step", 5)]
    assert find_candidates(run)[0].folder == run / "checkpoint-5"


@pytest.mark.parametrize(
    "name",
    ["checkpoint-", "checkpoint-x", "checkpoint-5-tmp", "tmp-checkpoint-5", ".checkpoint-5", "checkpoint-5.partial",
     "checkpoint--5", "Checkpoint-5", "checkpoint-5 "],
)  # fmt: skip
def test_what_only_looks_like_a_checkpoint_is_none(tmp_path: Path, name: str) -> None:
    put(tmp_path / "sql" / name, tmp_path / "sql" / "checkpoint-1")
    assert found(tmp_path) == [("sql", "step", 1)]


def test_a_file_named_like_a_checkpoint_is_none(tmp_path: Path) -> None:
    put(tmp_path / "sql")
    (tmp_path / "sql" / "checkpoint-5").touch()
    assert found(tmp_path) == []


def test_a_checkpoint_that_is_a_link_counts(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", tmp_path / "runs" / "sql")
    (tmp_path / "runs" / "sql" / "checkpoint-5").symlink_to(tmp_path / "elsewhere")
    assert found(tmp_path / "runs") == [("sql", "step", 5)]


def test_unfinished_writers_folders_are_not_seen(tmp_path: Path) -> None:
    adapter(tmp_path / ".chat.tmp-123")
    adapter(tmp_path / "tmp-checkpoint-5")
    assert found(tmp_path) == []


def test_a_run_may_be_called_anything_that_is_a_name(tmp_path: Path) -> None:
    put(tmp_path / "tmp-idea" / "checkpoint-5")
    assert found(tmp_path) == [("tmp-idea", "step", 5)]


def test_a_watched_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        find_candidates(tmp_path / "nowhere")
    with pytest.raises(OSError, match="nowhere"):
        candidates_of(tmp_path / "nowhere", "sql")


def test_a_folder_that_cant_be_listed_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a" / "checkpoint-1", tmp_path / "b" / "checkpoint-1")
    import os

    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: real(tmp_path / "gone" if Path(path).name == "a" else path))
    assert found(tmp_path) == [("b", "step", 1)]


def test_a_folder_that_was_named_is_a_run_an_adapter_or_one_checkpoint(tmp_path: Path) -> None:
    put(tmp_path / "run" / "checkpoint-5")
    assert candidates_of(tmp_path / "run", "x") == [Candidate(tmp_path / "run" / "checkpoint-5", "x", "step", 5)]
    one = tmp_path / "run" / "checkpoint-5"
    assert candidates_of(one, "x") == [Candidate(one, "x", "step", 5)]
    plain = adapter(tmp_path / "plain")
    assert candidates_of(plain, "x") == [Candidate(plain, "x", "plain")]


def torch_file(file: Path, value: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(torch_bytes(value))


def listed(folder: Path) -> list[tuple[str, int | None]]:
    """The ids and steps that commands see."""
    return [(row.id, row.step) for row in map(metadata_of, checkpoints_in(folder))]


def test_commands_see_the_checkpoints_of_every_writer_in_the_order_of_steps(tmp_path: Path) -> None:
    for name, places in {
        "torchtune": ("epoch_10", "epoch_9"), "litgpt": ("step-000500", "step-001000", "final"),
        "DeepSpeed": ("global_step16", "global_step8"), "distributed": ("step-90", "step-500"),
        "adapter": ("checkpoint-500", "model_checkpoint-500"),
    }.items():  # fmt: skip
        writing = WRITINGS[name]
        for place in places:
            disk = Disk(tmp_path / name.lower() / place)
            for each in (*writing.first, *(other for rank in writing.others for other in rank)):
                disk.file(each).write_bytes(writing.bytes_of(each, 0))
    assert listed(tmp_path / "torchtune") == [("torchtune@epoch_9", None), ("torchtune@epoch_10", None)]
    assert listed(tmp_path / "litgpt") == [
        ("litgpt@step-500", 500), ("litgpt@step-1000", 1000), ("litgpt@final", None),
    ]  # fmt: skip
    assert listed(tmp_path / "deepspeed") == [("deepspeed@step-8", 8), ("deepspeed@step-16", 16)]
    assert listed(tmp_path / "distributed") == [("distributed@step-90", 90), ("distributed@step-500", 500)]
    assert listed(tmp_path / "adapter") == [("adapter@model-step-500", 500), ("adapter@step-500", 500)]
    assert newest_finished(tmp_path / "adapter").folder.name == "checkpoint-500"
    assert len(listed(tmp_path)) == 11
    assert listed(tmp_path / "deepspeed" / "global_step8") == [("deepspeed@step-8", 8)]


def test_what_only_has_a_name_with_a_step_is_no_checkpoint(tmp_path: Path) -> None:
    put(tmp_path / "run" / "step-5", tmp_path / "run" / "epoch_1", tmp_path / "run" / "final")
    (tmp_path / "run" / "step-5" / "notes.txt").touch()
    assert listed(tmp_path / "run") == []


def test_a_deepspeed_step_inside_a_checkpoint_is_a_part_of_it(tmp_path: Path) -> None:
    writing = WRITINGS["adapter with DeepSpeed's state"]
    disk = Disk(tmp_path / "run" / "checkpoint-500")
    for each in (*(other for rank in writing.others for other in rank), *writing.first):
        disk.file(each).write_bytes(writing.bytes_of(each, 0))
    assert listed(tmp_path / "run") == [("run@step-500", 500)]
    assert listed(disk.folder) == [("run@step-500", 500)]


def test_files_are_checkpoints_by_the_step_in_their_names_or_in_themselves(tmp_path: Path) -> None:
    run = tmp_path / "run"
    weights = {"state_dict": {"w": torch.zeros(2)}}
    for name, value in {
        "epoch=1-step=16-val_loss=1.01.ckpt": weights, "last.ckpt": {**weights, "global_step": 24, "epoch": 2},
        "checkpoint_8.pt": weights, "best.pth": weights, "notes.bin": weights, "optimizer.pt": weights,
    }.items():  # fmt: skip
        torch_file(run / name, value)
    (run / "latest.ckpt").symlink_to("last.ckpt")
    assert listed(run) == [("run@best", None), ("run@step-8", 8), ("run@step-16", 16), ("run@last", 24)]
    assert newest_finished(run).folder == run / "last.ckpt"
    assert listed(run / "last.ckpt") == [("run@last", 24)]


def test_files_beside_runs_hide_no_run(tmp_path: Path) -> None:
    torch_file(tmp_path / "model.pt", {"w": torch.zeros(2)})
    put(tmp_path / "sql" / "checkpoint-5")
    assert [id for id, _ in listed(tmp_path)] == [f"{tmp_path.name}@model", "sql@step-5"]


def test_files_of_a_checkpoint_are_no_checkpoints(tmp_path: Path) -> None:
    adapter(tmp_path / "chat")
    torch_file(tmp_path / "chat" / "extra.pt", {"w": torch.zeros(2)})
    assert [id for id, _ in listed(tmp_path)] == ["chat"]


def test_the_server_knows_no_other_runs_than_those_with_checkpoint_folders(tmp_path: Path) -> None:
    writing = WRITINGS["litgpt"]
    for each in writing.first:
        Disk(tmp_path / "lit" / "step-500").file(each).write_bytes(writing.bytes_of(each, 0))
    put(tmp_path / "sql" / "checkpoint-5", tmp_path / "sql" / "model_checkpoint-5")
    assert found(tmp_path) == [("sql", "step", 5)]


def test_copies_and_what_people_named_themselves_are_never_the_newest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    checkpoint = write_checkpoint(run / "checkpoint-2", [evaluated(2, 1.0)])
    for name in ("model_checkpoint-4", "checkpoint-4-old", "checkpoint-2.bak", "checkpoint-10-merged", "step-900"):
        shutil.copytree(checkpoint, run / name)
    (run / "step-900" / "lorakit.json").write_text("{}")
    (run / "before-step-9000").symlink_to("checkpoint-2")
    (run / "checkpoint-9").symlink_to("checkpoint-2")
    assert [id for id, _ in listed(run)] == ["run@step-2", "run@model-step-4", "run@step-900"]
    with caplog.at_level("INFO", "lorakit"):
        assert newest_finished(run).folder == run / "checkpoint-2"
    assert [message.partition(" is newer")[0] for message in caplog.messages] == [
        f"'{run / 'step-900'}'", f"'{run / 'model_checkpoint-4'}'",
    ]  # fmt: skip
    assert [one.folder.name for one in originals(checkpoints_of(run))] == ["checkpoint-2"]
    shutil.rmtree(run / "checkpoint-2")
    assert newest_finished(run).folder == run / "step-900"


def test_two_of_one_step_have_ids_of_their_own(tmp_path: Path) -> None:
    weights = {"state_dict": {"w": torch.zeros(2)}}
    for name in ("epoch=0-step=3.ckpt", "epoch=0-step=3-v1.ckpt", "epoch=1-step=6.ckpt"):
        torch_file(tmp_path / "run" / name, weights)
    assert [id for id, _ in listed(tmp_path / "run")] == [
        "run@epoch=0-step=3-v1", "run@epoch=0-step=3", "run@step-6",
    ]  # fmt: skip
    write_checkpoint(tmp_path / "run" / "checkpoint-4")
    assert [step for _, step in listed(tmp_path / "run")] == [3, 3, 4, 6]


def test_lightnings_own_folders_are_a_run_for_each_version(tmp_path: Path) -> None:
    for version in ("version_0", "version_1"):
        torch_file(tmp_path / "lightning_logs" / version / "checkpoints" / "epoch=0-step=3.ckpt", {"epoch": 0})
    assert [id for id, _ in listed(tmp_path / "lightning_logs")] == ["version_0@step-3", "version_1@step-3"]
    (one,) = checkpoints_of(tmp_path / "lightning_logs" / "version_1")
    assert (one.run, one.folder.name) == ("version_1", "epoch=0-step=3.ckpt")


def test_a_link_that_leads_in_a_circle_hides_nothing(tmp_path: Path) -> None:
    run = tmp_path / "sql"
    write_checkpoint(run / "checkpoint-5")
    for folder in (tmp_path, run, run / "checkpoint-5"):
        (folder / "loop").symlink_to("loop")
    assert found(tmp_path) == [("sql", "step", 5)]
    assert listed(tmp_path) == [("sql@step-5", 5)]
    assert newest_finished(run).step == 5


def test_a_file_of_a_checkpoint_is_none(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "sql" / "checkpoint-5")
    (folder / "training_args.bin").write_bytes(torch_bytes({}))
    with pytest.raises(NotFound, match=r"is a part of the checkpoint '.*checkpoint-5': name that"):
        newest_finished(folder / "training_args.bin")
