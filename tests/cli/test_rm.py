"""`lorakit rm`: into the trash, or for good, after a question."""

from __future__ import annotations

import json
import shutil
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from lorakit.store.catalog import Facts
from lorakit.store.kept import Kept, kept_in
from lorakit.store.serving import serving
from lorakit.store.store import Store
from lorakit.store.trash import GRACE, find_stored, trash_path, trash_stored, trashed_in
from tests.checkpoints.test_pruning import put
from tests.cli.commands import lorakit
from tests.cli.test_prune import Terminal
from tests.store.kept import kept
from tests.store.test_store import add

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    put(tmp_path / "sql", 100, 0.5)
    return tmp_path / "sql" / "checkpoint-100"


@pytest.fixture
def one(home: Path, tmp_path: Path) -> Kept:
    return kept(home, tmp_path / "one", run="chat")


def test_it_says_what_is_in_the_trash_until_when_and_how_to_take_it_back(
    capsys: Capture, home: Path, checkpoint: Path, one: Kept
) -> None:
    ended = lorakit(capsys, "rm", checkpoint, one.id, "-y")
    assert (ended.code, ended.out) == (0, "")
    lying = {trashed.name: trashed for trashed in trashed_in(home)}
    assert lying.keys() == {str(checkpoint), one.id}
    for trashed, line in zip(lying.values(), ended.err.splitlines(), strict=True):
        assert line.startswith(f"{trashed.name} (")
        assert line.endswith(f"lorakit undelete {trashed.uid[:8]}")
    assert not checkpoint.exists()
    assert kept_in(home) == []


def test_as_json_it_is_the_same_as_data(capsys: Capture, home: Path, one: Kept) -> None:
    said = json.loads(lorakit(capsys, "rm", one.uid, "--yes", "--json").out)
    (lying,) = trashed_in(home)
    assert said == {
        "dry_run": False,
        "removed": [{"name": one.id, "size": one.size, "uid": one.uid, "until": lying.until}],
        "failed": [],
    }


def test_two_records_of_one_name_are_two(capsys: Capture, home: Path) -> None:
    uids = []
    for base in ("llama", "mistral"):
        store = Store(home, base)
        uids.append(store.uid(add(store).id))
        store.close()
    said = json.loads(lorakit(capsys, "rm", *uids, "-y", "--json").out)
    assert [removed["uid"] for removed in said["removed"]] == uids


