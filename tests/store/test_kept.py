"""What the store keeps is what a trainer wrote, under one name, whole or not at all."""

from __future__ import annotations

import math
import os
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.errors import Incomplete, LorakitError, NotFound, OutOfSpace, Refused
from lorakit.store.catalog import Facts
from lorakit.store.kept import Kept, find_kept, keep_checkpoint, kept_in
from lorakit.store.store import Store
from lorakit.store.trash import find_stored, purge, trash_stored, trashed_in
from lorakit.store.verify import verify_store
from tests.disks import small_disk_at
from tests.store.interrupted import kills
from tests.store.kept import contents, described, kept, measured, write_checkpoint


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "sql" / "checkpoint-500")


def test_it_is_kept_as_it_was_written_with_folders_hidden_files_and_times(home: Path, source: Path) -> None:
    (source / "empty").mkdir()
    one = kept(home, source)
    assert contents(one.folder) == contents(source)
    assert (one.folder / "empty").is_dir()
    for file in source.rglob("*"):
        if file.is_file():
            assert (one.folder / file.relative_to(source)).stat().st_mtime_ns == file.stat().st_mtime_ns
    assert one.size == sum(len(data) for data in contents(source).values())


def test_the_digest_is_what_sha256sum_says_of_the_sorted_list(home: Path, source: Path) -> None:
    one = kept(home, source)
    names = sorted(contents(source))
    said = subprocess.run(["sha256sum", *names], cwd=source, capture_output=True, check=True).stdout
    again = subprocess.run(["sha256sum"], input=said, capture_output=True, check=True).stdout.decode().split()[0]
    assert one.digest == again == one.folder.name


def test_all_of_it_is_read_only_and_no_hard_link(home: Path, source: Path) -> None:
    one = kept(home, source)
    for path in (one.folder, *one.folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o555 if path.is_dir() else 0o444)
        assert path.is_dir() or path.stat().st_nlink == 1
    (source / "optimizer.pt").write_bytes(b"rewritten")
    assert (one.folder / "optimizer.pt").read_bytes() == b"momentsone"


def test_what_is_known_of_it_comes_back(home: Path, source: Path) -> None:
    facts = Facts(step=500, epoch=1.5, train_loss=2.0, eval_loss=math.inf, eval_step=400, metrics={"f1": 0.5})
    one = kept(home, source, what=described(500, facts=facts, base="llama", rank=8))
    (again,) = kept_in(home)
    assert again == one
    assert (one.id, one.label) == (f"sql@step-500-{one.digest[:8]}", "step-500")
    assert (one.run, one.step, one.kind, one.writer, one.base, one.rank) == (
        "sql", 500, "adapter", "transformers", "llama", 8,
    )  # fmt: skip
    assert one.facts == facts
    assert one.source == str(source)
    assert len(one.uid) == 32


def test_a_single_file_is_kept_under_its_own_name(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"all")
    one = kept(home, file, what=described(None, kind="regular", writer="lightning"))
    assert contents(one.folder) == {"model.ckpt": b"all"}
    assert one.id == f"sql@{one.digest[:8]}"


def test_a_final_one_is_named_so_whatever_its_step(home: Path, source: Path) -> None:
    assert kept(home, source, what=described(900, final=True)).id.startswith("sql@final-")
    assert kept(home, source, what=described(None, final=True)).step is None


def test_the_same_content_of_the_same_step_is_the_same_and_takes_nothing_away(home: Path, source: Path) -> None:
    facts = Facts(step=500, eval_loss=0.5, eval_step=500)
    first = kept(home, source, what=described(500, facts=facts, base="llama", rank=8))
    again = kept(home, source, what=described(500))
    assert (again.id, again.uid, again.created) == (first.id, first.uid, first.created)
    assert (again.facts, again.base, again.rank) == (facts, "llama", 8)
    other = kept(home, source, what=described(600))
    assert other.uid != first.uid
    assert other.folder == first.folder
    assert kept(home, source, run="chat").uid != first.uid
    assert len(list((home / "revisions").iterdir())) == 1


