"""`lorakit alias`: what a name means from the next request on."""

from __future__ import annotations

import json

import pytest

from tests.cli.commands import lorakit
from tests.server.running import Running

Capture = pytest.CaptureFixture[str]


def test_a_name_and_an_alias_of_it_mean_what_they_are_told_to(capsys: Capture, server: Running) -> None:
    for alias, revision, step in (
        ("sql", "step-500", 500), ("sql@prod", "latest", 1000), ("sql@prod", "best", 500),
        ("sql", "sql@step-1000", 1000), ("sql@old", "prod", 500),
    ):  # fmt: skip
        ended = lorakit(capsys, "alias", alias, revision)
        assert (ended.code, ended.err) == (0, "")
        assert ended.out.startswith(f"sql@step-{step}-")
        assert server.do(server.served.revision_of(alias)) == ended.out.strip()


def test_as_data_it_is_what_the_server_knows_of_the_name(capsys: Capture, server: Running) -> None:
    told = json.loads(lorakit(capsys, "alias", "sql@prod", "step-500", "--json").out)
    assert told["name"] == "sql"
    assert told["aliases"]["prod"].startswith("sql@step-500-")


def test_a_dry_run_says_from_where_to_where_and_moves_nothing(capsys: Capture, server: Running) -> None:
    now = server.do(server.served.revision_of("sql"))
    told = json.loads(lorakit(capsys, "alias", "sql", "step-500", "--dry-run", "--json").out)
    assert (told["from"], told["to"].rpartition("-")[0]) == (now, "sql@step-500")
    ended = lorakit(capsys, "alias", "sql@prod", "sql@best", "--dry-run")
    assert ended.code == 0
    assert "means nothing yet" in ended.err
    assert server.do(server.served.revision_of("sql")) == now
    assert server.do(server.served.revision_of("sql@prod")) is None


def test_what_can_not_be_is_said_and_changes_nothing(capsys: Capture, server: Running) -> None:
    now = server.do(server.served.revision_of("sql"))
    for arguments, code, words in (
        (["sql", "step-500:5%"], 2, "one revision as yet"),
        (["sql", "step-500:0.05", "step-1000:0.95"], 2, "one revision as yet"),
        (["sql@", "step-500"], 2, "NAME@ALIAS"),
        (["@prod", "step-500"], 2, "NAME@ALIAS"),
        (["sql"], 2, "REV"),
        (["sql", "step-7"], 3, "has no revision 'step-7'"),
        (["chat", "latest"], 3, "no adapter 'chat'"),
        (["sql@step-9", "latest"], 4, "would read as a step"),
        (["sql@latest", "step-500"], 4, "reserved"),
    ):
        ended = lorakit(capsys, "alias", *arguments)
        assert (ended.code, ended.out) == (code, ""), arguments
        assert words in ended.err
        assert server.do(server.served.revision_of("sql")) == now
