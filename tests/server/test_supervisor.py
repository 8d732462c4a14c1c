"""The process that holds the address, over an engine program that is no vLLM (tests/server/programs.py)."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from lorakit.errors import Conflict, UsageError
from lorakit.server.supervision.supervisor import RUNTIME_PREFIX, listen
from tests.certificates import make_certificate

ROOT = Path(__file__).parents[2]


class Program:
    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        assert process.stdout is not None
        self.process, self.folder = process, folder
        self.address = f"http://127.0.0.1:{int(process.stdout.readline())}"
        self.verify: ssl.SSLContext | bool = True

    def get(self, path: str = "/", timeout: float = 5) -> httpx.Response:
        return httpx.get(self.address + path, timeout=timeout, verify=self.verify)

    def answered_by(self) -> int | None:
        """The engine's process, when one answers; one that dies meanwhile does not."""
        try:
            answer = self.get()
        except (httpx.RemoteProtocolError, httpx.ReadError):
            return None
        if answer.status_code == 503:
            return None
        return int(answer.text.removeprefix("engine "))

    def until(self, condition: Callable[[], object], seconds: float = 20) -> object:
        ends = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < ends, "it took too long"
            time.sleep(0.02)
        return found

    def until_up(self, but: int = 0) -> int:
        found = self.until(lambda: (pid := self.answered_by()) and pid != but and pid)
        assert isinstance(found, int)
        return found

    @property
    def engines(self) -> list[int]:
        return [int(pid) for pid in (self.folder / "pids").read_text().split()]

    def end(self, number: int, timeout: float = 15) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()


