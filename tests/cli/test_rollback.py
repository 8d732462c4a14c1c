"""`lorakit rollback`: back to what a name meant before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands import lorakit
from tests.server.fake_engine import put_checkpoint
from tests.server.running import Running

Capture = pytest.CaptureFixture[str]


def test_the_name_means_what_it_meant_before_and_stays_there(capsys: Capture, server: Running, tmp_path: Path) -> None:
    newest = server.do(server.served.revision_of("sql"))
    before = lorakit(capsys, "alias", "sql", "step-500").out.strip()
    lorakit(capsys, "alias", "sql", "step-1000")
    planned = json.loads(lorakit(capsys, "rollback", "sql", "--dry-run", "--json").out)
    assert planned == {"dry_run": True, "name": "sql", "from": newest, "to": before}
    ended = lorakit(capsys, "rollback", "sql")
    assert (ended.code, ended.out) == (0, f"{before}\n")
    assert server.do(server.served.revision_of("sql")) == before
    put_checkpoint(tmp_path / "runs" / "sql", 1500)
    server.do(server.served.until(lambda: len(server.served.reconciler.runs["sql"].revisions) == 3))
    assert server.do(server.served.revision_of("sql")) == before


def test_where_there_is_nothing_before_it_says_so(capsys: Capture, server: Running, tmp_path: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "alone", 1)
    server.do(server.served.until(lambda: "alone" in server.served.reconciler.runs))
    server.do(server.served.until(lambda: server.served.reconciler.runs["alone"].aliases))
    for name, words in (("chat", "no adapter 'chat'"), ("alone", "nothing to roll back to")):
        for more in ([], ["--dry-run"]):
            ended = lorakit(capsys, "rollback", name, *more)
            assert (ended.code, ended.out) == (3, "")
            assert words in ended.err
