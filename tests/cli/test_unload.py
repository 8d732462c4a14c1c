"""`lorakit unload`: a name that is served no longer."""

from __future__ import annotations

import json

import pytest

from tests.cli.commands import lorakit
from tests.server.running import Running

Capture = pytest.CaptureFixture[str]


def test_a_name_is_forgotten_and_its_place_in_the_engine_free(capsys: Capture, server: Running) -> None:
    ended = lorakit(capsys, "unload", "sql", "--yes", "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["deleted"] is True
    assert server.do(server.served.revision_of("sql")) is None
    server.do(server.served.until(lambda: not server.engine.inside))


def test_with_nobody_to_ask_it_wants_to_be_told(capsys: Capture, server: Running) -> None:
    ended = lorakit(capsys, "unload", "sql")
    assert ended.code == 2
    assert "--yes" in ended.err
    assert server.do(server.served.revision_of("sql"))


def test_on_a_terminal_it_asks_and_names_what_goes(
    capsys: Capture, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for said, code, there in (("n", 1, True), ("y", 0, False)):
        asked: list[str] = []
        monkeypatch.setattr(
            "click.confirm", lambda question, said=said, asked=asked, **_: asked.append(question) or said == "y"
        )
        assert lorakit(capsys, "unload", "sql").code == code
        assert "sql@step-500-" in asked[0]
        assert (server.do(server.served.revision_of("sql")) is not None) == there


def test_a_dry_run_names_what_would_go(capsys: Capture, server: Running) -> None:
    ended = lorakit(capsys, "unload", "sql", "--dry-run", "--json")
    told = json.loads(ended.out)
    assert [name.rpartition("-")[0] for name in told["revisions"]] == ["sql@step-500", "sql@step-1000"]
    assert server.do(server.served.revision_of("sql"))


def test_a_name_that_is_not_there_is_not_found(capsys: Capture, server: Running) -> None:
    for name in ("nobody", "a/b", "..", "é"):
        assert lorakit(capsys, "unload", name, "--yes").code == 3
