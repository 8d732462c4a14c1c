"""A store at a glance: read as it stands, and left as it stands."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from lorakit.store.catalog import Facts
from lorakit.store.database import NEWEST, Database
from lorakit.store.glance import records_in, schema_of, selectors_in
from lorakit.store.kept import Described, Kept, keep_checkpoint
from lorakit.store.store import Store
from lorakit.store.trash import find_stored, trash_stored
from tests.checkpoints.written import write_checkpoint


@pytest.fixture
def kept(tmp_path: Path) -> list[Kept]:
    found = []
    for step in (500, 1000):
        folder = write_checkpoint(tmp_path / "runs" / "sql" / f"checkpoint-{step}", seed=step)
        described = Described("adapter", "transformers", step, Facts(step=step))
        found.append(keep_checkpoint(tmp_path / "home", folder, described, run="sql", unchanged=lambda: True))
    return found


def test_runs_are_listed_with_what_may_follow_them(tmp_path: Path, kept: list[Kept]) -> None:
    newest_first = [one.id.removeprefix("sql@") for one in reversed(kept)]
    assert selectors_in(tmp_path / "home") == {"sql": ["latest", "best", *newest_first]}
    assert (schema_of(tmp_path / "home"), records_in(tmp_path / "home")) == (NEWEST, 2)


def test_what_lies_in_the_trash_is_told_apart(tmp_path: Path, kept: list[Kept]) -> None:
    trash_stored(find_stored(kept[0].id, tmp_path / "home"), tmp_path / "home")
    assert selectors_in(tmp_path / "home", trashed=True) == {"sql": [kept[0].id.removeprefix("sql@")]}
    assert kept[0].id.removeprefix("sql@") not in selectors_in(tmp_path / "home")["sql"]


def test_nothing_is_made_or_changed(tmp_path: Path, kept: list[Kept]) -> None:
    home = tmp_path / "home"
    assert selectors_in(tmp_path / "nowhere") == {}
    assert not (tmp_path / "nowhere").exists()
    before = sorted(path.name for path in home.iterdir())
    selectors_in(home)
    assert sorted(path.name for path in home.iterdir()) == before


def test_what_another_process_writes_is_seen_and_not_waited_for(tmp_path: Path, kept: list[Kept]) -> None:
    home = tmp_path / "home"
    store = Store(home, "base")
    with sqlite3.connect(home / "store.sqlite3", isolation_level=None) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE kept SET run = 'other'")
        assert list(selectors_in(home)) == ["sql"]
        writer.execute("COMMIT")
    writer.close()
    assert list(selectors_in(home)) == ["other"]
    store.close()


def test_a_store_of_another_version_or_a_damaged_one_has_nothing_to_say(tmp_path: Path) -> None:
    Database(tmp_path / "home").close()
    file = tmp_path / "home" / "store.sqlite3"
    with sqlite3.connect(file) as database:
        database.execute("DROP TABLE kept")
    database.close()
    assert (selectors_in(tmp_path / "home"), records_in(tmp_path / "home")) == ({}, 0)
    file.write_bytes(b"lost" * 1000)
    assert selectors_in(tmp_path / "home") == {}
    with pytest.raises(sqlite3.Error):
        schema_of(tmp_path / "home")
