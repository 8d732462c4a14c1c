"""Short turns of the interpreter, for as long as file work runs beside the event loop."""

import asyncio
import sys
import threading

import pytest

from lorakit.server.file_work import SHORT_TURN, file_work

USUAL = 0.005


@pytest.fixture(autouse=True)
def _usual_turns():
    before = sys.getswitchinterval()
    sys.setswitchinterval(USUAL)
    yield
    sys.setswitchinterval(before)


def test_turns_are_short_while_it_runs_and_as_before_afterwards():
    assert asyncio.run(file_work(sys.getswitchinterval)) == pytest.approx(SHORT_TURN)
    assert sys.getswitchinterval() == pytest.approx(USUAL)


def test_turns_stay_short_until_the_last_of_several_has_ended():
    async def run() -> list[float]:
        first, second = _Work(), _Work()
        works = [asyncio.create_task(file_work(work)) for work in (first, second)]
        found = []
        for work in (first, second):
            assert await asyncio.to_thread(work.begun.wait, 60)
        for work, task in zip((first, second), works, strict=True):
            work.may_end.set()
            await task
            found.append(sys.getswitchinterval())
        return found

    assert asyncio.run(run()) == pytest.approx([SHORT_TURN, USUAL])


class _Work:
    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        self.may_end.wait(60)


def test_an_error_is_raised_and_leaves_no_short_turns_behind():
    with pytest.raises(ZeroDivisionError):
        asyncio.run(file_work(divmod, 1, 0))
    assert sys.getswitchinterval() == pytest.approx(USUAL)


def test_turns_that_were_shorter_before_stay_as_they_are():
    sys.setswitchinterval(0.0001)
    before = sys.getswitchinterval()
    assert asyncio.run(file_work(sys.getswitchinterval)) == before


def test_turns_do_not_shrink_by_rounding():
    sys.setswitchinterval(0.0007)
    before = sys.getswitchinterval()
    for _ in range(20):
        asyncio.run(file_work(len, ()))
    assert sys.getswitchinterval() == before
