"""A server counts as running for as long as its process lives, and not a moment longer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from lorakit.store.serving import in_use, serving, serving_now
from lorakit.store.store import Store
from tests.store.test_store import add

SERVER = """
import sys
from pathlib import Path
from lorakit.store.serving import serving
with serving(Path(sys.argv[1]), "llama", "http://127.0.0.1:8000"):
    print("up", flush=True)
    input()
"""


def started(home: Path) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "up\n"
    return server


def test_none_runs_where_there_is_no_store(tmp_path: Path) -> None:
    assert serving_now(tmp_path / "nowhere") == []


def test_those_that_run_are_seen_by_all_with_what_they_said(tmp_path: Path) -> None:
    server = started(tmp_path)
    with serving(tmp_path, "mistral"):
        for _ in range(2):
            found = {one.base: one for one in serving_now(tmp_path)}
            assert found["llama"].pid == server.pid
            assert found["llama"].url == "http://127.0.0.1:8000"
            assert found["mistral"].pid == os.getpid()
            assert str(found["llama"]) == f"the server http://127.0.0.1:8000 (process {server.pid})"
    assert [one.base for one in serving_now(tmp_path)] == ["llama"]
    server.communicate("\n", timeout=30)
    assert serving_now(tmp_path) == []
    assert not list((tmp_path / "serving").iterdir())


def test_one_that_was_killed_runs_no_more_and_what_it_left_is_cleared(tmp_path: Path) -> None:
    server = started(tmp_path)
    server.send_signal(signal.SIGKILL)
    server.communicate(timeout=30)
    assert list((tmp_path / "serving").iterdir())
    assert serving_now(tmp_path) == []
    assert not list((tmp_path / "serving").iterdir())


def test_what_it_may_be_asked_for_by_an_alias_is_in_use_and_the_rest_is_not(tmp_path: Path) -> None:
    store = Store(tmp_path, "llama")
    made = [add(store, step=step, content=str(step)) for step in (100, 200, 300, 400)]
    store.move_alias("sql", "", made[1].id, "set")
    store.move_alias("sql", "prod", made[1].id, "set")
    other = Store(tmp_path, "mistral")
    add(other)
    assert in_use(tmp_path) == {}
    with serving(tmp_path, "llama"):
        found = in_use(tmp_path)
    assert set(found) == {("llama", made[number].id) for number in (0, 1, 3)}
    assert "serves it as 'sql'" in found["llama", made[1].id]
    assert "serves it as 'sql@latest'" in found["llama", made[3].id]
    assert "serves it as 'sql@best'" in found["llama", made[0].id]
    store.close()
    other.close()
