"""Large listings are remembered, and never differ from a fresh look."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lorakit.checkpoints import remembered
from lorakit.checkpoints.metadata import Metadata, Stored, checkpoints_in, look_into, metadata_of
from lorakit.checkpoints.remembered import MANY, metadata_of_all
from tests.checkpoints.written import LATER, evaluated, write_checkpoint, write_model_checkpoint

STATE = "trainer_state.json"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in range(1, MANY + 1):
        write_checkpoint(tmp_path / "sql" / f"checkpoint-{step}", [evaluated(step, step / 10)])
    write_model_checkpoint(tmp_path / "sql" / "checkpoint-900", [evaluated(900, float("nan"))])
    return tmp_path / "sql"


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The steps that were looked into, in their order."""
    steps: list[int | None] = []

    def look(candidate: Any) -> tuple[Metadata, str]:
        steps.append(candidate.step)
        return look_into(candidate)

    monkeypatch.setattr(remembered, "look_into", look)
    return steps


def listed(run: Path, stored: dict[str, Stored] | None = None, *, with_digest: bool = False) -> list[str]:
    """As text, in which NaN equals NaN."""
    home = run.parent / "home"
    rows = metadata_of_all(checkpoints_in(run), stored or {}, home, with_digest=with_digest)
    fresh = [metadata_of(candidate, stored, with_digest=with_digest) for candidate in checkpoints_in(run)]
    digests = {row.path: row.digest for row in fresh if row.digest}
    assert all(row.digest == digests.get(row.path, row.digest) for row in rows)
    assert [{**row.as_dict(), "digest": None} for row in rows] == [{**row.as_dict(), "digest": None} for row in fresh]
    return [repr(row) for row in rows]


def test_what_did_not_change_is_looked_into_once(run: Path, looked: list[int | None]) -> None:
    first = listed(run)
    assert looked == [*range(1, MANY + 1), 900]
    assert listed(run) == first
    assert len(looked) == MANY + 1


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", STATE])
@pytest.mark.parametrize("change", ["append", "same size", "remove", "touch"])
def test_a_file_that_changed_is_seen(run: Path, looked: list[int | None], name: str, change: str) -> None:
    listed(run)
    looked.clear()
    file = run / "checkpoint-7" / name
    if change == "append":
        file.write_bytes(file.read_bytes() + b"x")
        os.utime(file, ns=(LATER, LATER))
    elif change == "same size":
        file.write_bytes(bytes(file.stat().st_size))
    elif change == "touch":
        os.utime(file, ns=(LATER + 5, LATER + 5))
    else:
        file.unlink()
    listed(run)
    assert looked == [7]


def test_new_ones_appear_and_those_that_went_away_go(run: Path, looked: list[int | None]) -> None:
    listed(run)
    looked.clear()
    write_checkpoint(run / "checkpoint-1000")
    (run / "checkpoint-7").rename(run / "checkpoint-8000")
    assert len(listed(run)) == MANY + 2
    assert looked == [1000, 8000]


def test_what_is_not_finished_is_not_remembered(run: Path, looked: list[int | None]) -> None:
    (run / "checkpoint-7" / STATE).unlink()
    listed(run)
    looked.clear()
    listed(run)
    assert looked == [7]


def test_digests_are_remembered_and_what_the_store_says_is_not(run: Path, looked: list[int | None]) -> None:
    place = str(run / "checkpoint-7")
    signature = look_into(checkpoints_in(run)[6])[1]
    stored = {place: Stored("sql@step-7-12345678", "12345678", signature, ("prod",))}
    assert "12345678" in listed(run, stored, with_digest=True)[6]
    plain = listed(run, with_digest=True)
    assert "12345678" not in plain[6]
    assert "digest=None" not in "".join(plain[:-1])
    assert listed(run) == plain


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 0, "rows": {}}', "\0"])
def test_a_file_that_says_nothing_is_written_again(run: Path, content: str) -> None:
    first = listed(run)
    (file,) = (run.parent / "home" / "listings").iterdir()
    file.write_text(content)
    assert listed(run) == first
    assert len(file.read_bytes()) > 10_000
    assert list(file.parent.iterdir()) == [file]


def test_where_nothing_can_be_written_it_is_read_each_time(run: Path) -> None:
    (run.parent / "home").touch()
    assert listed(run) == listed(run)


def test_small_listings_write_nothing(run: Path) -> None:
    (run / "checkpoint-1").rename(run.parent / "checkpoint-1")
    (run / "checkpoint-2").rename(run.parent / "checkpoint-2")
    listed(run)
    assert not (run.parent / "home").exists()
