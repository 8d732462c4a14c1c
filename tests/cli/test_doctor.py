"""`lorakit doctor`, on the machine that the tests run on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lorakit.cli.checkup import software
from tests.cli.commands import lorakit
from tests.folders import write_base

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of its own, a server that is not there, and secrets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAKIT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("LORAKIT_API_KEY", "5ec4e7")
    monkeypatch.setenv("HF_TOKEN", "hf_5ec4e7")


def test_every_finding_has_a_state_and_what_is_wrong_has_a_reason(capsys: Capture, tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    ended = lorakit(capsys, "doctor", "base", "--json")
    found = {one["name"]: one for one in json.loads(ended.out)}
    assert {one["state"] for one in found.values()} <= {"ok", "warning", "problem"}
    assert all(one["why"] for one in found.values() if one["state"] != "ok"), found
    assert {"Python", "lorakit", "torch", "GPU", "vLLM", "extras", "Hub", "memory", "shared memory", "open files",
            "inotify", "store", "disk", "port", "server", "key", "base"} <= found.keys()  # fmt: skip
    assert found["server"]["state"] == "warning"
    assert ended.code == any(one["state"] == "problem" for one in found.values())


def test_a_problem_ends_it_with_1(capsys: Capture) -> None:
    ended = lorakit(capsys, "doctor", "no/such/base")
    assert ended.code == 1
    assert "problem  base" in ended.out
    assert "1 problem" in ended.err


def test_no_secret_is_printed(capsys: Capture) -> None:
    ended = lorakit(capsys, "doctor")
    assert "5ec4e7" not in ended.out + ended.err
    assert "LORAKIT_API_KEY is set" in ended.out
    assert "a token is set" in ended.out


def test_nothing_is_left_behind(capsys: Capture, tmp_path: Path) -> None:
    lorakit(capsys, "doctor")
    assert os.listdir(tmp_path) == []


def test_a_look_that_fails_says_so_and_the_others_go_on(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(software, "hub_here", fails)
    found = {one["name"]: one for one in json.loads(lorakit(capsys, "doctor", "--json").out)}
    assert (found["Hub"]["state"], found["Hub"]["why"]) == ("warning", "RuntimeError: no such thing")
    assert "store" in found
