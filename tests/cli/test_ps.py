"""`lorakit ps`: what a running server serves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.cli.ps import COMPARED, HEAD, changes, rows_of
from lorakit.server.client import Client
from tests.cli.commands import lorakit
from tests.server.fake_engine import put_checkpoint
from tests.server.running import Running

Capture = pytest.CaptureFixture[str]


def table(out: str) -> list[dict[str, str]]:
    """Columns of plain text, by their heads."""
    head, *rows = out.splitlines()
    starts = [head.index(name) for name in HEAD]
    ends = [*starts[1:], None]
    return [{name: row[start:end].strip() for name, start, end in zip(HEAD, starts, ends, strict=True)} for row in rows]


def compared(out: str) -> list[dict[str, str]]:
    """The same of --compare, in whose cells are no spaces."""
    head, *rows = out.replace("FIRST BYTE", "FIRST_BYTE").splitlines()
    return [dict(zip(head.split(), row.split(), strict=True)) for row in rows]


def test_each_revision_has_its_state_aliases_requests_and_place(
    capsys: Capture, server: Running, tmp_path: Path
) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 2000, rank=32)
    server.do(server.served.ask("sql"))
    server.do(server.served.ask("sql"))
    server.do(server.served.until(lambda: server.served.reconciler.waiting))
    ended = lorakit(capsys, "ps")
    assert ended.code == 0
    rows = table(ended.out)
    assert [(row["NAME"], row["REVISION"][:9].rstrip("-"), row["STATE"], row["ALIASES"]) for row in rows] == [
        ("sql", "step-500", "ready", "best"), ("sql", "step-1000", "ready", "sql, latest"),
        ("sql", "step-2000", "refused", "-"),
    ]  # fmt: skip
    assert [(row["EVAL LOSS"], row["REQUESTS"], row["WHERE"]) for row in rows] == [
        ("0.5", "0", "memory"), ("0.75", "2", "memory"), ("-", "0", "-"),
    ]  # fmt: skip
    assert "sql@step-2000 is refused" in ended.err
    assert "--max-lora-rank" in ended.err


def test_as_data_it_is_all_that_the_server_says(capsys: Capture, server: Running) -> None:
    assert json.loads(lorakit(capsys, "ps", "--json").out) == Client(server.url).served()


def test_revisions_that_are_only_kept_are_shown_when_asked_for(
    capsys: Capture, server: Running, tmp_path: Path
) -> None:
    for step in range(2000, 2006):
        put_checkpoint(tmp_path / "runs" / "sql", step)
    run = server.served.reconciler.runs["sql"]
    server.do(server.served.until(lambda: len(run.revisions) == 8))
    server.do(server.served.until(lambda: run.revisions[run.aliases[""]].facts.step == 2005))
    few, many = (table(lorakit(capsys, "ps", *more).out) for more in ([], ["--all"]))
    assert len(many) == 8
    assert len(few) < len(many)
    assert any(row["WHERE"] == "store" for row in many)


def test_a_request_that_is_being_answered_is_seen_in_its_slot(capsys: Capture, server: Running) -> None:
    import asyncio

    asked = asyncio.run_coroutine_threadsafe(server.served.ask("sql", hold="open"), server.loop)
    server.do(server.served.until(lambda: any(one.get("hold") for one in server.engine.asked)))
    (row,) = [row for row in table(lorakit(capsys, "ps").out) if row["IN FLIGHT"] == "1"]
    assert row["WHERE"] == "slot"
    server.loop.call_soon_threadsafe(server.engine.gate("open").set)
    assert asked.result(10).status_code == 200


def test_a_mix_is_shown_by_its_name_or_by_what_it_is_made_of(capsys: Capture, server: Running) -> None:
    mix = "mix(sql@step-500=0.5,sql@step-1000=0.5)"
    server.do(server.served.ask(mix))
    (row,) = [row for row in table(lorakit(capsys, "ps").out) if row["NAME"].startswith("mix(sql@step-500-")]
    assert (row["STATE"], row["REQUESTS"], row["WHERE"]) == ("ready", "1", "memory")
    server.do(server.served.client.post("/v1/mixes", json={"name": "assistant", "mix": mix}))
    assert "assistant" in [row["NAME"] for row in table(lorakit(capsys, "ps").out)]


def test_watching_shows_what_changes_and_only_then(server: Running, tmp_path: Path) -> None:
    looks = changes(Client(server.url), pause=0.01)
    first = rows_of(next(looks))
    assert len(first) == 2
    put_checkpoint(tmp_path / "runs" / "chat", 1)
    seen = next(rows for rows in map(rows_of, looks) if any(row[0] == "chat" and row[2] == "ready" for row in rows))
    assert len(seen) == 3


def test_watching_waits_for_a_server_that_goes_away(server: Running, capsys: Capture) -> None:
    looks = changes(Client(server.url), pause=0.01)
    next(looks)
    server.engine.dead = True
    server.loop.call_later(0.2, setattr, server.engine, "dead", False)
    server.loop.call_later(0.2, lambda: server.loop.create_task(server.served.ask("sql")))
    next(looks)
    assert capsys.readouterr().err.count("not served at the moment") == 1


def test_on_a_terminal_the_table_stays_until_it_is_interrupted(server: Running) -> None:
    import os
    import pty
    import signal

    ours, theirs = pty.openpty()
    program = [sys.executable, "-m", "lorakit", "ps", "--watch", "--url", server.url]
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "150", "LINES": "40"}
    process = subprocess.Popen(program, stdout=theirs, stderr=theirs, stdin=theirs, env=environ)
    os.close(theirs)
    seen = b""
    while b"step-1000" not in seen:
        seen += os.read(ours, 65536)
    assert b"NAME" in seen
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    os.close(ours)


def test_for_a_program_there_are_the_events(capsys: Capture) -> None:
    ended = lorakit(capsys, "ps", "--watch", "--json")
    assert ended.code == 2
    assert "/v1/events" in ended.out


# what several share


def test_shares_and_shadows_stand_beside_the_aliases(capsys: Capture, server: Running, tmp_path: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 2000)
    server.do(server.served.until(lambda: len(server.served.reconciler.runs["sql"].revisions) == 3))
    lorakit(capsys, "alias", "sql", "step-500:5%", "step-1000", "--shadow", "step-2000")
    lorakit(capsys, "alias", "sql@prod", "step-500:50%", "step-2000:50%")
    aliases = {row["REVISION"].rpartition("-")[0]: row["ALIASES"] for row in table(lorakit(capsys, "ps").out)}
    assert aliases == {
        "step-500": "sql 5%, prod 50%, best", "step-1000": "sql 95%", "step-2000": "sql shadow, prod 50%, latest",
    }  # fmt: skip


def test_what_shares_a_name_is_compared_side_by_side(capsys: Capture, server: Running) -> None:
    ended = lorakit(capsys, "ps", "--compare")
    assert (ended.code, ended.out) == (0, "")
    assert "nothing has answered" in ended.err
    told: list[object] = []
    server.served.reconciler.shadow_observers.append(told.append)
    lorakit(capsys, "alias", "sql", "step-500", "--shadow", "step-1000")
    for _ in range(3):
        server.do(server.served.ask("sql"))
    server.do(server.served.until(lambda: len(told) == 3))
    for arguments in ([], ["sql"]):
        rows = compared(lorakit(capsys, "ps", "--compare", *arguments).out)
        assert [tuple(row) for row in rows] == [tuple(name.replace(" ", "_") for name in COMPARED)] * 2
        assert [(row["ALIAS"], row["SHARE"], row["REQUESTS"], row["ERRORS"], row["TOKENS"]) for row in rows] == [
            ("sql", "100%", "3", "0", "5.0"), ("sql", "shadow", "3", "0", "5.0"),
        ]  # fmt: skip
        assert (rows[0]["EQUAL"], rows[1]["EQUAL"]) == ("-", "0%")
    known = Client(server.url).comparison("sql")
    assert json.loads(lorakit(capsys, "ps", "--compare", "sql", "--json").out) == known
    assert json.loads(lorakit(capsys, "ps", "--compare", "--json").out) == [known]
    assert lorakit(capsys, "ps", "--compare", "chat").code == 3
    assert lorakit(capsys, "ps", "--compare", "--watch").code == 2