@contextmanager
def supervising(folder: Path, *flags: str, verb: str = "supervise") -> Iterator[Program]:
    with (folder / ("log" if verb == "supervise" else "log2")).open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.programs", verb, str(folder / "pids"), *flags],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, "TMPDIR": str(folder)},
        )  # fmt: skip
        try:
            yield Program(process, folder)
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def is_there(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def gone(*pids: int) -> Callable[[], bool]:
    return lambda: not any(is_there(pid) for pid in pids)


def test_while_the_engine_starts_every_request_is_503_at_once_with_the_reason(tmp_path: Path) -> None:
    with supervising(tmp_path, "late") as program:
        program.until(lambda: "loading weights" in program.log)
        started = time.monotonic()
        answer = program.until(lambda: (found := program.get()) and "loading weights" in found.text and found)
        assert isinstance(answer, httpx.Response)
        assert time.monotonic() - started < 1
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["code"] == 503
        assert "loading weights" in answer.json()["error"]["message"]
        for path in ("/health", "/ready", "/v1/models", "/nowhere"):
            assert program.get(path).status_code in (200, 503)
        program.until_up()
        assert program.end(signal.SIGTERM) == 0


def test_with_a_certificate_all_that_is_answered_is_https(tmp_path: Path) -> None:
    made = make_certificate(tmp_path, "127.0.0.1")
    with supervising(tmp_path, "late", "tls") as program:
        plain = program.address
        program.address, program.verify = plain.replace("http:", "https:"), made.trusted()
        answer = program.until(lambda: (found := program.get()).status_code == 503 and found)
        assert isinstance(answer, httpx.Response)
        assert "the engine is starting" in answer.text
        program.until_up()
        with pytest.raises(httpx.TransportError):
            httpx.get(plain)
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(program.address)
        assert program.end(signal.SIGTERM) == 0


def test_the_address_never_closes_over_the_death_of_the_engine(tmp_path: Path) -> None:
    with supervising(tmp_path, "orphan") as program:
        first = program.until_up()
        orphan = int((tmp_path / "pids.orphan").read_text())
        seen: list[int | str] = []
        ends = threading.Event()

        def keep_asking() -> None:
            while not ends.is_set():
                try:
                    seen.append(program.get(timeout=10).status_code)
                except httpx.ConnectError as error:
                    seen.append(str(error))
                except httpx.TransportError:  # it was being answered as the engine died
                    seen.append("cut off")

        asking = threading.Thread(target=keep_asking)
        asking.start()
        os.kill(first, signal.SIGKILL)
        second = program.until_up(but=first)
        ends.set()
        asking.join()
        assert set(seen) <= {200, 503, "cut off"}
        assert seen.count("cut off") <= 1
        assert 503 in seen
        assert second != first
        program.until(gone(orphan))
        assert program.end(signal.SIGTERM) == 0
        assert gone(second, int((tmp_path / "pids.orphan").read_text()))()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_all_that_was_started_and_says_so_by_its_code(tmp_path: Path, number: int, code: int) -> None:
    with supervising(tmp_path, "orphan") as program:
        engine = program.until_up()
        orphan = int((tmp_path / "pids.orphan").read_text())
        assert program.end(number) == code
        assert gone(engine, orphan)()
        with pytest.raises(httpx.ConnectError):
            program.get()
        assert not list(tmp_path.glob(f"{RUNTIME_PREFIX}*"))


def test_a_signal_while_the_engine_starts_ends_it_too(tmp_path: Path) -> None:
    with supervising(tmp_path, "mute") as program:
        program.until(lambda: "loading weights" in program.log)
        assert program.end(signal.SIGINT) == 130
        assert gone(*program.engines)()


def test_what_is_in_flight_is_finished_and_what_comes_after_the_signal_is_503(tmp_path: Path) -> None:
    with supervising(tmp_path) as program:
        program.until_up()
        answers: list[int] = []
        slow = threading.Thread(target=lambda: answers.append(program.get("/slow").status_code))
        slow.start()
        time.sleep(0.2)
        program.process.send_signal(signal.SIGTERM)
        program.until(lambda: "stopping" in program.log)
        time.sleep(0.2)
        late = program.get(timeout=0.7)
        assert late.status_code == 503
        assert "stopping" in late.text
        slow.join()
        assert answers == [200]
        assert program.process.wait(15) == 0


def test_a_second_ctrl_c_waits_for_nothing(tmp_path: Path) -> None:
    with supervising(tmp_path, "stubborn") as program:
        engine = program.until_up()
        program.process.send_signal(signal.SIGINT)
        program.until(lambda: "stopping" in program.log)
        time.sleep(0.3)
        started = time.monotonic()
        assert program.end(signal.SIGINT) == 130
        assert time.monotonic() - started < 3
        assert gone(engine)()


def test_an_engine_that_never_starts_ends_it_with_the_engines_last_words(tmp_path: Path) -> None:
    with supervising(tmp_path, "fail") as program:
        assert program.process.wait(15) == 1
        assert "EngineFailed: vLLM did not start" in program.log
        assert "out of luck: the reason" in program.log.partition("EngineFailed")[2]
        assert len(program.engines) == 1


def test_an_engine_that_was_up_once_is_started_again_however_often_it_fails(tmp_path: Path) -> None:
    with supervising(tmp_path, "flaky") as program:
        first = program.until_up()
        os.kill(first, signal.SIGKILL)
        program.until_up(but=first)
        assert len(program.engines) == 3
        assert program.end(signal.SIGTERM) == 0


def test_an_engine_that_hangs_is_answered_for_and_started_again(tmp_path: Path) -> None:
    with supervising(tmp_path, "quick") as program:
        first = program.until_up()
        with pytest.raises(httpx.ReadTimeout):
            program.get("/hang", timeout=0.3)
        program.until(lambda: silent(program))
        second = program.until_up(but=first)
        assert gone(first)()
        assert second != first


def silent(program: Program) -> bool:
    try:
        return program.get(timeout=0.5).status_code == 503
    except httpx.TimeoutException:  # it waits in the backlog: nobody knows yet that the engine hangs
        return False


def test_an_engine_that_calls_itself_dead_is_started_again_at_once_and_its_last_words_are_handed_down(
    tmp_path: Path,
) -> None:
    with supervising(tmp_path, "ill") as program:
        first = program.until_up()
        program.until_up(but=first)
        said = program.until(lambda: program.until_up() and "how" in (text := program.get("/told").text) and text)
        assert "the engine before this one ended: its own health check says that it is dead" in str(said)
        assert "loading weights now" in str(said)
        assert "it is started again in 0.2 s" in program.log


def test_an_engine_that_is_there_but_answers_no_canary_is_answered_for_and_started_again(tmp_path: Path) -> None:
    with supervising(tmp_path, "numb", "quick") as program:
        first = program.until_up()
        program.until(lambda: program.get("/").status_code == 503)
        assert "does not answer" in program.get().text
        assert program.until_up(but=first) != first
        assert gone(first)()
        assert "it has not answered for" in program.log


@pytest.mark.slow
def test_an_engine_whose_canary_is_late_is_left_alone_while_it_works_for_others(tmp_path: Path) -> None:
    with supervising(tmp_path, "busy", "quick") as program:
        engine = program.until_up()
        time.sleep(3)
        assert program.answered_by() == engine


@pytest.mark.slow
def test_an_engine_that_answers_the_canary_wrong_again_and_again_is_started_again(tmp_path: Path) -> None:
    with supervising(tmp_path, "mad") as program:
        first = program.until_up()
        program.until_up(but=first)
        assert "the engine is ended: its first token has the logprob [nan]" in program.log


def test_an_engine_that_starts_and_says_nothing_for_too_long_is_given_up(tmp_path: Path) -> None:
    with supervising(tmp_path, "mute", "quick") as program:
        assert program.process.wait(15) == 1
        assert "vLLM did not start: it has logged nothing for" in program.log
        assert gone(*program.engines)()


@pytest.mark.parametrize("numb", [False, True])
def test_kill_9_of_the_supervisor_ends_the_engine_and_what_it_started(tmp_path: Path, numb: bool) -> None:
    """Its child hears no SIGTERM, and holds all handles that its parent had at its start; nor need its parent hear."""
    with supervising(tmp_path, "orphan") as program:
        engine = program.until_up()
        orphan = int((tmp_path / "pids.orphan").read_text())
        if numb:
            os.kill(engine, signal.SIGSTOP)
        program.process.kill()
        program.process.wait()
        program.until(gone(engine, orphan))
        with pytest.raises(httpx.ConnectError):
            program.get()


def test_kill_9_of_the_supervisor_ends_an_engine_that_is_still_starting(tmp_path: Path) -> None:
    with supervising(tmp_path, "mute") as program:
        program.until(lambda: "loading weights" in program.log)
        program.process.kill()
        program.process.wait()
        program.until(gone(*program.engines))


def test_a_port_that_is_taken_says_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(Conflict, match=r"taken.*--port"):
            listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_an_address_that_is_not_here_says_so(host: str) -> None:
    with pytest.raises(UsageError):
        listen(host, 0)
