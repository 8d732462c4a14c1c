"""Looking again and again, by a clock of its own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from lorakit.server.following import watcher
from lorakit.server.following.watcher import Sight, Watcher
from tests.server.fake_engine import overwrite, put_adapter, put_checkpoint


class Watch:
    def __init__(self, *roots: Path, **named: Path) -> None:
        self.now = 100.0
        self.watcher = Watcher(roots, named, quiet=2.0, clock=lambda: self.now)

    def scan(self, after: float = 0.0) -> list[Sight]:
        self.now += after
        return self.watcher.scan()

    def ready(self, after: float = 0.0) -> list[str]:
        """The names and steps of what is ready now; it is settled by that."""
        found = [sight for sight in self.scan(after) if sight.ready]
        for sight in found:
            self.watcher.settle(sight)
        return [f"{sight.candidate.run} {sight.candidate.step}" for sight in found]


def test_a_finished_checkpoint_is_ready_at_the_first_look_and_looked_at_no_more(tmp_path: Path) -> None:
    put_checkpoint(tmp_path / "sql", 100)
    watch = Watch(tmp_path)
    assert watch.ready() == ["sql 100"]
    assert watch.scan() == []


def test_checkpoints_come_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (1000, 20, 300):
        put_checkpoint(tmp_path / "sql", step)
    assert Watch(tmp_path).ready() == ["sql 20", "sql 300", "sql 1000"]


def test_without_a_marker_it_has_to_stay_as_it_is_for_the_quiet_time(tmp_path: Path) -> None:
    folder = put_adapter(tmp_path / "chat")
    watch = Watch(tmp_path)
    assert watch.ready() == []
    assert watch.ready(1.9) == []
    overwrite(folder, 2)
    assert watch.ready(0.2) == []
    assert watch.ready(1.9) == []
    assert watch.ready(0.2) == ["chat None"]


def test_one_look_is_never_enough_without_a_marker_however_late_it_comes(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    put_adapter(tmp_path / "chat")
    assert watch.ready(1000) == []


def test_what_was_settled_is_seen_again_when_it_is_written_again(tmp_path: Path) -> None:
    folder = put_checkpoint(tmp_path / "sql", 100)
    watch = Watch(tmp_path)
    assert watch.ready() == ["sql 100"]
    overwrite(folder, 2)
    assert watch.ready() == ["sql 100"]


def test_what_changed_after_it_was_looked_at_is_not_settled_by_that_look(tmp_path: Path) -> None:
    folder = put_checkpoint(tmp_path / "sql", 100)
    watch = Watch(tmp_path)
    (sight,) = watch.scan()
    overwrite(folder, 2)
    watch.watcher.settle(sight)
    assert watch.ready() == ["sql 100"]


def test_a_folder_that_went_away_and_came_back_is_new(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    folder = put_checkpoint(tmp_path / "sql", 100)
    assert watch.ready() == ["sql 100"]
    shutil.rmtree(folder)
    assert watch.ready() == []
    put_checkpoint(tmp_path / "sql", 100)
    assert watch.ready() == ["sql 100"]


def test_early_is_what_was_there_as_it_is_at_the_first_look(tmp_path: Path) -> None:
    put_adapter(tmp_path / "a")
    changed = put_adapter(tmp_path / "b")
    watch = Watch(tmp_path)
    assert [sight.early for sight in watch.scan()] == [True, True]
    overwrite(changed, 2)
    put_adapter(tmp_path / "c")
    assert [sight.early for sight in watch.scan(1.0)] == [True, False, False]


def test_a_watched_folder_that_is_not_there_may_come(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "later", tmp_path / "runs")
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    assert watch.ready() == ["sql 100"]
    put_checkpoint(tmp_path / "later" / "chat", 5)
    assert watch.ready() == ["chat 5"]


def test_a_named_folder_that_is_not_there_is_missing_until_it_comes(tmp_path: Path) -> None:
    watch = Watch(chat=tmp_path / "chat")
    assert watch.ready() == []
    assert watch.watcher.missing == {"chat": tmp_path / "chat"}
    put_checkpoint(tmp_path / "chat", 5)
    assert watch.ready() == ["chat 5"]
    assert watch.watcher.missing == {}


def test_one_folder_under_two_names_is_seen_under_both(tmp_path: Path) -> None:
    put_checkpoint(tmp_path / "sql", 100)
    watch = Watch(tmp_path, prod=tmp_path / "sql" / "checkpoint-100")
    assert watch.ready() == ["prod 100", "sql 100"]
    assert watch.scan() == []


def test_a_refused_folder_is_looked_at_again_when_its_weights_come(tmp_path: Path) -> None:
    folder = tmp_path / "sql" / "checkpoint-100"
    folder.mkdir(parents=True)
    (folder / "adapter_model.bin").touch()
    (folder / "adapter_config.json").write_text("{}")
    watch = Watch(tmp_path)
    (sight,) = watch.scan()
    assert sight.look.state == "refused"
    watch.watcher.settle(sight)
    assert watch.scan() == []
    shutil.rmtree(folder)
    put_checkpoint(tmp_path / "sql", 100)
    assert watch.ready() == ["sql 100"]


def test_what_nothing_is_written_to_for_an_hour_is_stalled_until_something_is(tmp_path: Path) -> None:
    folder = put_checkpoint(tmp_path / "sql", 100)
    (folder / "adapter_config.json").unlink()
    watch = Watch(tmp_path)
    assert [sight.stalled for after in (0, 3000, 599) for sight in watch.scan(after)] == [False] * 3
    (sight,) = watch.scan(1)
    assert (sight.stalled, sight.ready, sight.look.state) == (True, False, "incomplete")
    assert sight.look.reason == "adapter_config.json is not there yet; nothing was written for more than 1 h"
    watch.watcher.settle(sight)
    assert watch.scan(1) == []
    (folder / "adapter_config.json").write_text("{")
    (sight,) = watch.scan(1)
    assert not sight.stalled


def test_what_grows_does_not_stall(tmp_path: Path) -> None:
    folder = tmp_path / "sql" / "checkpoint-100"
    (folder / "global_step100").mkdir(parents=True)
    watch = Watch(tmp_path)
    for written in range(5):
        (folder / "global_step100" / "mp_rank_00_model_states.pt").write_bytes(bytes(written))
        assert [sight.stalled for sight in watch.scan(3000)] == [False]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "trainer_state.json"])
def test_a_rewrite_in_place_is_seen_in_a_run_of_any_length(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "GLANCES", 3)
    monkeypatch.setattr(watcher, "NEWEST", 2)
    folders = [put_checkpoint(tmp_path / "sql", step) for step in range(1, 13)]
    watch = Watch(tmp_path)
    assert len(watch.ready()) == 12
    for folder in folders:
        with (folder / name).open("r+b") as file:  # the same inode, the same size
            first = file.read(1)
            file.seek(0)
            file.write(first)
        os.utime(folder / name, ns=(10**18, 10**18))
        seen = [sight.candidate.folder for _ in range(4) for sight in seen_once(watch)]
        assert seen == [folder]
    assert watch.scan() == []


def seen_once(watch: Watch) -> list[Sight]:
    sights = watch.scan()
    for sight in sights:
        watch.watcher.settle(sight)
    return sights


def test_the_newest_of_a_long_run_are_asked_at_every_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "GLANCES", 1)
    monkeypatch.setattr(watcher, "NEWEST", 2)
    folders = [put_checkpoint(tmp_path / "sql", step) for step in range(1, 9)]
    watch = Watch(tmp_path)
    watch.ready()
    for turn in range(5):
        overwrite(folders[-2], turn + 2)
        assert watch.ready() == ["sql 7"]


def test_in_a_long_run_what_comes_is_seen_at_the_next_scan_and_what_goes_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "GLANCES", 3)
    folders = [put_checkpoint(tmp_path / "sql", step) for step in range(1, 9)]
    watch = Watch(tmp_path)
    watch.ready()
    assert [watch.ready(after) for after in (2.5, 0.5)] == [[], []]  # from here on the folder is not listed again
    folders.append(put_checkpoint(tmp_path / "sql", 50))
    assert watch.ready(0.5) == ["sql 50"]
    for folder in folders[:8]:
        shutil.rmtree(folder)
    assert watch.ready(0.5) == []
    assert list(watch.watcher.places) == [("sql", folders[8])]


def test_a_long_run_is_listed_again_though_its_folder_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "GLANCES", 3)
    for step in range(1, 9):
        put_checkpoint(tmp_path / "sql", step)
    told = watcher._times
    monkeypatch.setattr(watcher, "_times", lambda path: (0, 0, 0, 0) if path == f"{tmp_path}/sql" else told(path))
    watch = Watch(tmp_path)
    watch.ready()
    watch.ready(2.5)
    put_checkpoint(tmp_path / "sql", 50)
    assert watch.ready(1.0) == []
    assert watch.ready(watcher.RELISTED) == ["sql 50"]
