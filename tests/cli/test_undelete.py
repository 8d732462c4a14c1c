"""`lorakit undelete`: what can be taken back, and back it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.store.kept import Kept, kept_in
from lorakit.store.trash import trashed_in
from tests.cli.commands import lorakit
from tests.cli.test_rm import checkpoint as checkpoint
from tests.cli.test_rm import home as home
from tests.cli.test_rm import one as one
from tests.store.kept import contents

Capture = pytest.CaptureFixture[str]


def test_without_an_id_it_lists_what_can_be_taken_back(
    capsys: Capture, home: Path, one: Kept, checkpoint: Path
) -> None:
    ended = lorakit(capsys, "undelete")
    assert (ended.code, ended.out, ended.err) == (0, "", "the trash is empty\n")
    assert json.loads(lorakit(capsys, "undelete", "--json").out) == []
    lorakit(capsys, "rm", one.id, checkpoint, "-y")
    head, *rows = lorakit(capsys, "undelete").out.splitlines()
    assert head.split() == ["ID", "WHAT", "SIZE", "REMOVED", "UNTIL"]
    assert [row.split()[1] for row in rows] == [one.id, str(checkpoint)]
    listed = json.loads(lorakit(capsys, "undelete", "--json").out)
    assert [(entry["name"], entry["in"]) for entry in listed] == [(one.id, "store"), (str(checkpoint), "run")]
    assert all(entry["until"] - entry["at"] == 7 * 86_400 for entry in listed)


def test_each_goes_back_to_where_it_was(capsys: Capture, home: Path, one: Kept, checkpoint: Path) -> None:
    before = contents(checkpoint)
    lorakit(capsys, "rm", one.id, checkpoint, "-y")
    uids = [trashed.uid[:8] for trashed in trashed_in(home)]
    assert lorakit(capsys, "undelete", *uids, "--dry-run").err.count("would be back") == 2
    assert not checkpoint.exists()
    said = json.loads(lorakit(capsys, "undelete", *uids, "--json").out)
    assert [entry["name"] for entry in said["back"]] == [one.id, str(checkpoint)]
    assert contents(checkpoint) == before
    assert kept_in(home) == [one]
    assert trashed_in(home) == []


def test_a_place_that_is_taken_by_now_ends_with_5(capsys: Capture, home: Path, checkpoint: Path) -> None:
    lorakit(capsys, "rm", checkpoint, "-y")
    checkpoint.mkdir()
    ended = lorakit(capsys, "undelete", checkpoint)
    assert ended.code == 5
    assert "is taken by now" in ended.err
    assert lorakit(capsys, "undelete", checkpoint, "--dry-run") == ended
    checkpoint.rmdir()
    assert lorakit(capsys, "undelete", checkpoint).code == 0


def test_what_is_not_in_the_trash_ends_with_3(capsys: Capture, home: Path, one: Kept) -> None:
    assert lorakit(capsys, "undelete", one.id).code == 3
    assert lorakit(capsys, "undelete", "nothing").code == 3
    assert lorakit(capsys, "undelete", "half\udcff").code == 3
