"""`lorakit fetch`: one pasted line, and nothing of its secret anywhere."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints.moving.archives import files_below, tarred
from tests.checkpoints.moving.web import WORDS, Web, serving, sha256
from tests.checkpoints.written import evaluated, write_checkpoint, write_model_checkpoint
from tests.cli.commands import Ended, lorakit
from tests.cli.test_ls import KEYS

Capture = pytest.CaptureFixture[str]
QUICK = ("--tries", "2", "--timeout", "0.5")


@pytest.fixture
def web() -> Iterator[Web]:
    with serving() as running:
        yield running


@pytest.fixture
def checkpoint(tmp_path: Path, base: Path) -> Path:
    log = [{"step": 500, "loss": 0.5}, evaluated(400, 1.25)]
    return write_checkpoint(tmp_path / "runs" / "sql" / "checkpoint-500", log, base_model_name_or_path=str(base))


def ensure_no_secret(ended: Ended, *folders: Path) -> None:
    said = ended.out + ended.err
    said += "".join(
        path.read_bytes().decode(errors="replace") + path.name
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    )
    assert not any(word in said for word in WORDS)


def test_one_line_says_what_came(capsys: Capture, web: Web, checkpoint: Path, tmp_path: Path) -> None:
    web.put("sql.tar.gz", tarred(checkpoint, "checkpoint-500"), cuts=[700])
    ended = lorakit(capsys, "fetch", web.url("sql.tar.gz"), "--out", tmp_path / "sql")
    assert (ended.code, ended.out) == (0, f"{tmp_path / 'sql'}\n")
    assert ended.err.startswith(
        f"fetched an adapter, written by transformers, base {tmp_path / 'base'}, rank 2, step 500, "
        f"eval_loss 1.25 (of step 400): 3 files, "
    )
    assert ended.err.endswith("resumed 1 time\n")
    assert files_below(tmp_path / "sql") == files_below(checkpoint)
    ensure_no_secret(ended, tmp_path)


def test_json_is_an_entry_of_ls_and_more(capsys: Capture, web: Web, checkpoint: Path, tmp_path: Path) -> None:
    data = tarred(checkpoint)
    web.put("sql.tar.gz", data)
    ended = lorakit(capsys, "fetch", web.url("sql.tar.gz"), "--out", tmp_path / "sql", "--json")
    row = json.loads(ended.out)
    assert list(row)[: len(KEYS)] == KEYS
    assert (row["step"], row["kind"], row["sha256"], row["writer"]) == (500, "adapter", sha256(data), "transformers")
    assert len(row["digest"]) == 64
    assert sorted(row["files"]) == sorted(files_below(checkpoint))
    [listed] = json.loads(lorakit(capsys, "ls", tmp_path / "sql", "--json").out)
    assert {name: listed[name] for name in KEYS if name not in ("id", "run")} == {
        name: row[name] for name in KEYS if name not in ("id", "run")
    }
    ensure_no_secret(ended)


def test_the_address_may_come_from_standard_input(
    capsys: Capture, web: Web, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.put("sql.tar.gz", tarred(checkpoint))
    monkeypatch.setattr(sys, "stdin", io.StringIO(web.url("sql.tar.gz") + "\n"))
    assert lorakit(capsys, "fetch", "-", "--out", tmp_path / "sql").code == 0
    assert files_below(tmp_path / "sql") == files_below(checkpoint)


@pytest.mark.parametrize("as_json", [False, True])
def test_no_failure_shows_a_secret(capsys: Capture, web: Web, checkpoint: Path, tmp_path: Path, as_json: bool) -> None:
    data = tarred(checkpoint)
    web.put("expired", data, statuses=[403], body=b"<Code>ExpiredToken</Code><Message>X-Amz-Signature=5ec4e7</Message>")
    web.put("down", data, statuses=[503] * 5)
    web.put("cut.tar.gz", data, cuts=[100, 0, 0, 0])
    web.put("broken.tar.gz", data[:-20])
    web.put("other.tar.gz", data)
    web.put("away", b"", location=f"ftp://u:{WORDS[1]}@elsewhere/?{WORDS[0]}")
    url = web.url
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").touch()
    cases: list[tuple[int, list[str]]] = [
        (4, [url("expired")]), (3, [url("none")]), (1, [url("down")]), (1, [url("cut.tar.gz")]),
        (4, [url("broken.tar.gz")]), (4, [url("other.tar.gz"), "--sha256", "0" * 64]), (4, [url("away")]),
        (2, [url("a"), url("b")]), (2, [url("a").replace("http", "gopher")]), (2, [url("a").replace("127", "[127")]),
        (4, [url("other.tar.gz"), "--max-size", "10B"]), (5, [url("a"), "--out", str(tmp_path / "there")]),
        (3, [url("none"), "--dry-run"]), (2, [url("a"), "--base", "b"]), (2, [url("a"), "--sha256", "x"]),
        (2, [url("a"), "--no-such-option"]),
    ]  # fmt: skip
    for code, arguments in cases:
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
        ended = lorakit(capsys, "fetch", *arguments, *out, *QUICK, *(["--json"] if as_json else []))
        assert ended.code == code, (arguments, ended)
        assert not (tmp_path / "out").exists()
        ensure_no_secret(ended, tmp_path)


@pytest.mark.parametrize("lost", ["https:/", "", " https://", "'https://"])
def test_no_verb_that_is_given_a_url_shows_its_secret(capsys: Capture, tmp_path: Path, lost: str) -> None:
    url = f"{lost}user:pa55word@127.0.0.1:1/a.bin?X-Amz-Signature=5ec4e7"
    there = str(write_checkpoint(tmp_path / "checkpoint-5"))
    verbs = [
        ["fetch", url, "--out", str(tmp_path / "out"), "--tries", "1"], ["pull", url], ["push", url, "org/sql"],
        ["push", there, url], ["export", url, str(tmp_path / "out")], ["export", there, url], ["show", url],
        ["diff", url, there], ["check", url], ["latest", url],
    ]  # fmt: skip
    for verb in verbs:
        ended = lorakit(capsys, *verb)
        assert ended.code != 0
        ensure_no_secret(ended)


def test_an_expired_url_says_when(capsys: Capture, web: Web, tmp_path: Path) -> None:
    web.put("a", b"", statuses=[403])
    url = web.url("a").replace("X-Amz-Expires=60", "X-Amz-Date=20260102T030405Z&X-Amz-Expires=60")
    ended = lorakit(capsys, "fetch", url, "--out", tmp_path / "out")
    assert ended.code == 4
    assert ended.err == (
        f"error: 'http://127.0.0.1:{web.port}/a': the URL has expired at 2026-01-02 03:05:05 UTC: ask for a new one\n"
    )


def test_a_url_that_the_shell_cut_says_so(capsys: Capture, tmp_path: Path) -> None:
    url = "https://models.s3.amazonaws.com/sql.tar.gz?X-Amz-Algorithm=AWS4-HMAC-SHA256"
    ended = lorakit(capsys, "fetch", url, "--out", tmp_path / "out")
    assert ended.code == 2
    assert "a shell ends a word at '&', so put the URL in single quotes" in ended.err


def test_a_dry_run_writes_nothing(capsys: Capture, web: Web, checkpoint: Path, tmp_path: Path) -> None:
    data = tarred(checkpoint)
    web.put("sql.tar.gz", data)
    ended = lorakit(capsys, "fetch", web.url("sql.tar.gz"), "--out", tmp_path / "out", "--dry-run")
    assert ended.out == f"http://127.0.0.1:{web.port}/sql.tar.gz: an archive, {len(data) / 1e3:.1f} kB\n"
    ended = lorakit(capsys, "fetch", checkpoint, "--out", tmp_path / "out", "--dry-run", "--json")
    assert json.loads(ended.out)["files"] == sorted(files_below(checkpoint))
    assert not (tmp_path / "out").exists()


def test_then_merge_makes_a_model_of_it(capsys: Capture, web: Web, checkpoint: Path, tmp_path: Path) -> None:
    web.put("sql.tar.gz", tarred(checkpoint))
    (tmp_path / "sql-merged").mkdir()
    (tmp_path / "sql-merged" / "x").touch()
    arguments = ("fetch", web.url("sql.tar.gz"), "--out", tmp_path / "sql", "--then", "merge")
    assert lorakit(capsys, *arguments).code == lorakit(capsys, *arguments, "--dry-run").code == 5
    no_base = (*arguments, "--then-out", tmp_path / "merged", "--base", tmp_path / "none")
    assert lorakit(capsys, *no_base).code == 3
    assert (web.asked, (tmp_path / "sql").exists()) == ([], False)
    ended = lorakit(capsys, *arguments, "--then-out", tmp_path / "merged")
    assert (ended.code, ended.out) == (0, f"{tmp_path / 'merged'}\n")
    lorakit(capsys, "merge", checkpoint, "--out", tmp_path / "expected")
    expected = {
        name: data for name, data in files_below(tmp_path / "expected").items() if name.endswith(".safetensors")
    }
    assert {name: files_below(tmp_path / "merged")[name] for name in expected} == expected
    ensure_no_secret(ended, tmp_path)


def test_then_merge_of_a_whole_model_is_refused_and_the_model_stays(capsys: Capture, web: Web, tmp_path: Path) -> None:
    web.put("full.tar", tarred(write_model_checkpoint(tmp_path / "full" / "checkpoint-5"), mode="w"))
    ended = lorakit(capsys, "fetch", web.url("full.tar"), "--out", tmp_path / "out", "--then", "merge")
    assert ended.code == 4
    assert "is no adapter: there is nothing to merge into a base" in ended.err
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_then_serve_becomes_the_server_and_forgets_the_url(
    capsys: Capture, web: Web, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.put("sql.tar.gz", tarred(checkpoint))
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, words: started.append(words))
    lorakit(capsys, "fetch", web.url("sql.tar.gz"), "--out", tmp_path / "sql", "--then", "serve")
    adapter = f"sql={tmp_path / 'sql'}"
    assert started[0][1:] == ["-m", "lorakit", "serve", "--adapter", adapter, "--", str(tmp_path / "base")]


def test_help_and_a_refused_address_import_no_torch(tmp_path: Path) -> None:
    program = "import sys; from lorakit.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    program += "sys.exit('torch' in sys.modules)"
    for arguments in (["fetch", "--help"], ["fetch", "ftp://x", "--out", str(tmp_path / "o")]):
        subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)