def test_what_changed_meanwhile_is_not_kept(home: Path, source: Path) -> None:
    with pytest.raises(Incomplete, match="written to while"):
        kept(home, source, unchanged=lambda: False)
    assert kept_in(home) == []
    assert not list((home / "revisions").iterdir())
    assert not list((home / "tmp").iterdir())


def test_what_was_taken_away_meanwhile_is_incomplete(home: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def rotated(path: object, *arguments: object, **more: object) -> int:
        if path == "optimizer.pt":
            (source / "optimizer.pt").unlink()
        return opened(path, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", rotated)
    with pytest.raises(Incomplete, match="taken away"):
        kept(home, source)
    assert not list((home / "tmp").iterdir())


def test_what_grows_while_it_is_copied_is_incomplete(home: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.store import contents as module

    copy = module.copy_range

    def growing(*arguments: int) -> None:
        copy(*arguments)
        with (source / "optimizer.pt").open("ab") as file:
            file.write(b"more")

    monkeypatch.setattr(module, "copy_range", growing)
    with pytest.raises(Incomplete, match="written to while it was copied"):
        kept(home, source)


def test_a_link_to_a_file_of_its_own_becomes_a_copy(home: Path, source: Path) -> None:
    (source / "last.ckpt").symlink_to("global_step5/zero.pt")
    one = kept(home, source)
    copied = one.folder / "last.ckpt"
    assert not copied.is_symlink()
    assert copied.read_bytes() == b"shardone"
    assert verify_store(home).wrong == ()


@pytest.mark.parametrize("kind", ["out", "dangling", "folder", "itself", "fifo", "socket"])
def test_what_is_no_part_of_it_is_refused_by_name(
    home: Path, source: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = source / "odd"
    if kind == "out":
        (tmp_path / "secret").write_text("secret")
        odd.symlink_to(tmp_path / "secret")
    elif kind == "dangling":
        odd.symlink_to("nowhere")
    elif kind == "folder":
        odd.symlink_to("global_step5")
    elif kind == "itself":
        odd.symlink_to("odd")
    elif kind == "fifo":
        os.mkfifo(odd)
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as bound:
            monkeypatch.chdir(source)  # the path of a socket has to be short
            bound.bind("odd")
    with pytest.raises(Refused, match="odd"):
        kept(home, source)
    assert kept_in(home) == []
    assert not list((home / "tmp").iterdir())


def test_a_link_in_place_of_the_whole_is_refused(home: Path, source: Path, tmp_path: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to(source)
    with pytest.raises(Refused, match="is a link"):
        kept(home, link)


@pytest.mark.parametrize("name", ["a\nb", "bell\a", "half\udcff"])
def test_a_name_that_a_list_of_names_could_not_hold_is_refused(home: Path, source: Path, name: str) -> None:
    (source / name).write_text("")
    with pytest.raises(Refused, match="name"):
        kept(home, source)


def test_what_is_not_there_or_empty_is_said(home: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        keep_checkpoint(home, tmp_path / "nowhere", described(), run="sql", unchanged=lambda: True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match="no files"):
        kept(home, tmp_path / "empty")
    with pytest.raises(Refused, match="reserved"):
        kept(home, tmp_path / "full", run="latest")


def test_what_lorakit_put_into_a_run_and_what_is_named_is_left_out(home: Path, tmp_path: Path) -> None:
    run = write_checkpoint(tmp_path / "sql")
    write_checkpoint(run / "checkpoint-500")
    (run / ".lorakit" / "trash").mkdir(parents=True)
    (run / ".lorakit" / "trash" / "big").write_text("gone")
    one = keep_checkpoint(
        home, run, described(None, final=True), run="sql", unchanged=lambda: True, without=["checkpoint-500"]
    )
    names = set(contents(one.folder))
    assert names == {str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()} - {
        name for name in contents(run) if name.startswith((".lorakit", "checkpoint-500"))
    }


def test_two_contents_of_one_step_never_get_one_name(
    home: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = kept(home, source)
    from lorakit.store import contents as module

    monkeypatch.setattr(module, "folder_digest", lambda *_: first.digest[:8] + "f" * 56)
    with pytest.raises(Refused, match=f"sql@step-500-{first.digest[:8]}, is another's"):
        kept(home, tmp_path / "other", "two")
    assert [one.digest for one in kept_in(home)] == [first.digest]


def test_a_store_that_is_not_there_keeps_nothing_and_is_not_made(home: Path) -> None:
    assert kept_in(home) == []
    assert find_kept("sql", home) is None
    assert not home.exists()


# names


def test_every_name_finds_what_it_means(home: Path, tmp_path: Path) -> None:
    def step(number: int, loss: float | None, content: str) -> Kept:
        return kept(home, tmp_path / content, content, what=measured(number, loss))

    one, two, three = step(500, 0.9, "a"), step(1000, 0.2, "b"), step(1500, None, "c")
    other = kept(home, tmp_path / "d", "d", run="chat", what=described(None))
    found = {
        "sql": three, "sql@latest": three, "sql@best": two, "sql@step-500": one, one.id: one, two.uid: two,
        f"sql@{two.digest[:4]}": two, f"sql@{two.digest}": two, "chat": other, other.id: other,
    }  # fmt: skip
    assert {name: find_kept(name, home) for name in found} == found
    for name in (
        "sql@step-7",
        "sql@final",
        "sql@prod",
        "nobody",
        "nobody@best",
        "chat@best",
        "",
        "@",
        f"chat@{one.digest}",
    ):
        assert find_kept(name, home) is None
    final = kept(home, tmp_path / "e", "e", what=described(1500, final=True))
    assert [find_kept(name, home) for name in ("sql", "sql@final", final.id)] == [final] * 3


def test_a_run_that_was_started_again_has_a_latest_of_its_own(home: Path, tmp_path: Path) -> None:
    for number, step in enumerate((500, 1000, 500)):
        last = kept(home, tmp_path / str(number), str(number), what=measured(step, 0.1 * number))
        assert find_kept("sql@latest", home) == last
    assert find_kept("sql@step-500", home) == last
    best = find_kept("sql@best", home)
    assert best is not None
    assert best.facts.eval_loss == 0.0


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from([100, 200, 300, 400]), st.booleans()), max_size=8))
def test_latest_is_the_largest_step_of_the_last_attempt_and_a_final_one_is_newer(
    tmp_path_factory: pytest.TempPathFactory, saved: list[tuple[int, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("kept")
    home = folder / "home"
    attempt: list[tuple[bool, int, Kept]] = []
    for number, (step, final) in enumerate(saved):
        one = kept(home, folder / str(number), str(number), what=described(step, final=final))
        if not final and any(step <= earlier for is_final, earlier, _ in attempt if not is_final):
            attempt = []
        attempt.append((final, number if final else step, one))
        wanted = max(attempt, key=lambda entry: entry[:2])[2]
        assert find_kept("sql", home) == wanted


# faults


def test_a_revision_of_a_server_and_a_kept_one_of_the_same_bytes_share_them(home: Path, tmp_path: Path) -> None:
    from tests.store.test_store import add

    store = Store(home, "llama")
    revision = add(store)
    source = tmp_path / "adapter"
    source.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (source / name).write_bytes((revision.folder / name).read_bytes())
    one = kept(home, source)
    assert one.folder == revision.folder
    assert store.forget("sql") == []
    store.remove_unknown()
    assert one.folder.is_dir()
    assert verify_store(home).wrong == ()
    store.close()


@pytest.mark.parametrize("harm", ["flip", "lose", "add", "empty", "file", "link", "another link"])
def test_damaged_files_make_way_for_the_same_content_kept_again(
    home: Path, source: Path, tmp_path: Path, harm: str
) -> None:
    one = kept(home, source)
    one.folder.chmod(0o755)
    (one.folder / "optimizer.pt").chmod(0o644)
    if harm == "flip":
        (one.folder / "optimizer.pt").write_bytes(b"garbage")
    elif harm == "lose":
        (one.folder / "optimizer.pt").unlink()
    elif harm == "add":
        (one.folder / "more").write_text("")
    elif harm == "another link":
        (one.folder / "more").symlink_to(tmp_path)
    else:
        one.folder.rename(tmp_path / "elsewhere")
        if harm == "empty":
            one.folder.mkdir()
        elif harm == "file":
            one.folder.write_text("")
        else:
            one.folder.symlink_to(tmp_path / "elsewhere")
    assert kept(home, source) == one
    assert contents(one.folder) == contents(source)
    assert not one.folder.is_symlink()
    assert verify_store(home).wrong == ()
    assert not list((home / "tmp").iterdir())


def test_intact_files_stay_where_they_are_when_the_same_is_kept_again(
    home: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = kept(home, source)
    inode = (one.folder / "optimizer.pt").stat().st_ino
    one.folder.chmod(0o755)
    synced: list[Path] = []
    monkeypatch.setattr("lorakit.store.contents.sync_folder", synced.append)
    kept(home, source, run="chat")
    assert {home / "revisions", one.folder} <= set(synced), "who put them there may have been killed before that"
    monkeypatch.setattr(os, "chmod", lambda *_: pytest.fail("they may be another user's"))
    kept(home, source, run="math")
    assert (one.folder / "optimizer.pt").stat().st_ino == inode
    assert verify_store(home).wrong == ()


@pytest.mark.parametrize("wrong", [{"step": 1 << 63}, {"step": -1}, {"rank": 1 << 63}])
def test_numbers_that_the_store_can_not_hold_are_refused_before_anything_is_copied(
    home: Path, source: Path, wrong: dict[str, int]
) -> None:
    with pytest.raises(Refused, match=f"its {next(iter(wrong))} is"):
        kept(home, source, what=described(**wrong))
    assert not home.exists()


def test_a_path_that_can_not_be_written_down_is_refused_before_anything_is_copied(home: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="rename it"):
        kept(home, tmp_path / "half\udcff" / "checkpoint-500")
    assert not home.exists()


@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_kept_again_after_a_kill_at_any_line_of_keeping_or_purging_it_is_as_it_should_be(
    home: Path, source: Path, every: int
) -> None:
    def purged() -> None:
        purge([trash_stored(find_stored("sql@latest", home), home)], home)

    def gone() -> None:
        if kept_in(home):
            purged()
        purge(trashed_in(home), home)

    kept(home, source)
    for action, before in ((lambda: kept(home, source), gone), (purged, lambda: kept(home, source))):
        before()
        for _ in kills(action, every=every):
            one = kept(home, source)
            assert verify_store(home).wrong == ()
            assert contents(one.folder) == contents(source)
            before()


def test_killed_at_any_line_nothing_half_is_there_and_the_next_one_keeps_it(home: Path, source: Path) -> None:
    for turn, _ in enumerate(kills(lambda: kept(home, source), every=3)):
        for one in kept_in(home):
            assert contents(one.folder) == contents(source)
        assert verify_store(home).wrong == ()
        if turn % 8 == 7:
            one = kept(home, source)
            assert kept_in(home) == [one]
            assert verify_store(home).unneeded == ()
            subprocess.run(["rm", "-rf", str(home)], check=True)
    one = kept(home, source)
    assert kept_in(home) == [one]
    assert contents(one.folder) == contents(source)
    assert not list((home / "tmp").iterdir())
    assert verify_store(home).unneeded == ()


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    with small_disk_at(tmp_path / "disk", 1024) as disk:
        home = disk / "home"
        first = kept(home, tmp_path / "one", "one")
        big = tmp_path / "big"
        write_checkpoint(big, files={"a": b"x" * 300_000, "b": b"y" * 900_000})
        with pytest.raises(OutOfSpace, match="no space left"):
            kept(home, big, what=described(600))
        assert kept_in(home) == [first]
        assert verify_store(home).wrong == ()
        assert not list((home / "tmp").iterdir())
        assert kept(home, tmp_path / "two", "two", what=described(700)) in kept_in(home)


def test_a_source_that_may_not_be_read_says_so(home: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def denied(path: object, *arguments: object, **more: object) -> int:
        if path == "optimizer.pt":
            raise PermissionError(13, "Permission denied", "optimizer.pt")
        return opened(path, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(Refused, match="may not be read: run both as one user"):
        kept(home, source)


def test_a_store_that_can_not_be_made_says_so(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LorakitError, match="can't write"):
        kept(tmp_path / "file" / "home", source)
