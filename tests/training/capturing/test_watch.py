"""Every checkpoint is held once it is finished, each of its versions; what was not is said to be lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.training.capturing.appearing import Spot, spots_in, stamp_of
from lorakit.training.capturing.watch import Watch
from tests.checkpoints.written import write_checkpoint
from tests.training.capturing.captures import Files, files_of


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def watch(output: Path, tmp_path: Path) -> Watch:
    return Watch(output, tmp_path / "held", {})


def names(watch: Watch, now: float = 0.0, *, ended: bool = False) -> list[str]:
    held, missing = watch.scan(now, ended=ended)
    assert missing == []
    return [one.spot for one in held]


def lost(watch: Watch, now: float = 0.0) -> list[str]:
    held, missing = watch.scan(now)
    assert held == []
    return [one.name for one in missing]


def test_what_is_finished_is_held_at_the_first_look_and_once(output: Path, watch: Watch) -> None:
    write_checkpoint(output / "checkpoint-1")
    assert names(watch) == ["checkpoint-1"]
    assert names(watch, 9.0) == []
    assert watch.left() == []


def test_what_only_time_can_call_finished_counts_after_quiet_time_or_at_the_end(output: Path, watch: Watch) -> None:
    write_checkpoint(output / "checkpoint-1")
    (output / "checkpoint-1" / "trainer_state.json").unlink()
    assert names(watch, 10.0) == []
    assert names(watch, 11.9) == []
    (output / "checkpoint-1" / "README.md").write_text("x")
    assert names(watch, 12.1) == []
    assert names(watch, 14.1) == ["checkpoint-1"]
    write_checkpoint(output / "final")
    (output / "final" / "trainer_state.json").unlink()
    assert names(watch, 15.0, ended=True) == ["final"]


def test_what_is_not_finished_is_left_with_the_reason(output: Path, watch: Watch) -> None:
    write_checkpoint(output / "checkpoint-1")
    (output / "checkpoint-1" / "adapter_config.json").unlink()
    assert names(watch, ended=True) == []
    (left,) = watch.left()
    assert (left.what, left.name) == ("left", "checkpoint-1")
    assert "adapter_config.json" in left.reason


def test_what_is_written_over_is_held_again(output: Path, watch: Watch) -> None:
    write_checkpoint(output / "checkpoint-1")
    assert names(watch) == ["checkpoint-1"]
    shutil.rmtree(output / "checkpoint-1")
    write_checkpoint(output / "checkpoint-1", seed=2)
    assert names(watch) == ["checkpoint-1"]


def test_what_is_being_removed_is_no_new_version_and_is_not_lost(output: Path, watch: Watch) -> None:
    write_checkpoint(output / "checkpoint-1")
    assert names(watch) == ["checkpoint-1"]
    for path in sorted((output / "checkpoint-1").iterdir()):
        path.unlink()
        assert names(watch, 100.0) == []
    (output / "checkpoint-1").rmdir()
    assert names(watch) == []


def test_what_went_away_before_it_was_held_is_lost(output: Path, watch: Watch) -> None:
    write_checkpoint(output / "checkpoint-1")
    (output / "checkpoint-1" / "trainer_state.json").unlink()
    assert names(watch) == []
    shutil.rmtree(output / "checkpoint-1")
    assert lost(watch) == ["checkpoint-1"]
    assert lost(watch) == []


def test_what_nobody_could_look_at_is_lost_too(output: Path, watch: Watch) -> None:
    names(watch)
    shutil.rmtree(write_checkpoint(output / "checkpoint-1"))
    (output / "log.txt").write_text("x")
    (output / "log.txt").unlink()
    assert lost(watch) == ["checkpoint-1"]


def test_without_notices_what_is_there_is_held_all_the_same(output: Path, watch: Watch) -> None:
    watch.notices.close()
    write_checkpoint(output / "checkpoint-1")
    assert names(watch) == ["checkpoint-1"]


def test_what_is_renamed_is_not_lost(output: Path, watch: Watch) -> None:
    write_checkpoint(output / "checkpoint-1")
    (output / "checkpoint-1" / "trainer_state.json").unlink()
    assert names(watch) == []
    (output / "checkpoint-1").rename(output / "best")
    assert names(watch, ended=True) == ["best"]


def test_what_became_a_part_of_a_root_is_not_lost(output: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = output / "optimizer_0"
    optimizer.mkdir()
    (optimizer / "__0_0.distcp").write_bytes(b"x")
    assert names(watch) == []
    (optimizer / "__0_0.distcp").write_bytes(b"more")
    root = Spot(output, ".", frozenset({"optimizer_0"}))
    monkeypatch.setattr("lorakit.training.capturing.watch.spots_in", lambda _: [root])
    assert names(watch, 1.0) == []


def test_what_was_there_before_is_left_alone_until_it_is_written_over(output: Path, tmp_path: Path) -> None:
    write_checkpoint(output / "checkpoint-1")
    (spot,) = spots_in(output)
    stamp = stamp_of(spot)
    assert stamp is not None
    watch = Watch(output, tmp_path / "held", {"checkpoint-1": stamp})
    assert names(watch, ended=True) == []
    assert watch.left() == []
    (output / "checkpoint-1" / "trainer_state.json").write_text('{"global_step": 1}')
    assert names(watch, ended=True) == ["checkpoint-1"]


def test_several_are_held_in_the_order_in_which_they_were_written(output: Path, watch: Watch) -> None:
    import os

    for order, step in enumerate((30, 5, 100)):
        folder = write_checkpoint(output / f"checkpoint-{step}")
        for path in folder.iterdir():
            os.utime(path, ns=(order * 10**9, order * 10**9))
    assert names(watch) == ["checkpoint-30", "checkpoint-5", "checkpoint-100"]


def test_a_folder_that_went_away_holds_nothing(output: Path, watch: Watch) -> None:
    write_checkpoint(output / "checkpoint-1")
    names(watch)
    shutil.rmtree(output)
    assert names(watch) == []


def missed(watch: Watch, now: float = 0.0, *, ended: bool = False) -> list[tuple[str, str]]:
    return [(one.name, one.reason) for one in watch.scan(now, ended=ended)[1]]


def save_torch(path: Path, value: object) -> None:
    import torch

    torch.save(value, path)


def test_versions_that_were_written_over_unseen_are_lost_by_their_number(output: Path, watch: Watch) -> None:
    assert missed(watch) == []
    for step in range(4):
        save_torch(output / "model.pt.tmp", {"step": step})
        (output / "model.pt.tmp").rename(output / "model.pt")
    assert missed(watch, ended=True) == [
        ("model.pt", "3 versions of it were written over or removed before it could be held")
    ]
    assert missed(watch, ended=True) == []


def test_versions_of_a_folder_count_by_its_weights(output: Path, watch: Watch, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    (output / "last").mkdir()
    names(watch)
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        for _ in range(3 if name.startswith("adapter_model") else 5):
            shutil.copy(source / (name if name != "README.md" else "adapter_config.json"), output / "last" / ".tmp")
            (output / "last" / ".tmp").rename(output / "last" / name)
    assert missed(watch, ended=True) == [
        ("last", "2 versions of it were written over or removed before it could be held")
    ]


def test_what_appears_in_a_run_within_and_is_gone_again_is_lost_too(output: Path, watch: Watch) -> None:
    write_checkpoint(output / "sql" / "checkpoint-1")
    assert names(watch) == ["sql/checkpoint-1"]
    shutil.rmtree(write_checkpoint(output / "sql" / "checkpoint-2"))
    assert lost(watch) == ["sql/checkpoint-2"]


def test_what_was_written_again_and_removed_before_a_look_is_lost(output: Path, watch: Watch) -> None:
    write_checkpoint(output / "checkpoint-1")
    assert names(watch) == ["checkpoint-1"]
    for _ in range(2):
        shutil.rmtree(output / "checkpoint-1")
        write_checkpoint(output / "checkpoint-1")
    shutil.rmtree(output / "checkpoint-1")
    assert missed(watch) == [("checkpoint-1", "2 versions of it were written over or removed before it could be held")]


def test_more_than_the_kernel_can_tell_of_is_said(output: Path, watch: Watch) -> None:
    names(watch)
    watch.notices.overflowed = True
    assert [reason for _, reason in missed(watch)] == [
        "more was written at once than the kernel could tell of: versions may be missed"
    ]


def test_what_holds_no_model_is_left(output: Path, watch: Watch) -> None:
    import io

    import torch

    legacy = io.BytesIO()
    torch.save({"w": torch.ones(1000)}, legacy, _use_new_zipfile_serialization=False)
    (output / "ckpt.pt").write_bytes(legacy.getvalue()[:2000])
    (output / "train.bin").write_bytes(bytes(range(1, 200)))
    (output / "ckpt.pth").write_bytes(b"ab")
    save_torch(output / "optimizer.pt", {"state": {}, "param_groups": []})
    save_torch(output / "small.pt", {"w": torch.ones(3), "step": 1})
    assert names(watch, ended=True) == ["small.pt"]
    assert {one.name: one.reason for one in watch.left()} == dict.fromkeys(
        ("ckpt.pt", "ckpt.pth", "train.bin"), "no model is in it, as far as can be told"
    )


def test_what_was_taken_and_is_half_removed_is_no_new_version(output: Path, tmp_path: Path) -> None:
    write_checkpoint(output / "checkpoint-1")
    save_torch(output / "checkpoint-1" / "optimizer.pt", {})
    (spot,) = spots_in(output)
    stamp = stamp_of(spot)
    assert stamp is not None
    (output / "checkpoint-1" / "optimizer.pt").unlink()
    watch = Watch(output, tmp_path / "held", {"checkpoint-1": stamp})
    assert names(watch, ended=True) == []
    assert watch.left() == []


def test_only_checkpoints_count_as_changes(output: Path, watch: Watch) -> None:
    (output / "logs").mkdir()
    (output / "logs" / "events").write_text("x")
    names(watch, 5.0)
    assert watch.changed == 0.0
    (output / "checkpoint-1").mkdir()
    names(watch, 6.0)
    assert watch.changed == 6.0


ORDER = ("adapter_model.safetensors", "adapter_config.json", "trainer_state.json")
STEPS = st.integers(1, 3)
DEEDS = st.sampled_from(["write", "write", "write", "remove", "look", "look", "wait"])


@settings(max_examples=60)
@given(st.lists(st.tuples(DEEDS, STEPS), max_size=30))
def test_whatever_a_trainer_does_only_finished_states_are_held_and_the_last_ones_are(
    tmp_path_factory: pytest.TempPathFactory, work: list[tuple[str, int]]
) -> None:
    place = tmp_path_factory.mktemp("watch")
    source, output = write_checkpoint(place / "source"), place / "out"
    output.mkdir()
    watch, now, version = Watch(output, place / "held", {}), 0.0, 0
    written: dict[int, int] = {}  # how many files of each are there
    finished: list[tuple[int, Files]] = []
    held: list[tuple[str, Files]] = []

    def look(*, ended: bool = False) -> None:
        held.extend((one.spot, files_of(one.path)) for one in watch.scan(now, ended=ended)[0])

    for what, step in work:
        folder = output / f"checkpoint-{step}"
        if what == "write":
            version += 1
            number = written.get(step, 0) % len(ORDER)
            if number == 0:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
            content = bytearray((source / ORDER[number]).read_bytes())
            if number == 0:
                content[-8:-4] = version.to_bytes(4, "little")
            if number == 2:
                content = bytearray(json.dumps({"global_step": step}).encode())
            (folder / ORDER[number]).write_bytes(content)
            written[step] = number + 1
            if written[step] == len(ORDER):
                finished.append((step, files_of(folder)))
        elif what == "remove":
            shutil.rmtree(folder, ignore_errors=True)
            written[step] = 0
        elif what == "wait":
            now += 0.5
        else:
            look()
    look()
    assert all((int(name.rpartition("-")[2]), files) in finished for name, files in held)
    for step, count in written.items():
        if count == len(ORDER):
            last = [files for number, files in finished if number == step][-1]
            assert (f"checkpoint-{step}", last) in held
    watch.notices.close()