def test_one_that_fails_hides_neither_those_before_it_nor_those_after_it(
    capsys: Capture, home: Path, one: Kept, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.checkpoints import removal

    other = put(checkpoint.parent, 200)
    execute = removal.execute_removal

    def raced(plan: removal.Removal, *arguments: Any, **more: Any) -> Any:
        if plan.what == checkpoint:
            shutil.rmtree(checkpoint)
        return execute(plan, *arguments, **more)

    monkeypatch.setattr(removal, "execute_removal", raced)
    ended = lorakit(capsys, "rm", one.id, checkpoint, other, "-y", "--json")
    assert ended.code == 3
    said = json.loads(ended.out)
    assert [removed["name"] for removed in said["removed"]] == [one.id, str(other)]
    assert said["failed"] == [{"name": str(checkpoint), "reason": f"'{checkpoint}' is gone"}]
    first, second, third = ended.err.splitlines()
    assert first.startswith(f"{one.id} (")
    assert second == f"error: {checkpoint}: '{checkpoint}' is gone"
    assert third.startswith(f"{other} (")


def test_what_is_in_the_way_of_old_trash_is_said_and_not_in_the_way(
    capsys: Capture, home: Path, one: Kept, checkpoint: Path, tmp_path: Path
) -> None:
    trash_path(checkpoint, home, now=0.0)
    (checkpoint.parent / ".lorakit").rename(tmp_path / "elsewhere")
    (checkpoint.parent / ".lorakit").symlink_to(tmp_path / "elsewhere")
    ended = lorakit(capsys, "rm", one.id, "-y")
    assert ended.code == 0
    assert f"note: '{checkpoint}' is not deleted: " in ended.err


def test_one_path_that_can_not_be_written_down_keeps_all_where_they_are(
    capsys: Capture, home: Path, checkpoint: Path, tmp_path: Path
) -> None:
    odd = put(tmp_path / "s\nl", 100)
    assert lorakit(capsys, "rm", checkpoint, odd, "-y").code == 4
    assert checkpoint.is_dir()


def test_one_checkpoint_by_two_paths_is_one(capsys: Capture, home: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(checkpoint.parent)
    ended = lorakit(capsys, "rm", checkpoint, tmp_path / "link" / "checkpoint-100", "-y")
    assert (ended.code, len(trashed_in(home))) == (0, 1)


def test_what_a_server_may_still_have_to_read_goes_into_the_trash_alone(capsys: Capture, home: Path) -> None:
    store = Store(home, "llama")
    first, last = (add(store, step=step, content=str(step), facts=Facts(step=step)) for step in (100, 200))
    store.move_alias("sql", "", last.id, "follow")
    store.close()
    with serving(home, "llama"):
        ended = lorakit(capsys, "rm", first.name, "--purge", "-y")
        assert ended.code == 5
        assert "leave out --purge" in ended.err
        assert lorakit(capsys, "rm", first.name, "-y").code == 0
        assert lorakit(capsys, "store", "gc", "--older-than", "0s").code == 0
    assert first.folder.is_dir()


def test_a_dry_run_removes_nothing(capsys: Capture, home: Path, one: Kept, checkpoint: Path) -> None:
    ended = lorakit(capsys, "rm", one.id, checkpoint, "--dry-run")
    assert (ended.code, ended.err.count("would go")) == (0, 2)
    said = json.loads(lorakit(capsys, "rm", one.id, "--dry-run", "--json").out)
    assert said["removed"] == [{"name": one.id, "size": one.size, "uid": None, "until": None}]
    assert kept_in(home) == [one]
    assert checkpoint.is_dir()


def test_for_good_means_for_good(capsys: Capture, home: Path, one: Kept, checkpoint: Path) -> None:
    ended = lorakit(capsys, "rm", one.id, checkpoint, "--purge", "-y")
    assert ended.err.count("is gone for good") == 2
    assert trashed_in(home) == []
    assert not one.folder.exists()
    assert not checkpoint.exists()


@pytest.mark.parametrize(("answer", "code", "left"), [("y\n", 0, 0), ("n\n", 1, 1), ("", 130, 1)])
def test_a_terminal_is_asked(
    capsys: Capture, home: Path, one: Kept, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, left: int
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    ended = lorakit(capsys, "rm", one.id)
    assert (ended.code, len(kept_in(home))) == (code, left)
    assert f"Move to the trash: {one.id} (" in ended.err


def test_with_nobody_to_ask_it_ends_with_2(
    capsys: Capture, home: Path, one: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("y\n"))
    assert lorakit(capsys, "rm", one.id).code == 2
    assert lorakit(capsys, "rm", one.id, "--json").code == 2
    assert lorakit(capsys, "rm", "-y").code == 2
    assert lorakit(capsys, "rm", "chat", "-y").code == 2, "a run is no single checkpoint"
    assert kept_in(home) == [one]


def test_either_all_may_go_or_none_goes(capsys: Capture, home: Path, one: Kept, tmp_path: Path) -> None:
    assert lorakit(capsys, "rm", one.id, "chat@step-7", "-y").code == 3
    assert lorakit(capsys, "rm", one.id, tmp_path, "-y").code == 4
    assert kept_in(home) == [one]


def test_the_same_one_twice_is_one(capsys: Capture, home: Path, one: Kept) -> None:
    assert lorakit(capsys, "rm", one.id, one.uid, "chat@latest", "-y").code == 0
    assert len(trashed_in(home)) == 1


def test_what_is_aliased_or_served_ends_with_5_and_its_name(capsys: Capture, home: Path) -> None:
    store = Store(home, "llama")
    revision = add(store)
    store.move_alias("sql", "prod", revision.id, "set")
    ended = lorakit(capsys, "rm", revision.name, "-y")
    assert ended.code == 5
    assert "'sql@prod'" in ended.err
    with serving(home, "llama", "http://here"):
        ended = lorakit(capsys, "rm", revision.name, "-y", "--force")
    assert ended.code == 5
    assert "http://here" in ended.err
    assert lorakit(capsys, "rm", revision.name, "-y", "--force").code == 0
    assert store.runs() == {}
    store.close()


def test_what_was_in_the_trash_for_too_long_goes_with_the_next(
    capsys: Capture, home: Path, one: Kept, tmp_path: Path
) -> None:
    import time

    trash_stored(find_stored(one.id, home), home, now=time.time() - GRACE - 1)
    other = kept(home, tmp_path / "two", "two", run="chat")
    assert lorakit(capsys, "rm", other.id, "-y").code == 0
    assert [trashed.name for trashed in trashed_in(home)] == [other.id]
    assert not one.folder.exists()
