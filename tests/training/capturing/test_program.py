"""A program in this one's place: exit codes, signals that reach it once, and the terminal."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorakit.training.capturing.program import CannotStart, running

CHILD = """
import os, signal, sys, time
got = []
for number in (1, 2, 3, 10, 12, 15):
    signal.signal(number, lambda number, _: got.append(number))
print("ready", flush=True)
end = time.monotonic() + 60
while time.monotonic() < end and len(got) < int(sys.argv[1]):
    time.sleep(0.01)
time.sleep(0.3)
print(sorted(got), flush=True)
"""
# What `running` is for, as a program that a test can send signals to.
PARENT = """
import os, sys
from lorakit.training.capturing.program import running
with running(sys.argv[1:], os.environ) as program:
    print(program.pid, flush=True)
    while program.code is None:
        program.wait(0.2)
sys.exit(program.code)
"""


def parent(*command: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PARENT, *command], text=True, **options)  # type: ignore[call-overload,no-any-return]


def code_of(*command: str) -> int:
    with running(command, os.environ) as program:
        while program.code is None:
            program.wait(0.2)
    return program.code


@pytest.mark.parametrize(
    ("script", "code"), [("true", 0), ("exit 3", 3), ("kill -9 $$", 137), ("kill -TERM $$", 143), ("kill -INT $$", 130)]
)
def test_its_exit_code_is_the_programs_and_a_signals_is_a_shells(script: str, code: int) -> None:
    assert code_of("sh", "-c", script) == code


def test_what_is_not_there_or_no_program_is_said_with_a_shells_codes(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")
    for command, code in ((str(tmp_path / "none"), 127), ("no-such-program-anywhere", 127), (str(tmp_path), 126)):
        with (
            pytest.raises(CannotStart, match=r"there is no program|can't be executed") as error,
            running([command], {}),
        ):
            pass
        assert error.value.code == code
    with pytest.raises(CannotStart, match="permission denied"), running([str(tmp_path / "text")], {}):
        pass


def test_handlers_are_as_before_when_it_ended() -> None:
    before = [signal.getsignal(number) for number in range(1, 32) if number not in (9, 19)]
    code_of("true")
    assert [signal.getsignal(number) for number in range(1, 32) if number not in (9, 19)] == before


@pytest.mark.parametrize("number", [1, 2, 3, 10, 12, 15])
def test_a_signal_reaches_it_once(number: int) -> None:
    with parent(sys.executable, "-c", CHILD, "1", stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == f"[{number}]\n"
    assert process.returncode == 0


def test_a_signal_to_the_process_and_to_its_group_at_once_is_one() -> None:
    child = [sys.executable, "-c", CHILD, "1"]
    with parent(*child, stdout=subprocess.PIPE, process_group=0) as process:
        assert process.stdout
        process.stdout.readline()
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.stdout.readline() == "[15]\n"


def test_what_it_ignores_the_program_ignores_too_as_under_nohup() -> None:
    show = "import signal; print(signal.getsignal(1) == signal.SIG_IGN)"
    script = f"trap '' HUP; exec {sys.executable} -c '{PARENT}' {sys.executable} -c \"{show}\""
    shown = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[1] == "True"


def test_a_terminals_interrupt_reaches_it_once_and_it_may_read_from_the_terminal() -> None:
    asks = CHILD.replace('print("ready", flush=True)', 'print("said", input("?"), "ready", flush=True)')
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", PARENT, sys.executable, "-c", asks, "1"])
    try:
        _read_until(terminal, b"?")
        os.write(terminal, b"hello\n")
        _read_until(terminal, b"said hello ready")
        os.write(terminal, b"\x03")
        _read_until(terminal, b"[2]")
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        os.close(terminal)


def test_a_terminals_stop_stops_both_and_both_go_on() -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        count = "import time\nfor n in range(200): print('tick', n, flush=True); time.sleep(0.05)"
        os.execv(sys.executable, [sys.executable, "-c", PARENT, sys.executable, "-c", count])
    try:
        _read_until(terminal, b"tick 3")
        os.write(terminal, b"\x1a")
        _, status = os.waitpid(pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        _drain(terminal)
        assert _drain(terminal) == b""
        os.kill(pid, signal.SIGCONT)
        _read_until(terminal, b"tick")
        os.write(terminal, b"\x03")
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 130
    finally:
        os.close(terminal)


def test_a_killed_parent_leaves_the_program_alone(tmp_path: Path) -> None:
    script = f"sleep 0.5; echo done > {tmp_path}/done"
    with parent("sh", "-c", script, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        process.kill()
    end = time.monotonic() + 30
    while not (tmp_path / "done").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert (tmp_path / "done").exists()


def _read_until(terminal: int, wanted: bytes) -> None:
    shown = b""
    while wanted not in shown:
        try:
            block = os.read(terminal, 4096)
        except OSError as error:
            raise AssertionError(f"it never said {wanted!r}: {shown!r}") from error
        shown += block


def _drain(terminal: int) -> bytes:
    """What is printed within a moment."""
    import select

    shown = b""
    while select.select([terminal], [], [], 0.3)[0]:
        shown += os.read(terminal, 4096)
    return shown
