"""What is removed can be taken back, exactly as it was, until it is purged."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakit.errors import Conflict, NotFound, Refused, UsageError
from lorakit.store.kept import Kept, find_kept, kept_in
from lorakit.store.serving import serving
from lorakit.store.store import Store
from lorakit.store.trash import (
    GRACE,
    find_stored,
    find_trashed,
    folder_of,
    purge,
    purgeable,
    refuse_held,
    refuse_lost,
    trash_path,
    trash_stored,
    trashed_in,
    undelete,
)
from lorakit.store.verify import verify_store
from tests.store.interrupted import kills
from tests.store.kept import contents, kept, write_checkpoint
from tests.store.test_store import add

NOW = 1_700_000_000.0


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def one(home: Path, tmp_path: Path) -> Kept:
    return kept(home, tmp_path / "one", "one", run="chat")


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    store = Store(home, "llama")
    yield store
    store.close()


def removed(name: str, home: Path, **more: bool) -> str:
    return trash_stored(find_stored(name, home), home, now=NOW, **more).uid


def test_what_is_removed_is_found_no_more_and_comes_back_as_it_was(home: Path, one: Kept) -> None:
    uid = removed(one.id, home)
    assert uid == one.uid
    assert kept_in(home) == []
    assert find_kept(one.id, home) is find_kept(one.uid, home) is None
    (lying,) = trashed_in(home)
    assert (lying.name, lying.size, lying.at, lying.until) == (one.id, one.size, NOW, NOW + 7 * 86_400)
    assert verify_store(home).wrong == ()
    undelete(lying, home)
    assert kept_in(home) == [one]
    assert trashed_in(home) == []
    assert contents(one.folder)


def test_a_revision_comes_back_with_its_aliases_and_its_place_in_the_order(home: Path, store: Store) -> None:
    first, last = add(store, step=100, content="one"), add(store, step=200, content="two")
    store.move_alias("sql", "prod", last.id, "set")
    before = store.runs()["sql"]
    removed(last.name, home, force=True)
    without = store.runs()["sql"]
    assert (without.select("latest"), without.aliases) == (first, {})
    assert store.previous("sql", "prod") is None
    undelete(find_trashed(last.name, home), home)
    assert store.runs()["sql"] == before


def test_what_an_alias_points_at_is_refused_by_its_name_and_goes_with_force(home: Path, store: Store) -> None:
    revision = add(store)
    store.move_alias("sql", "", revision.id, "follow")
    store.move_alias("sql", "prod", revision.id, "set")
    with pytest.raises(Conflict, match="'sql' and 'sql@prod' points at"):
        removed(revision.name, home)
    assert store.runs()["sql"].aliases
    removed(revision.name, home, force=True)
    assert store.runs() == {}


def test_what_a_running_server_may_be_asked_for_is_refused_with_force_too(home: Path, store: Store) -> None:
    best, middle, last = (add(store, step=step, content=str(step)) for step in (100, 200, 300))
    store.move_alias("sql", "", last.id, "follow")
    with serving(home, "mistral"):
        removed(last.name, home, force=True)
        undelete(find_trashed(last.name, home), home)
    with serving(home, "llama"):
        for revision in (best, last):
            with pytest.raises(Conflict, match="in use: the server of vLLM"):
                removed(revision.name, home, force=True)
        uid = removed(middle.name, home)
        assert purgeable(home, 0, NOW + GRACE) == []
    assert [lying.uid for lying in purgeable(home, 0, NOW + GRACE)] == [uid]


def test_the_same_content_kept_again_is_out_of_the_trash(home: Path, tmp_path: Path, one: Kept, store: Store) -> None:
    removed(one.id, home)
    assert kept(home, tmp_path / "one", run="chat").uid == one.uid
    assert kept_in(home) == [one]
    revision = add(store)
    removed(revision.name, home)
    assert add(store).id == revision.id
    assert store.runs()["sql"].revisions
    assert trashed_in(home) == []


def test_a_run_that_is_forgotten_leaves_what_lies_in_the_trash(home: Path, store: Store) -> None:
    first, last = add(store, step=100, content="one"), add(store, step=200, content="two")
    removed(first.name, home)
    assert store.forget("sql") == [last.folder]
    undelete(find_trashed(first.name, home), home)
    assert list(store.runs()["sql"].revisions.values()) == [first]


def test_a_name_means_one_thing_or_is_refused_with_all_that_it_means(home: Path, tmp_path: Path, store: Store) -> None:
    revision = add(store)
    one = kept(home, tmp_path / "one")
    with pytest.raises(UsageError, match=f"(?s)means several.*{one.uid}.*{revision.name}"):
        find_stored("sql@latest", home)
    assert find_stored(revision.name, home).table == "revisions"
    assert find_stored(one.uid, home).table == "kept"
    other = Store(home, "mistral")
    add(other)
    with pytest.raises(UsageError, match="means several"):
        find_stored(revision.name, home)
    assert folder_of(revision.name, home) == revision.folder
    other.close()


def test_a_whole_run_is_no_single_one(home: Path, one: Kept) -> None:
    with pytest.raises(UsageError, match=f"'chat' is a run of the store.*its latest is {one.id}"):
        find_stored("chat", home)
    assert folder_of("chat", home) == one.folder


def test_what_is_nowhere_is_not_found(home: Path, one: Kept, tmp_path: Path) -> None:
    for name in ("sql", "sql@latest", "chat@step-7", "0" * 32):
        with pytest.raises(NotFound, match="the store has no"):
            find_stored(name, home)
    with pytest.raises(NotFound, match="the store has no"):
        find_stored("sql", tmp_path / "nowhere")
    with pytest.raises(NotFound, match="not in the trash"):
        find_trashed(one.id, home)
    stored = find_stored(one.id, home)
    trash_stored(stored, home)
    with pytest.raises(NotFound, match="no more"):
        trash_stored(stored, home)
    trashed = find_trashed(one.id, home)
    undelete(trashed, home)
    with pytest.raises(NotFound, match="no more"):
        undelete(trashed, home)


def test_in_the_trash_it_is_found_by_its_uid_its_name_and_the_path_that_it_had(
    home: Path, one: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed(one.id, home)
    place = write_checkpoint(tmp_path / "runs" / "sql" / "checkpoint-100")
    monkeypatch.chdir(tmp_path / "runs")
    of_run = trash_path(Path("sql/checkpoint-100"), home, now=NOW + 1)
    assert [lying.name for lying in trashed_in(home)] == [one.id, str(place)]
    assert trashed_in(home)[1] == of_run
    for said in (of_run.uid, of_run.uid[:8], str(place), "sql/checkpoint-100"):
        assert find_trashed(said, home) == of_run
    assert find_trashed(one.uid[:4], home).uid == one.uid
    with pytest.raises(NotFound):
        find_trashed(of_run.uid[:3], home)
    write_checkpoint(place)
    trash_path(place, home)
    with pytest.raises(UsageError, match="means several"):
        find_trashed(str(place), home)
    undelete(of_run, home)
    assert contents(place)


def test_a_path_that_can_not_be_written_down_is_refused(home: Path, tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path / "half\udcff")
    with pytest.raises(Refused, match="rename it"):
        trash_path(place, home)
    assert contents(place)


def test_a_purge_deletes_what_nothing_else_needs(home: Path, tmp_path: Path, one: Kept) -> None:
    again = kept(home, tmp_path / "one", run="other")
    place = write_checkpoint(tmp_path / "sql" / "checkpoint-100")
    trash_path(place, home, now=NOW)
    removed(one.id, home)
    assert purgeable(home, GRACE, NOW + GRACE - 1) == []
    gone = purgeable(home, GRACE, NOW + GRACE)
    assert len(gone) == 2
    purge(gone, home)
    assert trashed_in(home) == []
    assert not list((tmp_path / "sql" / ".lorakit" / "trash").iterdir())
    assert again.folder.is_dir()
    removed(again.id, home)
    purge(trashed_in(home), home)
    assert not again.folder.exists()
    assert not list((home / "tmp").iterdir())
    assert verify_store(home).unneeded == ()


def test_what_was_taken_back_meanwhile_is_not_purged(home: Path, one: Kept) -> None:
    removed(one.id, home)
    gone = trashed_in(home)
    undelete(gone[0], home)
    purge(gone, home)
    assert kept_in(home) == [one]


def test_what_was_taken_back_and_removed_again_meanwhile_has_its_time_again(home: Path, one: Kept) -> None:
    removed(one.id, home)
    gone = trashed_in(home)
    undelete(gone[0], home)
    trash_stored(find_stored(one.id, home), home, now=NOW + 1)
    purge(gone, home)
    assert [lying.at for lying in trashed_in(home)] == [NOW + 1]


def test_what_a_running_server_may_still_have_to_read_is_not_purged(home: Path, store: Store, one: Kept) -> None:
    for step in (100, 200, 300):
        revision = add(store, step=step, content=str(step))
    unused = store.runs()["sql"].select("step-200")
    assert unused is not None
    store.move_alias("sql", "", revision.id, "follow")
    with serving(home, "llama", "http://here"):
        with pytest.raises(Conflict, match=r"http://here.*leave out --purge"):
            refuse_held(find_stored(unused.name, home), home, at_once=True)
        with pytest.raises(Conflict, match="leave out --purge"):
            trash_stored(find_stored(unused.name, home), home, at_once=True)
        removed(unused.name, home)
        with pytest.raises(Conflict, match="stays in the trash"):
            purge(trashed_in(home), home)
        assert unused.folder.is_dir()
        purge([trash_stored(find_stored(one.id, home), home, at_once=True)], home)
        assert kept_in(home) == []
    purge(trashed_in(home), home)
    assert not unused.folder.exists()


def test_a_run_that_was_moved_has_its_trash_with_it_for_who_names_it(home: Path, tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path / "runs" / "sql" / "checkpoint-100")
    before = contents(place)
    trash_path(place, home, now=NOW)
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert trashed_in(home) == []
    moved = tmp_path / "moved" / "sql" / "checkpoint-100"
    undelete(find_trashed(str(moved), home), home)
    assert contents(moved) == before


def test_through_a_link_it_is_known_by_where_it_is(home: Path, tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path / "runs" / "sql" / "checkpoint-100")
    (tmp_path / "link").symlink_to(place.parent)
    trashed = trash_path(tmp_path / "link" / ".." / "sql" / "checkpoint-100", home, now=NOW)
    assert trashed.name == str(place)
    assert find_trashed(str(tmp_path / "link" / "checkpoint-100"), home) == trashed


def test_what_can_not_be_taken_back_is_refused_before_anything_is(home: Path, tmp_path: Path, one: Kept) -> None:
    place = write_checkpoint(tmp_path / "sql" / "checkpoint-100")
    first = trash_path(place, home, now=NOW)
    refuse_lost([first], home)
    write_checkpoint(place)
    with pytest.raises(Conflict, match="taken by now"):
        refuse_lost([first], home)
    second = trash_path(place, home, now=NOW)
    with pytest.raises(Conflict, match="taken by now"):
        refuse_lost([first, second], home)
    removed(one.id, home)
    one.folder.chmod(0o755)
    one.folder.rename(home / "elsewhere")
    with pytest.raises(Refused, match="are gone"):
        refuse_lost([lying for lying in trashed_in(home) if lying.uid == one.uid], home)


def test_a_name_that_nobody_can_have_written_down_is_not_found(home: Path, one: Kept) -> None:
    for find in (find_stored, find_trashed):
        with pytest.raises(NotFound):
            find("half\udcff", home)
    assert find_kept("half\udcff@step-5", home) is None


def test_what_lost_its_files_can_not_be_taken_back(home: Path, one: Kept) -> None:
    removed(one.id, home)
    one.folder.chmod(0o755)
    one.folder.rename(home / "elsewhere")
    with pytest.raises(Refused, match="are gone"):
        undelete(trashed_in(home)[0], home)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become someone else")
def test_a_user_who_is_not_root_keeps_removes_and_purges_folders_within_folders() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, 65534, 65534)
        child = os.fork()
        if child == 0:
            os.setgid(65534)
            os.setuid(65534)
            home = Path(folder, "home")
            one = kept(home, Path(folder, "one"))
            right = verify_store(home).wrong == () and kept(home, Path(folder, "one")) == one
            removed(one.id, home)
            purge(trashed_in(home), home)
            os._exit(0 if right and not one.folder.exists() and not list((home / "tmp").iterdir()) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_killed_at_any_line_a_record_is_here_or_there(home: Path, one: Kept) -> None:
    for _ in kills(lambda: removed(one.id, home), every=5):
        assert len(kept_in(home)) + len(trashed_in(home)) == 1
        for lying in trashed_in(home):
            undelete(lying, home)
    for _ in kills(lambda: undelete(trashed_in(home)[0], home), every=5):
        assert len(kept_in(home)) + len(trashed_in(home)) == 1
        if kept_in(home):
            removed(one.id, home)
    assert kept_in(home) == [one]
    assert verify_store(home).wrong == ()


def test_a_purge_killed_at_any_line_leaves_no_record_without_files(home: Path, tmp_path: Path, one: Kept) -> None:
    removed(one.id, home)
    for _ in kills(lambda: purge(trashed_in(home), home), every=3):
        assert verify_store(home).wrong == ()
        for lying in trashed_in(home):
            assert contents(home / "revisions" / one.digest), lying.name
        if not trashed_in(home):
            kept(home, tmp_path / "one", run="chat")
            removed(one.id, home)
    assert trashed_in(home) == []
