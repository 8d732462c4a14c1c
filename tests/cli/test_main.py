"""The command line finds its verbs, and ends with the code that its errors have."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lorakit.cli.main import VERBS
from lorakit.cli.shared import note
from lorakit.errors import Refused
from lorakit.store import store
from tests.cli.commands import lorakit


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    ended = lorakit(capsys, "--help")
    assert ended.code == 0
    assert all(verb in ended.out for verb in VERBS)


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert lorakit(capsys, "--version").out.startswith("lorakit, version ")


@pytest.mark.parametrize("arguments", [["merg"], ["merge", "--nope"], ["merge"], ["mix", "--rank"], ["frobnicate"]])
def test_usage_errors_end_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    ended = lorakit(capsys, *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert "error: " in ended.err


def test_a_verb_misspelt_is_offered(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'merge'?" in lorakit(capsys, "merg").err


def test_errors_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    ended = lorakit(capsys, "merge", "/no/such/adapter", "--out", "x", "--json")
    assert ended.code == 3
    error = json.loads(ended.out)["error"]
    assert (error["type"], error["code"]) == ("NotFound", 3)
    assert error["message"] == "there is no adapter folder '/no/such/adapter', and no such name in the store"


def test_what_an_error_names_gives_a_terminal_no_orders(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise Refused("'\x1b[2J\x00' is no adapter:\nread on")

    monkeypatch.setattr(store, "default_home", fail)
    ended = lorakit(capsys, "store", "path")
    assert (ended.code, ended.err) == (4, "error: '\\x1b[2J\\x00' is no adapter:\nread on\n")
    note("note: \x1b[31m")
    assert capsys.readouterr().err == "note: \\x1b[31m\n"
    assert json.loads(lorakit(capsys, "store", "path", "--json").out)["error"]["message"].startswith("'\x1b[2J\0'")


def test_what_may_not_be_read_or_written_is_said_in_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise PermissionError(13, "Permission denied", "/closed")

    monkeypatch.setattr(store, "default_home", fail)
    ended = lorakit(capsys, "store", "path")
    assert (ended.code, "no permission for '/closed'" in ended.err, "Errno" in ended.err) == (1, True, False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"], ["merge", "--help"], ["mix", "--help"], ["verify", "--help"], ["unmerge", "--help"], ["merge"],
        ["mix", "x=y"], ["unmerge", "x"],
    ],
)  # fmt: skip
def test_help_and_usage_errors_import_no_torch(arguments: list[str]) -> None:
    program = (
        "import sys, lorakit.cli\n"
        "try: lorakit.cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'peft', 'huggingface_hub', 'rich'} & sys.modules.keys()\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = f"{sys.executable} -m lorakit --help | true"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in ended.stderr
