"""Signals that set a flag while a loop trains, and nothing else at any other time."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from lorakit.training.signals import SignalFlag


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[int]]:
    """What got the signal before; put back afterwards, whatever the test did."""
    seen: list[int] = []
    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.signal(number, lambda number, frame: seen.append(number)) for number in numbers]
    yield seen
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


class Callback:
    def __init__(self, flag: SignalFlag) -> None:
        self.flag = flag

    def on_train_begin(self) -> None:
        assert self.flag.install()


def train(flag: SignalFlag, *numbers: int) -> None:
    """As a trainer: calls the callback, and is what runs when the signals come."""
    Callback(flag).on_train_begin()
    for number in numbers:
        os.kill(os.getpid(), number)


def test_it_keeps_the_first_and_calls_the_earlier_handler(handlers: list[int]) -> None:
    flag = SignalFlag([signal.SIGUSR1, signal.SIGUSR2])
    train(flag, signal.SIGUSR2, signal.SIGUSR1)
    assert (flag.received, handlers) == (signal.SIGUSR2, [signal.SIGUSR2, signal.SIGUSR1])
    flag.restore()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert handlers[2:] == [signal.SIGUSR1]


def test_once_the_next_of_them_is_the_systems(handlers: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    flag = SignalFlag([signal.SIGUSR1, signal.SIGUSR2], once=True, said="saving\n")
    train(flag, signal.SIGUSR1)
    assert (flag.received, handlers) == (signal.SIGUSR1, [])
    assert {signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)} == {signal.SIG_DFL}
    assert capfd.readouterr().err == "saving\n"
    flag.restore()
    os.kill(os.getpid(), signal.SIGUSR2)
    assert handlers == [signal.SIGUSR2]


def test_a_child_that_ends_with_it_is_no_failure(handlers: list[int]) -> None:
    """torch raises an error from its own handler when a process that loads data is killed."""

    def fail(*_: Any) -> None:
        raise RuntimeError("killed by signal")

    before = signal.signal(signal.SIGCHLD, fail)
    try:
        flag = SignalFlag([signal.SIGUSR1], once=True)
        train(flag, signal.SIGUSR1, signal.SIGCHLD)
        flag.restore()
        with pytest.raises(RuntimeError):
            os.kill(os.getpid(), signal.SIGCHLD)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_when_the_loop_is_gone_the_signal_goes_where_it_went_before(handlers: list[int]) -> None:
    """It ended with an error, which no callback hears of."""
    flag = SignalFlag([signal.SIGUSR1], once=True, said="saving\n")
    train(flag)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert (flag.received, handlers) == (None, [signal.SIGUSR1])


def test_what_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    flag = SignalFlag([signal.SIGUSR1, signal.SIGUSR2], once=True)
    train(flag, signal.SIGUSR1)
    assert flag.received is None
    train(flag, signal.SIGUSR2)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    flag.restore()


def test_a_handler_that_somebody_set_since_stays(handlers: list[int]) -> None:
    later: list[int] = []
    flag = SignalFlag([signal.SIGUSR1])
    train(flag)
    signal.signal(signal.SIGUSR1, lambda number, frame: later.append(number))
    flag.restore()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert (later, handlers) == ([signal.SIGUSR1], [])


def test_a_process_that_was_forked_while_it_trains_is_not_meant(handlers: list[int]) -> None:
    flag = SignalFlag([signal.SIGUSR1], once=True, said="saving\n")
    train(flag)
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGUSR1)
        os._exit(0 if flag.received is None and not handlers else 1)
    assert os.waitpid(child, 0)[1] == 0
    flag.restore()


def test_what_stops_a_forked_process_stops_it() -> None:
    """A multiprocessing.Pool ends its processes so, and waits for them."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    flag = SignalFlag([signal.SIGTERM], once=True)
    train(flag)
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    assert flag.received is None
    flag.restore()
    assert signal.signal(signal.SIGTERM, before) == signal.SIG_DFL


@pytest.mark.parametrize("first_to_go", [0, 1])
def test_two_flags_of_one_signal_leave_nothing_behind(handlers: list[int], first_to_go: int) -> None:
    flags = [SignalFlag([signal.SIGUSR1]), SignalFlag([signal.SIGUSR1])]
    for _ in range(2):  # the second time over what the first has left
        train(flags[0])
        train(flags[1])
    train(flags[0], signal.SIGUSR1)
    assert [flag.received for flag in flags] == [signal.SIGUSR1] * 2
    for flag in (flags[first_to_go], flags[1 - first_to_go]):
        flag.restore()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert handlers == [signal.SIGUSR1] * 2, "once when both heard it, once when both are gone"


def test_in_another_thread_there_are_no_signals() -> None:
    flag, installed = SignalFlag([signal.SIGUSR1]), []
    thread = threading.Thread(target=lambda: installed.append(flag.install()))
    thread.start()
    thread.join()
    assert installed == [False]


def test_a_second_training_installs_it_anew(handlers: list[int]) -> None:
    flag = SignalFlag([signal.SIGUSR1])
    for _ in range(2):
        train(flag, signal.SIGUSR1)
        assert flag.received == signal.SIGUSR1
    assert handlers == [signal.SIGUSR1] * 2
    flag.restore()
