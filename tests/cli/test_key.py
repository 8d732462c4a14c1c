"""`lorakit key`: create, ls and revoke."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path

import pytest

from tests.cli.commands import lorakit

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_create_prints_the_key_and_nothing_else_and_nothing_shows_it_again(capsys: Capture, home: Path) -> None:
    ended = lorakit(capsys, "key", "create", "--adapters", "sql*", "--name", "team a")
    key = ended.out.strip()
    assert (ended.code, ended.out) == (0, f"{key}\n")
    assert re.fullmatch("lk-[A-Za-z0-9_-]{43}", key)
    assert key not in ended.err
    for command in (("ls",), ("ls", "--json"), ("ls", "--all")):
        shown = lorakit(capsys, "key", *command)
        assert "sql*" in shown.out
        assert "team a" in shown.out
        assert key not in shown.out + shown.err
    assert not any(key.encode() in file.read_bytes() for file in home.rglob("*") if file.is_file())


def test_create_as_data(capsys: Capture, home: Path) -> None:
    flags = ("--adapters", "a*,b", "--adapters", "c", "--admin", "--no-base", "--rate", "10/s", "--tokens", "1.5M/day")
    made = json.loads(lorakit(capsys, "key", "create", *flags, "--json").out)
    assert made["key"].startswith("lk-")
    (row,) = json.loads(lorakit(capsys, "key", "ls", "--json").out)
    assert row["id"] == made["id"]
    said = {"adapters": ["a*", "b", "c"], "admin": True, "base": False, "rate": "10/s", "tokens_per_day": 1_500_000}
    assert said.items() <= row.items()
    assert said.items() <= made.items()
    assert (row["used"], row["revoked"], row["tokens_today"]) == (None, None, 0)


def test_an_admin_key_is_for_every_adapter_unless_it_is_said_otherwise(capsys: Capture, home: Path) -> None:
    assert json.loads(lorakit(capsys, "key", "create", "--admin", "--json").out)["adapters"] == ["*"]


@pytest.mark.parametrize(
    "flags",
    [(), ("--adapters", ""), ("--adapters", "a/b"), ("--adapters", "sql@prod"), ("--adapters", "é"),
     ("--adapters", "a", "--rate", "10"), ("--adapters", "a", "--rate", "0/s"), ("--adapters", "a", "--rate", "1/day"),
     ("--adapters", "a", "--tokens", "1M"), ("--adapters", "a", "--tokens", "x/day"),
     ("--adapters", "a", "--tokens", "0/day"), ("--adapters", "a", "--tokens", "5/s")],
)  # fmt: skip
def test_what_means_nothing_is_a_usage_error_that_says_how_it_is_written(
    capsys: Capture, home: Path, flags: tuple[str, ...]
) -> None:
    ended = lorakit(capsys, "key", "create", *flags)
    assert (ended.code, ended.out) == (2, "")
    assert "--" in ended.err
    assert not (home / "store.sqlite3").exists()


def test_a_revoked_key_is_listed_only_when_asked_for(capsys: Capture, home: Path) -> None:
    made = json.loads(lorakit(capsys, "key", "create", "--adapters", "*", "--json").out)
    assert lorakit(capsys, "key", "revoke", made["id"], "--dry-run").code == 0
    assert made["id"] in lorakit(capsys, "key", "ls").out
    assert lorakit(capsys, "key", "revoke", made["id"]).code == 0
    ended = lorakit(capsys, "key", "ls")
    assert (ended.out, "revoked" in ended.err) == ("", True)
    assert "revoked" in lorakit(capsys, "key", "ls", "--all").out
    assert lorakit(capsys, "key", "revoke", made["id"]).code == 3
    assert lorakit(capsys, "key", "revoke", "nobody").code == 3


def test_a_store_can_be_named_and_to_look_makes_none(capsys: Capture, home: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert "whoever" in lorakit(capsys, "key", "ls", "--home", other).err
    assert lorakit(capsys, "key", "revoke", "x", "--home", other).code == 3
    assert lorakit(capsys, "key", "create", "--adapters", "*", "--home", other, "--dry-run").out == ""
    assert not other.exists()
    assert lorakit(capsys, "key", "create", "--adapters", "*", "--home", other).code == 0
    with sqlite3.connect(other / "store.sqlite3") as db:
        assert db.execute("SELECT count(*) FROM keys").fetchone() == (1,)
    db.close()
    assert not home.exists()
