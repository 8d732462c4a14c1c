"""`lorakit load`: an adapter of this machine's into a running server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands import lorakit
from tests.server.fake_engine import put_adapter
from tests.server.running import Running

Capture = pytest.CaptureFixture[str]


def test_it_is_served_under_its_name_and_its_revision_printed(
    capsys: Capture, server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_adapter(tmp_path / "roots" / "chat", 3)
    monkeypatch.chdir(tmp_path)
    ended = lorakit(capsys, "load", "chat", "roots/chat")
    assert (ended.code, ended.err) == (0, "")
    assert server.do(server.served.revision_of("chat")) == ended.out.strip()


def test_a_name_that_exists_moves_to_it(capsys: Capture, server: Running, tmp_path: Path) -> None:
    folder = put_adapter(tmp_path / "roots" / "other", 3)
    told = json.loads(lorakit(capsys, "load", "sql", folder, "--json").out)
    assert told["revision"] == server.do(server.served.revision_of("sql"))
    assert len(told["revisions"]) == 3


def test_a_dry_run_says_what_the_name_means_now_and_loads_nothing(
    capsys: Capture, server: Running, tmp_path: Path
) -> None:
    folder = put_adapter(tmp_path / "roots" / "other", 3)
    now = server.do(server.served.revision_of("sql"))
    ended = lorakit(capsys, "load", "sql", folder, "--dry-run", "--json")
    assert json.loads(ended.out) == {"dry_run": True, "name": "sql", "source": str(folder), "revision": now}
    assert now in ended.err
    assert "not served" in lorakit(capsys, "load", "chat", folder, "--dry-run").err
    assert server.do(server.served.revision_of("sql")) == now


def test_what_the_server_refuses_is_said_in_its_words(
    capsys: Capture, server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_adapter(tmp_path / "roots" / "chat", 3)
    put_adapter(tmp_path / "roots" / "too-large", 3, rank=32)
    put_adapter(tmp_path / "elsewhere", 3)
    monkeypatch.chdir(tmp_path)
    for name, source, code, words in (
        ("chat", "roots/nothing", 3, "there is no folder"),
        ("chat", "elsewhere", 4, "--root"),
        ("chat", "https://example.com/chat", 4, "lorakit fetch"),
        ("latest", "roots/chat", 4, "reserved"),
        ("chat", "roots/too-large", 4, "--max-lora-rank"),
    ):
        ended = lorakit(capsys, "load", name, source)
        assert (ended.code, ended.out) == (code, ""), source
        assert words in ended.err


def test_a_mix_gets_a_name_and_is_forgotten_by_it(capsys: Capture, server: Running) -> None:
    mix = "mix(sql@step-500=0.5,sql@step-1000=0.5)"
    before = json.loads(lorakit(capsys, "load", "both", mix, "--dry-run", "--json").out)
    assert before == {"dry_run": True, "name": "both", "source": mix, "revision": None}
    ended = lorakit(capsys, "load", "both", mix)
    assert (ended.code, ended.err) == (0, "")
    named = server.do(server.served.client.get("/v1/mixes/both")).json()
    assert (named["revision"], named["mix"]) == (ended.out.strip(), mix)
    going = json.loads(lorakit(capsys, "unload", "both", "--dry-run", "--json").out)
    assert going["revisions"] == [named["revision"]]
    assert lorakit(capsys, "unload", "both", "--yes").code == 0
    assert server.do(server.served.client.get("/v1/mixes/both")).status_code == 404
    ended = lorakit(capsys, "unload", "both", "--yes")
    assert (ended.code, "no adapter 'both'" in ended.err) == (3, True)


def test_a_mix_that_can_not_be_made_is_refused_in_the_servers_words(capsys: Capture, server: Running) -> None:
    for mix, code, words in (("mix(sql=)", 4, "mix(ADAPTER=WEIGHT"), ("mix(nobody=1,sql=1)", 3, "nobody")):
        ended = lorakit(capsys, "load", "both", mix)
        assert (ended.code, ended.out) == (code, "")
        assert words in ended.err
