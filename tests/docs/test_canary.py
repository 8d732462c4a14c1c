"""The page on canaries, done: each command of it in its order, on a running server, prints what the page shows."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.cli.commands import lorakit
from tests.docs.pages import PAGES, sessions
from tests.folders import write_base
from tests.server.fake_engine import put_checkpoint
from tests.server.running import running


def test_the_page_says_what_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LORAKIT_API_KEY", raising=False)
    put_checkpoint(tmp_path / "runs" / "sql", 500)
    with running(tmp_path, write_base(tmp_path / "base")) as there:
        monkeypatch.setenv("LORAKIT_URL", there.url)
        put_checkpoint(tmp_path / "runs" / "sql", 600)
        known = there.served.reconciler
        there.do(there.served.until(lambda: known.resolve("sql").facts.step == 600))  # type: ignore[union-attr]
        told: list[object] = []
        known.shadow_observers.append(told.append)
        for shown in sessions(PAGES["howto/canary.md"]):
            if shown.command.startswith("lorakit ps --compare"):
                there.do(there.served.ask("sql"))
                there.do(there.served.until(lambda: told))
            ended = lorakit(capsys, *shlex.split(shown.command)[1:])
            assert ended.code == 0, ended.err
            assert shown.is_what(ended.out + ended.err), f"$ {shown.command}\n{ended.out}{ended.err}"
