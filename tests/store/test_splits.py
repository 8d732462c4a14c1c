"""What an alias means where several revisions share it: kept whole, through whatever becomes of the revisions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import Conflict, LorakitError
from lorakit.store.serving import in_use, serving
from lorakit.store.splits import Split, are_whole
from lorakit.store.store import Store
from lorakit.store.trash import find_stored, trash_stored
from tests.store.test_store import add


@st.composite
def splits(draw: st.DrawFn) -> Split:
    ids = draw(st.lists(st.integers(1, 50), min_size=1, max_size=8, unique=True))
    shadows = draw(st.lists(st.integers(51, 60), max_size=3, unique=True))
    parts = [draw(st.integers(1, 100)) for _ in ids]
    return Split({id: part / sum(parts) for id, part in zip(ids, parts, strict=True)}, tuple(shadows))


@given(splits())
def test_the_main_one_has_the_largest_share_and_is_of_equals_the_last(split: Split) -> None:
    largest = max(split.shares.values())
    assert split.main == [id for id, share in split.shares.items() if share == largest][-1]


@given(splits(), st.data())
def test_what_is_taken_out_leaves_its_share_to_the_main_one_and_all_others_as_they_were(
    split: Split, data: st.DataObject
) -> None:
    id = data.draw(st.sampled_from(split.members))
    if not split.can_spare(id):
        assert list(split.shares) == [id]
        return
    left = split.without(id)
    assert set(left.members) == set(split.members) - {id}
    assert sum(left.shares.values()) == pytest.approx(1)
    if id in split.shadows:
        assert left.shares == split.shares
        return
    largest = max(share for one, share in split.shares.items() if one != id)
    heir = [one for one, share in split.shares.items() if share == largest and one != id][-1]
    assert {one for one in left.shares if left.shares[one] != split.shares[one]} == {heir}


@given(splits(), st.sets(st.integers(1, 60)))
def test_of_those_that_are_there_it_is_what_is_left_or_nothing(split: Split, there: set[int]) -> None:
    left = split.among(there)
    if left is None:
        assert not set(split.shares) & there
    else:
        assert left.members == tuple(id for id in split.members if id in there)
        assert sum(left.shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(("shares", "whole"), [
    ([0.05, 0.95], True), ([0.333, 0.333, 0.333], True), ([1.0], True), ([0.05, 0.94], False), ([0.5, 0.6], False),
    ([1 / 3] * 3, True), ([], False),
])  # fmt: skip
def test_shares_are_one_together_but_for_what_each_was_rounded_by(shares: list[float], whole: bool) -> None:
    assert are_whole(shares) is whole


# in the store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "home", "llama")
    yield store
    store.close()


def put(store: Store, *steps: int) -> list[int]:
    return [add(store, "sql", step, content=str(step)).id for step in steps]


def share(store: Store, ids: list[int], shares: list[float], shadows: tuple[int, ...] = (), alias: str = "") -> Split:
    split = Split(dict(zip(ids, shares, strict=True)), shadows, seed=7)
    store.move_alias("sql", alias, split.main, "split", pinned=None if alias else True, split=split)
    return split


def test_it_is_known_again_with_its_order_its_shadows_and_its_seed(store: Store) -> None:
    ids = put(store, 500, 600, 700)
    split = share(store, [ids[1], ids[0]], [0.05, 0.95], (ids[2],))
    prod = share(store, [ids[2], ids[1]], [0.5, 0.5], alias="prod")
    with_again = Store(store.home, "llama")
    for one in (store, with_again):
        run = one.runs()["sql"]
        assert run.splits == {"": split, "prod": prod}
        assert list(run.splits[""].shares) == [ids[1], ids[0]]
        assert (run.aliases, run.pinned) == ({"": ids[0], "prod": ids[1]}, True)
    with_again.close()


def test_a_move_ends_it_and_the_journal_knows_both(store: Store) -> None:
    ids = put(store, 500, 600)
    store.move_alias("sql", "", ids[0], "follow")
    share(store, ids, [0.4, 0.6])
    store.move_alias("sql", "", ids[0], "set")
    assert store.runs()["sql"].splits == {}
    rows = store._database.rows("SELECT revision, why FROM moves ORDER BY id")
    assert rows == [(ids[0], "follow"), (ids[1], "split"), (ids[0], "set")]
    assert store._database.rows("SELECT count(*) FROM split_revisions") == [(0,)]


def test_one_that_can_not_be_written_whole_changes_nothing(store: Store) -> None:
    ids = put(store, 500, 600)
    share(store, ids, [0.1, 0.9])
    before = store.runs()["sql"]
    with pytest.raises(LorakitError, match="can't be written"):
        store.move_alias("sql", "", ids[0], "split", split=Split({ids[0]: 0.9, 999: 0.1}))
    assert store.runs()["sql"] == before
    assert len(store._database.rows("SELECT 1 FROM moves")) == 1


def test_none_of_its_revisions_is_removed_while_it_lasts(store: Store) -> None:
    ids = put(store, 500, 600, 700, 800)
    share(store, ids[:2], [0.4, 0.6], (ids[2],))
    assert store.remove(ids)[0] == [ids[3]]
    store.move_alias("sql", "", ids[0], "set")
    assert store.remove(ids[:3])[0] == ids[1:3]


def test_a_server_that_runs_needs_all_of_them_and_none_goes_into_the_trash(store: Store) -> None:
    ids = put(store, 500, 600, 700)
    share(store, ids[:2], [0.4, 0.6], (ids[2],), alias="prod")
    revisions = store.runs()["sql"].revisions
    with serving(store.home, "llama"):
        assert {id for _, id in in_use(store.home)} == set(ids)
    for id in ids:
        with pytest.raises(Conflict, match="sql@prod"):
            trash_stored(find_stored(revisions[id].name, store.home), store.home)


def test_what_goes_all_the_same_leaves_its_share_to_the_others_and_the_last_one_is_no_split(store: Store) -> None:
    ids = put(store, 500, 600, 700)
    share(store, ids, [0.1, 0.3, 0.6])
    revisions = store.runs()["sql"].revisions
    trash_stored(find_stored(revisions[ids[2]].name, store.home), store.home, force=True)
    run = store.runs()["sql"]
    assert run.splits[""].shares == pytest.approx({ids[0]: 0.1, ids[1]: 0.9})
    assert run.aliases == {"": ids[1]}
    trash_stored(find_stored(revisions[ids[1]].name, store.home), store.home, force=True)
    run = store.runs()["sql"]
    assert (run.splits, run.aliases) == ({}, {"": ids[0]})


def test_a_split_takes_its_revisions_out_of_the_trash_and_passes_them_over_no_more(store: Store) -> None:
    ids = put(store, 500, 600)
    store.move_alias("sql", "", ids[0], "rollback", passed_over={ids[1]: "it fails"})
    trash_stored(find_stored(store.runs()["sql"].revisions[ids[1]].name, store.home), store.home)
    share(store, ids, [0.9, 0.1])
    assert store.runs()["sql"].revisions.keys() == set(ids)
    assert store.passed_over() == {}


def test_what_is_forgotten_takes_its_split_along(store: Store) -> None:
    share(store, put(store, 500, 600), [0.9, 0.1])
    store.forget("sql")
    for table in ("splits", "split_revisions"):
        assert store._database.rows(f"SELECT count(*) FROM {table}") == [(0,)]
