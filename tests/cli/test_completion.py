"""What is offered behind TAB, by the shells themselves where they are installed."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from lorakit.cli import completing
from lorakit.cli.main import VERBS, cli
from lorakit.store.catalog import Facts
from lorakit.store.kept import Described, keep_checkpoint
from tests.checkpoints.written import write_checkpoint
from tests.cli.commands import lorakit
from tests.loopback import running
from tests.server.running import Running

Capture = pytest.CaptureFixture[str]
BREAKS = " \t\n\"'@><=;|&(:"  # bash's own


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may be slow."""
    monkeypatch.setattr(completing, "SERVER", 60.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with two checkpoints of a run `sql` and one of `chat` in a store, whose names these are."""
    folder, names = tmp_path_factory.mktemp("made"), list[str]()
    (folder / "sp ace").mkdir()
    for run, step in (("sql", 500), ("sql", 1000), ("chat", 5)):
        source = write_checkpoint(folder / "runs" / run / f"checkpoint-{step}", seed=step)
        described = Described("adapter", "transformers", step, Facts(step=step))
        names.append(keep_checkpoint(folder / "home", source, described, run=run, unchanged=lambda: True).id)
    return folder, names


@pytest.fixture
def stored(made: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The same here, and no server."""
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAKIT_URL", "http://127.0.0.1:9")
    return made[1]


def offered(line: str) -> list[str]:
    *words, incomplete = line.split(" ")
    return [item.value for item in completing.offered(cli, words, incomplete) if item.type == "plain"]


def offers_files(line: str) -> bool:
    *words, incomplete = line.split(" ")
    return any(item.type in ("file", "dir") for item in completing.offered(cli, words, incomplete))


def test_verbs_flags_and_choices_are_offered(stored: list[str]) -> None:
    assert offered("") == list(VERBS)
    assert offered("mer") == ["merge"]
    assert offered("store v") == ["verify"]
    assert offered("prune runs/sql --keep-") == ["--keep-last", "--keep-best", "--keep-every", "--keep-for"]
    assert offered("serve --follow ") == ["latest", "best", "manual"]
    assert offered("merge x --device ") == ["auto", "cpu", "cuda"]
    assert offered("mix a --rank e") == ["exact"]
    assert offered("mix a --method core") == ["core_ties", "core_tsv"]


@pytest.mark.parametrize(
    "verb",
    ["merge", "mix", "shrink", "check", "convert", "export", "show", "diff x", "rm", "ls", "latest", "best",
     "store path", "verify out --adapter", "capture -C", "push", "compare x"],
)  # fmt: skip
def test_what_the_store_has_is_offered_where_a_checkpoint_is_asked_for(stored: list[str], verb: str) -> None:
    first, second, chat = stored
    assert offered(f"{verb} ") == ["chat", "sql"]
    assert offered(f"{verb} s") == ["sql", "sql@latest", "sql@best", second, first], "one run is left"
    assert offered(f"{verb} sql@step-5") == [first]
    assert offered(f"{verb} chat@") == ["chat@latest", "chat@best", chat]
    assert offers_files(f"{verb} ru")


def test_what_lies_in_the_trash_is_offered_to_undelete_alone(stored: list[str], capsys: Capture) -> None:
    lorakit(capsys, "rm", stored[0], "--yes")
    assert offered("undelete s") == ["sql", stored[0]]
    assert stored[0] not in offered("show s")


@pytest.mark.parametrize(
    ("verb", "files"),
    [
        ("load x", True),
        ("serve", True),
        ("export x", True),
        ("merge x --base", True),
        ("fetch x --sha256", False),
        ("mix x --density", False),
    ],
)
def test_paths_are_offered_where_one_can_stand(stored: list[str], verb: str, files: bool) -> None:
    assert offers_files(f"{verb} ru") == files


def test_keys_are_offered_by_what_they_are_revoked_by(stored: list[str], capsys: Capture) -> None:
    made = json.loads(lorakit(capsys, "key", "create", "--admin", "--json").out)
    assert offered("key revoke ") == [made["id"]]
    lorakit(capsys, "key", "revoke", made["id"])
    assert offered("key revoke ") == []


def test_without_a_server_its_verbs_offer_what_the_store_has(stored: list[str]) -> None:
    assert offered("rollback ") == ["chat", "sql"]
    assert offered("alias sql@prod step-1") == [stored[1].partition("@")[2]]


def test_names_and_revisions_of_the_running_server_are_offered(server: Running) -> None:
    server.do(server.served.client.put("/v1/adapters/sql/aliases/prod-1", json={"revision": "step-500"}))
    assert offered("unload ") == offered("rollback ") == ["sql"]
    assert offered("alias s") == ["sql", "sql@latest", "sql@best", "sql@prod-1"]
    revisions = [revision.name for revision in server.served.reconciler.runs["sql"].revisions.values()]
    assert sorted(offered("alias sql@prod-1 step-")) == sorted(name.partition("@")[2] for name in revisions)
    assert offered(f"alias sql@prod-1 --url {server.url} la") == ["latest"]
    assert offered("alias --url http://127.0.0.1:9 s") == []
    assert offered("alias sql step-500 --shadow la") == ["latest"]
    assert offered("ps --compare s") == ["sql"]


def test_what_a_server_calls_its_models_is_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    class Evil(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            names = ["fine", "x; touch gone", "$(touch gone)", "a\nfile,0,b", "-y", "`x`", "\x1b[2J"]
            body = json.dumps({"data": [{"id": name, "parent": "base"} for name in names]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing: stderr is looked at."""

    evil = HTTPServer(("127.0.0.1", 0), Evil)
    monkeypatch.setenv("LORAKIT_URL", f"http://127.0.0.1:{evil.server_port}")
    with running(evil):
        assert offered("unload ") == ["fine"]


# in the shells


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`lorakit` where a shell finds it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    patient = "import lorakit.cli.completing as c; c.LIMIT = 60; from lorakit.cli import script; script()"
    (folder / "lorakit").write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{patient}" "$@"\n')
    (folder / "lorakit").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return folder / "lorakit"


def in_bash(lines: Sequence[str], script: Path) -> list[list[str]]:
    """What bash would put in place of what is behind its last word break, of each line."""
    program = f"source {script}\nCOMP_WORDBREAKS=$'{BREAKS}'\n".replace("\"'", "\"\\'")
    for line in lines:
        program += (
            f"COMP_LINE={quoted(line)} COMP_POINT=${{#COMP_LINE}} COMPREPLY=()\nCOMP_LINE={quoted(line)}\n"
            "COMP_POINT=${#COMP_LINE}\n_lorakit_completion lorakit\n"
            "printf '%s\\n' \"${COMPREPLY[@]}\" --\n"
        )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    return [[word for word in part.split("\n") if word] for part in done.stdout.split("--\n")[:-1]]


def quoted(line: str) -> str:
    return "'" + line.replace("'", "'\\''") + "'"


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash here")
def test_bash_gets_what_is_missing_behind_its_own_word_breaks(
    capsys: Capture, tmp_path: Path, stored: list[str], program: Path
) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(lorakit(capsys, "completion", "bash").out)
    first, second = (name.removeprefix("sql") for name in stored[:2])
    expected = {
        "lorakit mer": ["merge"],
        "lorakit show sql@step-5": [first],
        "lorakit show sql@": ["@latest", "@best", second, first],
        "lorakit mix chat=0.5 sql@step-5": [first],
        "lorakit mix a --method peft:l": ["linear"],
        "lorakit mix a --method=core_ti": ["core_ties"],
        "lorakit show 'sql@step-5": [stored[0]],
        "lorakit show ru": ["runs"],
        "lorakit show sp": ["sp ace"],
        "lorakit show runs/s": ["runs/sql"],
        "lorakit merge x --out=ru": ["runs"],
        "lorakit serve --adapter sql=ru": ["runs"],
        "lorakit frobnicate --": [],
        "lorakit show 'unended \"": [],
    }
    assert dict(zip(expected, in_bash(list(expected), script), strict=True)) == expected


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash here")
def test_on_a_terminal_tab_writes_the_rest(
    capsys: Capture, tmp_path: Path, stored: list[str], program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(lorakit(capsys, "completion", "bash").out)
    monkeypatch.setenv("TERM", "dumb")
    ours, theirs = pty.openpty()
    shell = subprocess.Popen(
        ["bash", "--norc", "-i"], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    try:
        os.write(ours, f"PS1='$ '; source {script}; echo be''gun\n".encode())
        read_until(ours, "begun")
        os.write(ours, b"lorakit show sql@step-5\t")
        read_until(ours, f"{stored[0][-8:]} ")
        os.write(ours, b"\x01echo what was typed: \n")  # at the beginning of the line
        read_until(ours, f"\nwhat was typed: lorakit show {stored[0]}")
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)


def read_until(terminal: int, wanted: str) -> None:
    seen, until = "", time.monotonic() + 60
    while wanted not in seen:
        assert select.select([terminal], [], [], max(0, until - time.monotonic()))[0], seen
        seen += os.read(terminal, 65536).decode(errors="replace")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_their_own_scripts(capsys: Capture, shell: str) -> None:
    ended = lorakit(capsys, "completion", shell)
    assert (ended.code, f"_LORAKIT_COMPLETE={shell}_complete" in ended.out) == (0, True)


@pytest.mark.skipif(not shutil.which("fish"), reason="there is no fish here")
def test_fish_offers_names(capsys: Capture, tmp_path: Path, stored: list[str], program: Path) -> None:
    script = tmp_path / "completion.fish"
    script.write_text(lorakit(capsys, "completion", "fish").out)
    asked = f"source {script}; complete -C 'lorakit show sql@step-5'"
    done = subprocess.run(["fish", "-c", asked], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [stored[0]]


def test_the_shell_is_that_of_the_environment(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    assert lorakit(capsys, "completion").out == lorakit(capsys, "completion", "fish").out
    monkeypatch.setenv("SHELL", "/bin/ksh")
    ended = lorakit(capsys, "completion")
    assert (ended.code, "name one of bash, zsh, fish" in ended.err) == (2, True)


def asked(line: str, shell: str = "bash", **more: str) -> subprocess.CompletedProcess[str]:
    """As the shell's script asks."""
    environ = {**os.environ, completing.VARIABLE: f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": "2", **more}
    program = (
        "import os, sys, lorakit.cli, lorakit.cli.completing as c\nc.LIMIT, end = 60, os._exit\n"
        "def shown(code):\n    heavy = {'torch', 'numpy', 'transformers', 'peft', 'huggingface_hub', 'rich', 'yaml'}\n"
        "    print('imported', sorted(heavy & sys.modules.keys()), file=sys.__stderr__)\n    end(code)\n"
        "os._exit = shown\nlorakit.cli.main()"
    )
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False, env=environ
    )


@pytest.mark.parametrize("line", ["lorakit ", "lorakit show s", "lorakit alias s", "lorakit serve --follow "])
def test_nothing_heavy_is_imported(stored: list[str], line: str) -> None:
    done = asked(line)
    assert (done.returncode, done.stderr) == (0, "imported []\n")
    assert done.stdout.strip()


@pytest.mark.parametrize(
    ("line", "more"),
    [
        ("lorakit nope --x", {}),
        ("lorakit", {}),
        ("", {}),
        ("lorakit alias s", {"LORAKIT_URL": "no address"}),
        ("lorakit alias s", {"LORAKIT_API_KEY": "ké"}),
        ("lorakit serve --config nowhere --port x --", {}),
        ("lorakit show 'a \"", {}),
        ("lorakit show s", {"LORAKIT_HOME": "/dev/null"}),
        ("lorakit show s", {"COMP_CWORD": "x", "_LORAKIT_COMPLETE": "zsh_complete"}),
        ("lorakit show s", {"_LORAKIT_COMPLETE": "ksh_complete"}),
        ("lorakit show s", {"_LORAKIT_COMPLETE": "bash_source"}),
    ],
)
def test_nobody_who_presses_tab_sees_an_error(stored: list[str], line: str, more: dict[str, str]) -> None:
    done = asked(line, **more)
    assert (done.returncode, done.stderr) == (0, "imported []\n")


def test_a_damaged_store_offers_nothing_and_stays_as_it_is(stored: list[str], tmp_path: Path) -> None:
    database = tmp_path / "home" / "store.sqlite3"
    for left in tmp_path.glob("home/store.sqlite3-*"):
        left.unlink()
    database.write_bytes(b"no database at all" * 1000)
    before = sorted(path.name for path in (tmp_path / "home").iterdir())
    done = asked("lorakit show sq")
    assert (done.returncode, done.stderr) == (0, "imported []\n")
    assert "sql" not in done.stdout
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == before


def test_a_server_that_does_not_answer_is_not_waited_for(stored: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = asked("lorakit alias s", LORAKIT_URL=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert (done.returncode, done.stderr) == (0, "imported []\n")
    assert done.stdout.split() == ["plain,sql", "plain,sql@latest", "plain,sql@best"], "what the store has"
