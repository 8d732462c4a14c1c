"""Stores of several machines that share a bucket: the same revisions and aliases, whoever changes them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lorakit.store.catalog import Facts
from lorakit.store.remote import objects as objects_module
from lorakit.store.remote.objects import Objects, Unreachable
from lorakit.store.remote.shared import Overtaken, SharedStore, leave_all
from lorakit.store.splits import Split
from lorakit.store.store import Source, Store
from tests.store.remote.conftest import ADDRESS
from tests.store.remote.faulty import Faulty
from tests.store.remote.machines import Machine, catch_up, meant, point, run_of, said
from tests.store.test_store import add, keep

# what one does, all have


def test_what_one_machine_takes_in_another_has_files_facts_and_aliases(machine: Machine) -> None:
    one, other = machine("one"), machine("other")
    first, second = add(one, step=100, content="1"), add(one, step=200, content="2", facts=Facts(step=200, epoch=0.5))
    point(one, first, "prod")
    point(one, second, pinned=True)
    assert catch_up(other) == ["sql"]
    there = run_of(other)
    assert said(there) == said(run_of(one))
    for revision in there.revisions.values():
        assert {path.name for path in revision.folder.iterdir()} == {
            "adapter_config.json", "adapter_model.safetensors", "lorakit.json",
        }  # fmt: skip
        assert all(path.stat().st_mode & 0o222 == 0 for path in revision.folder.iterdir())
    assert catch_up(other) == []
    assert catch_up(one) == []


def test_a_rollback_on_another_machine_goes_where_it_would_have_gone_on_this(machine: Machine) -> None:
    one, other = machine("one"), machine("other")
    revisions = [add(one, step=step, content=str(step)) for step in (1, 2, 3)]
    for revision in revisions:
        point(one, revision)
    catch_up(other)
    before = other.previous("sql", "")
    assert before is not None
    assert run_of(other).revisions[before].name == revisions[1].name
    point(other, run_of(other).revisions[before], why="rollback", pinned=True)
    catch_up(one)
    assert meant(one) == revisions[1].name
    assert run_of(one).pinned


def test_splits_and_what_is_passed_over_are_the_same_everywhere(machine: Machine) -> None:
    one, other = machine("one"), machine("other")
    a, b, c = (add(one, step=step, content=str(step)) for step in (1, 2, 3))
    split = Split({a.id: 0.75, b.id: 0.25}, (c.id,), seed=7)
    point(one, a, why="split: so", pinned=True, split=Split({a.id: 0.75, b.id: 0.25}, (), seed=7))
    point(one, a, "canary", split=split)
    one.pass_over("sql", c.id, "its smoke prompts fail")
    catch_up(other)
    assert said(run_of(other)) == said(run_of(one))
    named = {run_of(other).revisions[id].name: reason for id, reason in other.passed_over().items()}
    assert named == {c.name: "its smoke prompts fail"}
    point(other, run_of(other).select("step-3"), why="set")  # type: ignore[arg-type]
    catch_up(one)
    assert one.passed_over() == {}
    assert "" not in run_of(one).splits


def test_a_run_that_is_forgotten_is_so_everywhere_and_may_come_again(machine: Machine) -> None:
    one, other = machine("one"), machine("other")
    add(one)
    catch_up(other)
    folders = other.forget("sql")
    assert [folder.name for folder in folders] == [path.name for path in (one.home / "revisions").iterdir()]
    catch_up(one)
    assert one.runs() == other.runs() == {}
    again = add(one, step=5, content="5")
    catch_up(other)
    assert next(iter(run_of(other).revisions.values())).name == again.name


def test_what_leaves_one_store_leaves_all_but_for_what_an_alias_means_by_now(machine: Machine) -> None:
    one, other = machine("one"), machine("other")
    a, b, c = (add(one, step=step, content=str(step)) for step in (1, 2, 3))
    point(one, c)
    catch_up(other)
    point(other, run_of(other).select("step-2"), "prod")  # type: ignore[arg-type]
    gone, folders = one.remove([a.id, b.id, c.id])
    assert gone == [a.id]
    assert [folder.name for folder in folders] == [a.digest]
    catch_up(one)
    catch_up(other)
    assert said(run_of(one)) == said(run_of(other))
    assert {revision.name for revision in run_of(one).revisions.values()} == {b.name, c.name}


def test_an_alias_brings_back_what_was_removed_while_it_was_moved_there(machine: Machine) -> None:
    one, other = machine("one"), machine("other")
    a, b = (add(one, step=step, content=str(step)) for step in (1, 2))
    point(one, b)
    catch_up(other)
    one.remove([a.id])
    point(other, run_of(other).select("step-1"), "prod")  # type: ignore[arg-type]
    catch_up(other)
    catch_up(one)
    assert meant(one, "prod") == meant(other, "prod") == a.name


def test_a_folder_that_two_machines_see_finishes_once(machine: Machine) -> None:
    one, other = machine("one"), machine("other")
    for step in (5, 6):
        for store in (one, other):
            add(store, step=step, content=str(step), source=Source(f"all {step}", f"weights {step}"))
    for store in (one, other):  # and is written again
        add(store, step=5, content="again", source=Source("all again", "weights again"))
    catch_up(one)
    catch_up(other)
    assert said(run_of(one)) == said(run_of(other))
    assert [one.attempt for one in run_of(one).finishes] == [1, 1, 2]


def test_the_order_and_the_attempts_are_those_of_the_bucket_whoever_wrote(machine: Machine) -> None:
    one, other = machine("one"), machine("other")
    add(one, step=500, content="a")
    add(other, step=1000, content="b")
    _, third = other.add(
        "sql", "step", keep(other, "c"), Facts(step=300), rank=1, size=1, path="/elsewhere", source=Source("", ""),
        repaired=None, finished=True,
    )  # fmt: skip
    assert third is not None
    assert third.attempt == 2
    catch_up(one)
    catch_up(other)
    assert said(run_of(one)) == said(run_of(other))
    assert meant(one, "latest") == meant(other, "latest")
    assert (meant(one, "latest") or "").startswith("sql@step-300")


# races


def test_of_two_machines_that_move_one_alias_at_once_neither_loses_a_move_and_both_end_alike(machine: Machine) -> None:
    one, other = machine("one"), machine("other")
    for step in (1, 2):
        add(one, step=step, content=str(step))
    catch_up(other)
    begin = threading.Barrier(2)

    def move(store: SharedStore, step: int) -> None:
        begin.wait()
        revision = run_of(store).select(f"step-{step}")
        assert revision is not None
        for _ in range(10):
            point(store, revision)

    with ThreadPoolExecutor(2) as pool:
        for task in [pool.submit(move, one, 1), pool.submit(move, other, 2)]:
            task.result()
    catch_up(one)
    catch_up(other)
    assert said(run_of(one)) == said(run_of(other))
    state = one.shared.state("sql")
    assert state is not None
    assert state.version == 2 + 20


def test_of_two_machines_that_take_in_at_once_nothing_is_lost(machine: Machine) -> None:
    stores = [machine("one"), machine("other")]

    def take(number: int) -> None:
        for step in range(5):
            add(stores[number], step=10 * step + number, content=f"{number} {step}", path=f"/{number}/{step}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(take, range(2)))
    for store in stores:
        catch_up(store)
    assert said(run_of(stores[0])) == said(run_of(stores[1]))
    assert len(run_of(stores[0]).revisions) == len(run_of(stores[0]).finishes) == 10


def test_what_nobody_asked_for_is_not_moved_over_what_somebody_did(machine: Machine) -> None:
    one, other = machine("one"), machine("other")
    a, b = (add(one, step=step, content=str(step)) for step in (1, 2))
    point(one, a, why="follow")
    catch_up(other)
    point(other, run_of(other).select("step-1"), why="set", pinned=True)  # type: ignore[arg-type]
    for why in ("follow", "automatic rollback: it fails"):
        with pytest.raises(Overtaken):
            point(one, b, why=why)
    assert meant(one) == a.name
    catch_up(one)
    assert run_of(one).pinned


def test_what_another_machine_passes_over_is_not_followed(machine: Machine) -> None:
    one, other = machine("one"), machine("other")
    a, b = (add(one, step=step, content=str(step)) for step in (1, 2))
    point(one, a, why="follow")
    catch_up(other)
    there = run_of(other).select("step-2")
    assert there is not None
    other.pass_over("sql", there.id, "its engine refuses it")
    with pytest.raises(Overtaken):
        point(one, b, why="follow")
    catch_up(one)
    assert one.passed_over() == {b.id: "its engine refuses it"}


# what fails


def test_a_machine_that_dies_after_its_files_are_sent_leaves_nothing_named_and_begins_again(machine: Machine) -> None:
    one, other = machine("one"), machine("other")
    change = one.shared.change
    one.shared.change = _dies  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        add(one)
    catch_up(other)
    assert other.runs() == {}
    one.shared.change = change  # type: ignore[method-assign]
    add(one)
    catch_up(other)
    assert said(run_of(one)) == said(run_of(other))


def test_a_machine_that_dies_before_it_has_noted_its_own_change_finds_it_when_it_starts_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = machine("one")
    revision = add(one)
    monkeypatch.setattr(one, "_write", _dies)
    with pytest.raises(KeyboardInterrupt):
        point(one, revision, "prod")
    assert meant(one, "prod") is None
    again = machine("one")
    catch_up(again)
    assert meant(again, "prod") == revision.name


def _dies(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_while_the_bucket_does_not_answer_nothing_is_changed_here(
    machine: Machine, bucket: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    for patience in ("_SMALL", "_FILE"):
        monkeypatch.setattr(objects_module, patience, (1, 1, 1))
    one = machine("one")
    a, b = (add(one, step=step, content=str(step)) for step in (1, 2))
    point(one, a)
    before = said(run_of(one))
    bucket.refuse = lambda method, path: 503
    for change in (
        lambda: point(one, b),
        lambda: one.forget("sql"),
        lambda: one.remove([b.id]),
        lambda: add(one, step=3, content="3"),
        lambda: one.pass_over("sql", b.id, "so"),
    ):
        with pytest.raises(Unreachable):
            change()
    assert said(run_of(one)) == before
    bucket.refuse = lambda method, path: None
    point(one, b)
    assert meant(one) == b.name


def test_an_alias_whose_files_are_not_here_stays_where_it_was(machine: Machine) -> None:
    one, other = machine("one"), machine("other")
    a = add(one, step=1, content="1")
    point(one, a)
    catch_up(other)
    b = add(one, step=2, content="2")
    point(one, b)
    other.look()
    other.agree("sql")
    assert meant(other) == a.name
    assert other.is_behind("sql")
    with pytest.raises(Overtaken):
        point(other, run_of(other).select("step-1"), why="follow")  # type: ignore[arg-type]
    catch_up(other)
    assert meant(other) == b.name


def test_an_alias_whose_files_are_not_here_keeps_what_left_the_bucket(machine: Machine) -> None:
    one, other = machine("one"), machine("other")
    a = add(one, step=1, content="1")
    point(one, a)
    point(one, a, "half", split=Split({a.id: 1.0}, ()))
    catch_up(other)
    b = add(one, step=2, content="2")
    point(one, b)
    point(one, b, "half")
    one.remove([a.id])
    other.look()
    other.agree("sql")
    assert meant(other) == meant(other, "half") == a.name
    catch_up(other)
    assert meant(other) == meant(other, "half") == b.name
    assert said(run_of(other)) == said(run_of(one))


def test_a_machine_whose_files_come_in_another_order_goes_back_where_all_would(machine: Machine) -> None:
    one, other = machine("one"), machine("other")
    a, b, c = (add(one, step=step, content=str(step)) for step in (1, 2, 3))
    for revision in (a, b, c):
        point(one, revision)
    other.look()
    for revision in (c, a, b):
        other.bring(revision.digest, lambda _: None)
        other.agree("sql")
    before = other.previous("sql", "")
    assert before is not None
    assert run_of(other).revisions[before].name == b.name
    moves = other._database.rows("SELECT count(*) FROM moves")
    other.agree("sql")
    assert other._database.rows("SELECT count(*) FROM moves") == moves == [(3,)]


def test_a_revision_that_can_not_be_had_does_not_keep_the_others_from_being_followed(machine: Machine) -> None:
    one, other = machine("one"), machine("other")
    a, b, lacking = (add(one, step=step, content=str(step)) for step in (1, 2, 3))
    point(one, a, why="follow")
    other.look()
    for revision in (a, b):
        other.bring(revision.digest, lambda _: None)
    with pytest.raises(Overtaken):  # nothing of it was taken over yet
        other.move_alias("sql", "", 1, "follow")
    other.agree("sql")
    point(other, run_of(other).select("step-2"), why="follow")  # type: ignore[arg-type]
    catch_up(one)
    assert meant(one) == b.name
    assert lacking.digest in {recorded.digest for recorded in other.missing("sql")}


# homes


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "one", "llama-0123")
    yield store
    store.close()


def test_what_a_home_has_already_is_sent_when_it_joins(machine: Machine, alone: Store) -> None:
    a, b = (add(alone, step=step, content=str(step)) for step in (1, 2))
    alone.move_alias("sql", "", a.id, "follow")
    alone.move_alias("sql", "", b.id, "set", pinned=True)
    alone.move_alias("sql", "half", b.id, "split: so", split=Split({a.id: 0.5, b.id: 0.5}))
    alone.move_alias("sql", "", b.id, "set", pinned=True, passed_over={a.id: "it fails"})
    machine("one")
    other = machine("other")
    catch_up(other)
    assert said(run_of(other)) == said(run_of(alone))
    before = other.previous("sql", "")
    assert before is not None
    assert run_of(other).revisions[before].name == a.name
    assert list(other.passed_over().values()) == ["it fails"]


def test_two_homes_with_different_revisions_of_one_run_come_to_have_both(machine: Machine, alone: Store) -> None:
    other = machine("other")
    theirs = add(other, step=2, content="theirs")
    point(other, theirs)
    ours = add(alone, step=1, content="ours")
    alone.move_alias("sql", "", ours.id, "follow")
    alone.move_alias("sql", "mine", ours.id, "set")
    one = machine("one")
    catch_up(one)
    catch_up(other)
    assert said(run_of(one)) == said(run_of(other))
    assert (meant(one), meant(one, "mine")) == (theirs.name, ours.name)
    assert meant(one, "latest") == theirs.name


def test_a_home_that_was_away_does_not_bring_back_what_was_removed_meanwhile(machine: Machine) -> None:
    one, other = machine("one"), machine("other")
    a, b = (add(one, step=step, content=str(step)) for step in (1, 2))
    add(one, run="chat", content="3")
    point(one, b)
    catch_up(other)
    other.remove([run_of(other).select("step-1").id])  # type: ignore[union-attr]
    other.forget("chat")
    again = machine("one")
    catch_up(again)
    assert [revision.name for revision in run_of(again).revisions.values()] == [b.name]
    assert again.run("chat") is None
    assert a.name not in {revision.name for revision in run_of(other).revisions.values()}


def test_what_was_taken_in_by_a_server_without_the_bucket_is_sent_by_the_next_with_it(machine: Machine) -> None:
    one, other = machine("one"), machine("other")
    add(one, step=1, content="1")
    leave_all(one.home)
    by_itself = Store(one.home, one.base)
    new = add(by_itself, step=2, content="2")
    by_itself.close()
    machine("one")
    catch_up(other)
    assert meant(other, "latest") == new.name


def test_before_a_home_has_joined_nothing_is_changed(machine: Machine, alone: Store) -> None:
    revision = add(alone)
    early = machine("one", joined=False)
    with pytest.raises(Unreachable, match="not looked at yet"):
        early.move_alias("sql", "", revision.id, "set")
    with pytest.raises(Unreachable):
        early.ensure_reachable()
    alone.ensure_reachable()
    assert ADDRESS in str(early.objects.address)


def test_mixes_stay_where_they_were_made(machine: Machine, tmp_path: Path, s3: Any) -> None:
    from lorakit.store.mixes import MixStore

    mixes = MixStore(tmp_path / "one", "llama-0123")
    with Store(tmp_path / "one", "llama-0123").staging() as staged:
        (staged / "adapter_model.safetensors").write_text("mixed")
        mixes.keep(staged, "recipe", text="mix(a=1)", rank=1, error=0.0)
    machine("one")
    mixes.close()
    assert "Contents" not in s3.list_objects_v2(Bucket="models")


def test_objects_are_named_for_all_machines_alike(machine: Machine, s3: Any, objects: Objects) -> None:
    revision = add(machine("one"))
    keys = [each["Key"] for each in s3.list_objects_v2(Bucket="models")["Contents"]]
    base = next(key.split("/")[2] for key in keys if "/bases/" in key)
    assert keys == sorted(
        [
            f"lorakit/bases/{base}/head.json", f"lorakit/bases/{base}/runs/sql.json",
            *(f"lorakit/revisions/{revision.digest}/{name}"
              for name in ("adapter_config.json", "adapter_model.safetensors", "manifest.json")),
        ]
    )  # fmt: skip
