"""`lorakit store`: add, verify, gc and path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.store.kept import Kept, find_kept
from lorakit.store.trash import trashed_in
from tests.checkpoints.written import write_checkpoint
from tests.cli.commands import lorakit
from tests.cli.test_rm import checkpoint as checkpoint
from tests.cli.test_rm import home as home
from tests.cli.test_rm import one as one

Capture = pytest.CaptureFixture[str]


def test_path_prints_one_path_and_nothing_else(capsys: Capture, home: Path, one: Kept) -> None:
    assert lorakit(capsys, "store", "path").out == f"{home}\n"
    for name in ("chat", one.id, one.uid, "chat@latest"):
        ended = lorakit(capsys, "store", "path", name)
        assert (ended.code, ended.out, ended.err) == (0, f"{one.folder}\n", "")
    assert json.loads(lorakit(capsys, "store", "path", "chat", "--json").out) == {"path": str(one.folder)}
    for name in ("nobody", "half\udcff"):
        assert lorakit(capsys, "store", "path", name).code == 3


def test_add_prints_the_id_under_which_it_is_kept_and_nothing_else(capsys: Capture, home: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "runs" / "sql" / "checkpoint-500", seed=5)
    ended = lorakit(capsys, "store", "add", folder, "--dry-run")
    assert (ended.code, ended.out, find_kept("sql", home)) == (0, "sql@step-500\n", None)
    ended = lorakit(capsys, "store", "add", folder)
    kept = find_kept("sql@step-500", home)
    assert kept is not None
    assert (ended.code, ended.out, ended.err) == (0, f"{kept.id}\n", "")
    row = json.loads(lorakit(capsys, "store", "add", folder.parent, "--run", "mine", "--json").out)
    assert (row["run"], row["step"], row["state"], row["aliases"]) == ("mine", 500, "finished", ["latest"])


def test_add_keeps_nothing_that_is_not_finished_or_not_there(capsys: Capture, home: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "sql" / "checkpoint-500")
    (folder / "adapter_model.safetensors").write_bytes(b"begun")
    assert lorakit(capsys, "store", "add", folder).code == 4
    assert lorakit(capsys, "store", "add", tmp_path / "nowhere").code == 3
    assert find_kept("sql", home) is None


def test_the_path_of_a_store_that_is_not_there_yet_makes_none(capsys: Capture, home: Path) -> None:
    assert lorakit(capsys, "store", "path").out == f"{home}\n"
    assert lorakit(capsys, "store", "verify").code == 0
    assert lorakit(capsys, "store", "gc").code == 0
    assert not home.exists()


def test_verify_ends_with_0_or_with_4_and_says_what_is_wrong(capsys: Capture, home: Path, one: Kept) -> None:
    ended = lorakit(capsys, "store", "verify")
    assert (ended.code, ended.out) == (0, "")
    assert "all as they were kept" in ended.err
    (one.folder / "optimizer.pt").chmod(0o644)
    (one.folder / "optimizer.pt").write_text("other")
    ended = lorakit(capsys, "store", "verify")
    assert ended.code == 4
    assert all(line.startswith(f"{one.id}: ") for line in ended.out.splitlines())
    said = lorakit(capsys, "store", "verify", "--json")
    assert said.code == 4
    report = json.loads(said.out)
    assert (report["home"], report["contents"], report["bytes"]) == (str(home), 1, one.size)
    assert {wrong["what"] for wrong in report["wrong"]} == {one.id}


def test_gc_says_what_goes_and_the_bytes_that_it_frees(capsys: Capture, home: Path, one: Kept) -> None:
    lorakit(capsys, "rm", one.id, "-y")
    nothing = {"dry_run": False, "bytes": 0, "cleared": [], "left": []}
    assert json.loads(lorakit(capsys, "store", "gc", "--json").out) == nothing
    ended = lorakit(capsys, "store", "gc", "--older-than", "0s", "--dry-run")
    assert [row.split()[:2] for row in ended.out.splitlines()] == [["WHAT", "NAME"], ["trash", one.id]]
    assert "would be freed" in ended.err
    assert trashed_in(home)
    said = json.loads(lorakit(capsys, "store", "gc", "--older-than", "0s", "--json").out)
    assert said["bytes"] == one.size
    assert said["cleared"] == [{"what": "trash", "name": one.id, "uid": one.uid, "size": one.size}]
    assert trashed_in(home) == []
    assert not one.folder.exists()


def test_gc_ends_with_1_and_the_reason_when_something_stays(
    capsys: Capture, home: Path, one: Kept, checkpoint: Path
) -> None:
    lorakit(capsys, "rm", one.id, checkpoint, "-y")
    (journal,) = (checkpoint.parent / ".lorakit" / "trash").glob("*.json")
    journal.write_text("cut short")
    ended = lorakit(capsys, "store", "gc", "--older-than", "0s")
    assert ended.code == 1
    assert [row.split()[:2] for row in ended.out.splitlines()] == [["WHAT", "NAME"], ["trash", one.id]]
    assert f"note: '{journal.with_suffix('')}' stays" in ended.err
    said = lorakit(capsys, "store", "gc", "--json")
    assert (said.code, len(json.loads(said.out)["left"])) == (1, 1)
    assert (journal.with_suffix("") / "checkpoint-100").is_dir()


def test_a_lost_database_ends_verify_with_4(capsys: Capture, home: Path, one: Kept) -> None:
    (home / "store.sqlite3").unlink()
    ended = lorakit(capsys, "store", "verify")
    assert (ended.code, ended.out.startswith(f"{one.folder}: ")) == (4, True)
    (home / "store.sqlite3").write_bytes(b"no database" * 1000)
    assert lorakit(capsys, "store", "verify").code == 4


@pytest.mark.parametrize("age", ["much", "-1d", "7"])
def test_what_is_no_time_ends_with_2(capsys: Capture, home: Path, age: str) -> None:
    assert lorakit(capsys, "store", "gc", "--older-than", age).code == 2


@pytest.mark.parametrize(
    "verb", [["store"], ["store", "add"], ["store", "verify"], ["store", "gc"], ["store", "path"], ["rm"], ["undelete"]]
)
def test_every_help_has_an_example(capsys: Capture, verb: list[str]) -> None:
    ended = lorakit(capsys, *verb, "--help")
    assert ended.code == 0
    assert f"lorakit {' '.join(verb)}" in ended.out.partition("\n")[2]
