"""The store keeps what it was given, through restarts, other processes and full disks."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import Incomplete, LorakitError, Refused
from lorakit.store.catalog import Facts, Revision
from lorakit.store.splits import Split
from lorakit.store.store import Source, Store, default_home


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "home", "/models/llama")
    yield store
    store.close()


def keep(store: Store, content: str = "one") -> str:
    with store.staging() as staged:
        (staged / "adapter_model.safetensors").write_text(content)
        (staged / "adapter_config.json").write_text("{}")
        (staged / "lorakit.json").write_text(os.urandom(8).hex())
        return store.keep(staged)[0]


def add(store: Store, run: str = "sql", step: int | None = 100, content: str = "one", **more: Any) -> Revision:
    given: dict[str, Any] = {
        "rank": 8, "size": 3, "path": f"/runs/{run}/{step}", "source": Source("all", "weights"), "finished": True,
    }  # fmt: skip
    kind = "plain" if step is None else "step"
    facts = more.pop("facts", Facts(step=step, eval_loss=0.5, eval_step=step))
    revision, _ = store.add(run, kind, keep(store, content), facts, **{**given, "repaired": None, **more})
    return revision


def again(store: Store, base: str | None = None) -> Store:
    return Store(store.home, base or store.base)


def test_the_same_content_is_one_folder_wherever_it_came_from(store: Store) -> None:
    assert keep(store, "one") == keep(store, "one") != keep(store, "two")
    assert len(list((store.home / "revisions").iterdir())) == 2
    assert not list((store.home / "tmp").iterdir())


def test_what_is_kept_is_read_only_and_named_by_its_digest(store: Store) -> None:
    folder = store.home / "revisions" / keep(store)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o555
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o444 for file in folder.iterdir())
    assert len(folder.name) == 64


def test_a_staged_folder_that_is_not_kept_leaves_nothing(store: Store) -> None:
    def fails() -> None:
        with store.staging() as staged:
            (staged / "file").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not list((store.home / "tmp").iterdir())
    assert not list((store.home / "revisions").iterdir())


def test_what_a_killed_server_was_staging_is_cleared_and_what_a_living_one_stages_is_not(store: Store) -> None:
    (store.home / "tmp" / "stage-dead").mkdir()
    with store.staging() as staged:
        again(store).close()
        assert list((store.home / "tmp").iterdir()) == [staged]


def test_another_process_finds_all_that_is_known(store: Store) -> None:
    one, two = add(store, step=100, content="one"), add(store, step=200, content="two")
    store.move_alias("sql", "", two.id, "follow")
    store.move_alias("sql", "prod", one.id, "set")
    store.move_alias("sql", "", store.runs()["sql"].aliases[""], "set", pinned=True)
    other = again(store)
    found = other.runs()["sql"]
    other.close()
    assert found.revisions == {one.id: one, two.id: two}
    assert [finish.revision for finish in found.finishes] == [one.id, two.id]
    assert found.aliases == {"": two.id, "prod": one.id}
    assert found.pinned


def test_nan_and_unknown_survive(store: Store) -> None:
    facts = Facts(step=None, eval_loss=float("nan"), metrics={"accuracy": float("inf")})
    add(store, "chat", None, facts=facts)
    (found,) = store.runs()["chat"].revisions.values()
    assert found.facts.eval_loss != found.facts.eval_loss
    assert found.facts.metrics == {"accuracy": float("inf")}
    assert found.facts.train_loss is None


def test_the_same_content_again_is_the_same_revision_with_what_is_known_now(store: Store) -> None:
    first = add(store)
    second = add(store, facts=Facts(step=100, eval_loss=0.25, eval_step=100))
    assert (second.id, second.name, second.created) == (first.id, first.name, first.created)
    assert second.facts.eval_loss == 0.25
    assert len(store.runs()["sql"].revisions) == 1
    assert len(store.runs()["sql"].finishes) == 2


def test_a_copy_without_a_log_takes_nothing_away_from_what_is_known(store: Store) -> None:
    add(store, facts=Facts(step=100, train_loss=2.0, eval_loss=0.5, eval_step=100, metrics={"accuracy": 0.9}))
    copied = add(store, facts=Facts(step=100, train_loss=1.9))
    assert copied.facts == Facts(step=100, train_loss=1.9, eval_loss=0.5, eval_step=100, metrics={"accuracy": 0.9})


def test_two_contents_of_one_step_never_get_one_name(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = add(store, content="one")
    alike = first.digest[:8] + "f" * 56
    (store.home / "revisions" / alike).mkdir()
    monkeypatch.setattr("tests.store.test_store.keep", lambda *_: alike)
    with pytest.raises(Refused, match="their digests begin alike"):
        add(store, content="two")
    assert [revision.digest for revision in store.runs()["sql"].revisions.values()] == [first.digest]


def test_what_only_got_new_metrics_did_not_finish_again(store: Store) -> None:
    add(store)
    add(store, finished=False)
    assert len(store.runs()["sql"].finishes) == 1


def test_what_was_there_before_the_first_look_begins_no_attempt(store: Store) -> None:
    add(store, step=200, content="two")
    add(store, step=100, content="one", late=True)
    run = store.runs()["sql"]
    assert [finish.attempt for finish in run.finishes] == [1, 1]
    add(store, step=50, content="three")
    assert store.runs()["sql"].finishes[-1].attempt == 2


def test_bases_know_nothing_of_one_another(store: Store) -> None:
    mine = add(store)
    store.move_alias("sql", "", mine.id, "follow")
    other = again(store, "/models/mistral")
    assert other.runs() == {}
    assert other.source("sql", mine.source) is None
    theirs = add(other)
    assert theirs.folder == mine.folder
    assert other.runs()["sql"].aliases == {}
    assert store.forget("sql") == [], "the other base needs the files"
    assert other.runs()["sql"].revisions == {theirs.id: theirs}
    other.close()


def test_a_revision_whose_files_are_gone_is_not_known(store: Store) -> None:
    revision = add(store)
    store.move_alias("sql", "", revision.id, "follow")
    revision.folder.chmod(0o755)
    for file in revision.folder.iterdir():
        file.unlink()
    revision.folder.rmdir()
    assert store.runs() == {}


def test_the_alias_before_is_found_though_it_moved_to_the_same_place_twice(store: Store) -> None:
    one, two = add(store, step=100, content="one"), add(store, step=200, content="two")
    assert store.previous("sql", "") is None
    store.move_alias("sql", "", one.id, "follow")
    assert store.previous("sql", "") is None
    for _ in range(2):
        store.move_alias("sql", "", two.id, "follow")
    store.move_alias("sql", "prod", one.id, "set")
    assert store.previous("sql", "") == one.id
    assert store.previous("sql", "prod") is None


def test_forgetting_a_run_leaves_nothing_of_it_and_its_numbers_are_never_given_again(store: Store) -> None:
    one = add(store)
    store.move_alias("sql", "", one.id, "follow")
    (folder,) = store.forget("sql")
    assert folder == one.folder
    assert store.runs() == {}
    store.remove_folder(folder)
    assert not folder.exists()
    assert not list((store.home / "tmp").iterdir())
    new = add(store, content="other")
    assert new.id != one.id
    assert store.previous("sql", "") is None
    assert len(store.runs()["sql"].finishes) == 1


def test_what_was_looked_at_is_remembered_after_its_run_is_forgotten(store: Store) -> None:
    revision = add(store)
    store.forget("sql")
    assert store.source("sql", revision.source) == Source("all", "weights")
    assert store.source("other", revision.source) is None


def test_files_are_not_deleted_while_a_record_needs_them(store: Store) -> None:
    one = add(store, "sql")
    folders = store.forget("sql")
    add(store, "chat", None)
    store.remove_folder(folders[0])
    assert one.folder.is_dir()


def test_a_revision_is_never_recorded_without_its_files(store: Store) -> None:
    digest = keep(store)
    store.remove_folder(store.home / "revisions" / digest)
    with pytest.raises(Incomplete):
        store.add("sql", "step", digest, Facts(step=1), rank=1, size=1, path="/x", source=Source("", ""),
                  repaired=None, finished=True)  # fmt: skip
    assert store.runs() == {}


def test_what_no_record_needs_is_swept_away_when_nobody_can_be_about_to_record_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = add(store)
    keep(store, "nobody's")
    store.remove_unknown()
    assert len(list((store.home / "revisions").iterdir())) == 2
    monkeypatch.setattr("lorakit.store.contents.YOUNG", 0.0)
    store.remove_unknown()
    assert [folder.name for folder in (store.home / "revisions").iterdir()] == [kept.digest]


@pytest.mark.parametrize("again", [False, True])
def test_what_was_there_before_a_lost_database_is_never_swept_away(
    store: Store, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    monkeypatch.setattr("lorakit.store.contents.YOUNG", 0.0)
    folders = [add(store, step=step, content=str(step)).folder for step in (100, 200)]
    store.close()
    for file in store.home.glob("store.sqlite3*"):
        file.unlink()
    after_loss(store.home)
    new = Store(store.home, store.base)
    if again:
        assert add(new, step=100, content="100").folder == folders[0]
    new.remove_unknown()
    new.close()
    assert all(folder.is_dir() for folder in folders)


def after_loss(home: Path) -> None:
    """As if the database had been made anew some time after all that is there now."""
    Store(home, "").close()
    with sqlite3.connect(home / "store.sqlite3") as db:
        db.execute("UPDATE made SET at = at + 60")
    db.close()


def test_damaged_files_make_way_for_the_same_content_taken_in_again(store: Store) -> None:
    folder = store.home / "revisions" / keep(store)
    (folder / "adapter_model.safetensors").chmod(0o644)
    (folder / "adapter_model.safetensors").write_text("0ne")
    assert keep(store) == folder.name
    assert (folder / "adapter_model.safetensors").read_text() == "one"
    assert not list((store.home / "tmp").iterdir())


def test_an_alias_on_what_was_put_into_the_trash_takes_it_out_again(store: Store) -> None:
    from lorakit.store.trash import find_stored, trash_stored, trashed_in

    revision = add(store)
    trash_stored(find_stored(revision.name, store.home), store.home)
    store.move_alias("sql", "prod", revision.id, "set")  # by a server that has known it all along
    assert trashed_in(store.home) == []
    assert store.runs()["sql"].aliases == {"prod": revision.id}


def test_what_can_not_be_written_down_is_an_error_of_ours(store: Store) -> None:
    with pytest.raises(LorakitError, match="can't be written"):
        add(store, path="half\udcff")
    with pytest.raises(LorakitError, match="can't be written"):
        add(store, step=1 << 63)
    assert store.runs() == {}


def test_many_threads_and_two_connections_lose_nothing(store: Store) -> None:
    other = again(store)
    errors: list[BaseException] = []

    def work(mine: Store, number: int) -> None:
        try:
            for turn in range(5):
                revision = add(mine, step=number * 10 + turn, content=f"{number} {turn % 2}")
                mine.move_alias("sql", f"a{number}", revision.id, "set")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(one, n)) for n, one in enumerate([store, other, store, other])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(store.runs()["sql"].revisions) == 20
    assert store.runs().keys() == other.runs().keys()
    other.close()


def test_a_failed_change_changes_nothing_and_the_next_one_works(store: Store) -> None:
    add(store)
    with pytest.raises(LorakitError, match="can't be written"):
        store.move_alias("sql", "", 10**6, "set")
    assert store.runs()["sql"].aliases == {}
    add(store, step=200, content="two")


def test_a_store_of_a_newer_lorakit_is_left_alone(tmp_path: Path, store: Store) -> None:
    with sqlite3.connect(store.home / "store.sqlite3") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(LorakitError, match="newer"):
        again(store)


def test_a_file_that_is_no_database_says_so(tmp_path: Path) -> None:
    (tmp_path / "store.sqlite3").write_text("this is no database, and was never one")
    with pytest.raises(LorakitError, match="LORAKIT_HOME"):
        Store(tmp_path, "base")


def test_home_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path))
    assert default_home() == tmp_path
    monkeypatch.delenv("LORAKIT_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_home() == tmp_path / "lorakit"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_home() == tmp_path / ".local" / "share" / "lorakit"


def test_a_move_and_whether_it_stays_are_one_change(store: Store) -> None:
    one, two = add(store, step=100, content="one"), add(store, step=200, content="two")
    store.move_alias("sql", "", two.id, "follow")
    store.move_alias("sql", "", one.id, "rollback", pinned=True)
    assert (store.runs()["sql"].aliases, store.runs()["sql"].pinned) == ({"": one.id}, True)
    store.move_alias("sql", "prod", two.id, "set")
    assert store.runs()["sql"].pinned
    store.move_alias("sql", "", two.id, "set", pinned=False)
    assert not store.runs()["sql"].pinned


def test_what_is_passed_over_is_so_until_somebody_points_at_it(store: Store) -> None:
    one, two = add(store, step=100, content="one"), add(store, step=200, content="two")
    store.move_alias("sql", "", two.id, "follow")
    store.move_alias("sql", "", one.id, "automatic rollback", passed_over={two.id: "it fails"})
    other = again(store)
    assert other.passed_over() == {two.id: "it fails"}
    other.close()
    assert Store(store.home, "another base").passed_over() == {}
    store.move_alias("sql", "prod", two.id, "set")
    assert store.passed_over() == {}


def test_what_is_removed_is_gone_with_its_files_unless_an_alias_or_another_needs_it(store: Store) -> None:
    aliased, gone, shared = (add(store, step=step, content=str(step)) for step in (100, 200, 300))
    kept = add(store, "chat", 5, content="300")
    store.move_alias("sql", "prod", aliased.id, "set")
    removed, folders = store.remove([aliased.id, gone.id, shared.id, 12345])
    assert (removed, folders) == ([gone.id, shared.id], [gone.folder])
    runs = store.runs()
    assert (set(runs["sql"].revisions), set(runs["chat"].revisions)) == ({aliased.id}, {kept.id})
    assert [finish.revision for finish in runs["sql"].finishes] == [aliased.id]
    assert store.source("sql", gone.source) is not None, "its folder is not taken in again"


def test_the_journal_of_an_alias_does_not_grow_for_ever(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.store.store.JOURNAL", 5)
    one, two = add(store, step=100, content="one"), add(store, step=200, content="two")
    store.move_alias("sql", "prod", one.id, "set")
    for _ in range(10):
        for revision in (one, two):
            store.move_alias("sql", "", revision.id, "follow")
    assert store._database.rows("SELECT alias, count(*) FROM moves GROUP BY alias ORDER BY alias") == [
        ("", 5), ("prod", 1),
    ]  # fmt: skip
    assert store.previous("sql", "") == one.id


def test_one_run_is_what_it_is_among_all(store: Store) -> None:
    a, b = (add(store, step=step, content=str(step)) for step in (1, 2))
    add(store, "chat", None, "3")
    store.move_alias("sql", "", a.id, "set", pinned=True)
    store.move_alias("sql", "half", a.id, "split", split=Split({a.id: 0.5, b.id: 0.5}))
    assert {name: store.run(name) for name in ("sql", "chat")} == store.runs()
    assert store.run("nothing") is None
