"""Looking again and again, by a clock of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from lorakit.server.watcher import Sight, Watcher
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
    (folder / "model.safetensors").touch()
    watch = Watch(tmp_path)
    (sight,) = watch.scan()
    assert sight.look.state == "refused"
    watch.watcher.settle(sight)
    assert watch.scan() == []
    shutil.rmtree(folder)
    put_checkpoint(tmp_path / "sql", 100)
    assert watch.ready() == ["sql 100"]
