"""Every trainer's own order of writing, as it was recorded (tests/trainers/orders.json), over files that it wrote:
never finished too early, always finished in the end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lorakit.checkpoints.finished import look_at
from lorakit.files.digests import file_digest
from tests.trainers import expected
from tests.trainers.by_hand import HERE as BY_HAND
from tests.trainers.by_hand import kept
from tests.trainers.expected import EVERYDAY, Run
from tests.trainers.record import ORDERS, Event
from tests.trainers.written import PROGRAMS, Trainers
from tests.trainers.written import run as run_program

pytestmark = pytest.mark.timeout(900)  # the first test waits for all the trainers
RECORDED = {
    (program, run): [tuple(event) for event in order]
    for program, runs in json.loads(ORDERS.read_text()).items()
    for run, order in runs.items()
}
# Nothing in a checkpoint tells how many ranks there are, so other ranks' random states may come after the last file.
OTHERS_RANDOM = re.compile(r"(rng_state|random_states)_[1-9]\d*\.(pth|pkl)")
CUTS = (0.0, 0.5, 1.0)  # of each write, and one byte less than all of it


@dataclass
class Replay:
    """Writes a run into `folder` as its trainer did: event by event, each file's bytes those that it has in `done`."""

    order: list[Event]
    done: Path
    folder: Path
    clock: int = 10**18
    growing: dict[str, tuple[int, int]] = field(default_factory=dict)  # of an open file: writes done, and of how many

    def final(self, name: str, number: int) -> bytes:
        """What the file that is `name` at this event has in the end, under the name that it gets."""
        for event in self.order[number + 1 :]:
            if event[0] == "rename" and event[1] == name:
                name = event[2]
        (found,) = self.done.glob(name)
        return found.read_bytes()

    def real(self, name: str) -> Path:
        """Where a recorded name is; a measured value in it is the one of this session."""
        named = next(iter(self.done.glob(name)), None) if "*" in name else None
        return self.folder / (named.relative_to(self.done) if named else name)

    def steps(self) -> Iterator[None]:
        """Yields at each moment at which somebody may look."""
        for number, event in enumerate(self.order):
            what, name = event[:2]
            file = self.real(name)
            if what == "folder":
                file.mkdir(exist_ok=True)
            elif what == "open":
                self.put(file, b"")
                self.growing[name] = (0, self.writes_to(name, number))
            elif what == "size":
                self.put(file, bytes(len(self.final(name, number))))
            elif what == "write":
                yield from self.grow(name, number)
            elif what == "appear":
                file.unlink(missing_ok=True)
                self.put(file, self.final(name, number))
            elif what == "rename":
                os.replace(file, self.real(event[2]))
            elif what == "link":
                file.symlink_to(event[2])
            elif what == "remove":
                file.unlink()
            yield

    def writes_to(self, name: str, opened: int) -> int:
        following = self.order[opened + 1 :]
        end = next((number for number, event in enumerate(following) if event == ("open", name)), len(following))
        return following[:end].count(("write", name))

    def grow(self, name: str, number: int) -> Iterator[None]:
        count, of = self.growing[name]
        final, file = self.final(name, number), self.real(name)
        sized = file.stat().st_size == len(final)
        start, end = len(final) * count // of, len(final) * (count + 1) // of
        for there in sorted({*(start + int((end - start) * part) for part in CUTS), max(start, end - 1)}):
            self.put(file, final[:there] + (bytes(len(final) - there) if sized else b""))
            yield
        self.growing[name] = (count + 1, of)

    def put(self, file: Path, content: bytes) -> None:
        """In place, as the trainer does, and at a time of its own."""
        self.clock += 1000
        with file.open("r+b" if file.exists() else "wb") as stream:
            stream.truncate()
            stream.write(content)
        os.utime(file, ns=(self.clock, self.clock))


def what_differs(path: Path, done: Path) -> list[str]:
    """The files of a checkpoint that are not yet as they are in the end."""
    files = [file for file in [done, *done.rglob("*")] if file.is_file() and not OTHERS_RANDOM.fullmatch(file.name)]
    return [file.name for file in files if content(path / file.relative_to(done)) != content(file)]


def content(file: Path) -> bytes | None:
    """The newline at the end of a JSON file says nothing."""
    if not file.is_file():
        return None
    return file.read_bytes().rstrip() if file.suffix == ".json" else file.read_bytes()


def cases() -> list[object]:
    """Each recorded run with the run of today that it is replayed over: Lightning's orders are two of one run."""
    named = {(run.program, run.name): run for run in EVERYDAY + expected.SLOW}
    found = []
    for program, name in RECORDED:
        run = named[program.partition(" ")[0], name]
        marks = [pytest.mark.slow] if run in expected.SLOW else []
        found.append(pytest.param(program, run, marks=marks, id=f"{program}:{name}"))
    return found


@pytest.mark.parametrize(("program", "run"), cases())
def test_no_moment_of_a_trainers_own_order_is_finished_too_early_and_the_last_is_finished(
    trainers: Trainers, program: str, run: Run, tmp_path: Path
) -> None:
    written = trainers.wrote(run.program)
    done, folder = written.folder / run.name, tmp_path / Path(run.name).name
    names = [written.checkpoint(run, step).relative_to(done) for step in sorted(run.places)[-2:]]
    seen = states_seen(Replay(RECORDED[program, run.name], done, folder), names)
    assert [look_at(folder / name).state for name in names] == ["finished"] * len(names)
    if run.writer != "lightning":  # its files may appear whole
        assert all("incomplete" in states for states in seen)


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        # The last epoch of torchtune writes no recipe_state, so only quiet time can tell.
        ("torchtune", {"epoch_0": "finished", "epoch_1": "whole"}),
        ("litgpt", {"step-000002": "finished", "step-000004": "finished", "final": "finished"}),
        # axolotl writes adapter_config.json into its own folder before it trains, and the weights when it is done.
        ("axolotl", {"checkpoint-2": "finished", "checkpoint-4": "finished", ".": "whole"}),
        ("llamafactory", {"checkpoint-2": "finished", "checkpoint-4": "finished", ".": "finished"}),
    ],
)
def test_trainers_that_ran_elsewhere_are_not_finished_too_early_either(
    name: str, ends: dict[str, str], tmp_path: Path
) -> None:
    done, folder = kept(name, tmp_path / "done"), tmp_path / name
    order = [tuple(event) for event in json.loads((BY_HAND / f"{name}.json").read_text())]
    seen = states_seen(Replay(order, done, folder), [Path(end) for end in ends])
    assert {end: look_at(folder / end).state for end in ends} == ends
    assert all("incomplete" in states for states in seen)


def states_seen(replay: Replay, names: list[Path]) -> list[set[str]]:
    """Of each checkpoint, what was said of it while it was written; fails where that was finished too early."""
    seen: list[set[str]] = [set() for _ in names]
    for _ in replay.steps():
        for name, states in zip(names, seen, strict=True):
            if not (replay.folder / name).exists():
                continue
            found = look_at(replay.folder / name)
            states.add(found.state)
            early = what_differs(replay.folder / name, replay.done / name) if found.state == "finished" else []
            assert not early, f"{name} was called finished ({found.reason}) before {', '.join(early)}"
            assert found.state != "refused", found.reason
    return seen


@pytest.mark.parametrize("run", EVERYDAY, ids=str)
def test_the_recorded_orders_are_of_the_files_that_trainers_write_today(trainers: Trainers, run: Run) -> None:
    """Else record them again: python -m tests.trainers.record."""
    written = trainers.wrote(run.program)
    done = written.folder / run.name
    order = RECORDED[run.program, run.name]
    ends = {event[-1] if event[0] == "rename" else event[1] for event in order if event[0] not in ("folder", "remove")}
    for step in sorted(run.places)[-2:]:
        path = written.checkpoint(run, step)
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        missing = [file for file in files if not any(file.relative_to(done).match(end) for end in ends)]
        assert not missing


class Beside:
    """Looks at every checkpoint of a run all the time, and remembers the bytes of each that was called finished."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.looks = 0
        self.digests: dict[Path, dict[str, str]] = {}
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.look)

    def __enter__(self) -> Beside:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()

    def look(self) -> None:
        while not self.stopped.is_set():
            for path in self.folder.glob("*/checkpoint-*"):
                self.looks += 1
                if path not in self.digests and look_at(path).state == "finished":
                    with suppress(FileNotFoundError):  # save_total_limit takes the oldest away
                        self.digests[path] = digests(path)


def digests(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file() and not OTHERS_RANDOM.fullmatch(file.name)]
    return {str(file.relative_to(folder)): file_digest(file) for file in files}


def test_beside_a_training_trainer_finished_is_said_of_final_bytes_alone(trainers: Trainers, tmp_path: Path) -> None:
    """With strace each write takes a while, so there are moments to see."""
    slowly: list[str] = []
    if shutil.which("strace"):
        calls = "write,writev,rename,renameat,ftruncate"
        slowly = ["strace", "--seccomp-bpf", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}", "-e",
                  f"inject={calls}:delay_exit=1000:when=1..2000"]  # fmt: skip
    out = tmp_path / "out"
    with Beside(out) as beside:
        written = run_program(PROGRAMS["hf_trainer"], trainers.base, out, slowly)
    saved = [(line["run"], line["step"]) for line in written.said if line["what"] == "save"]
    assert beside.looks > 10 * len(saved)
    there = set(out.glob("*/checkpoint-*"))
    assert len(there) == 3 + 5 + 2
    assert {path for path in beside.digests if path.exists()} == there
    assert {path: digests(path) for path in there} == {path: beside.digests[path] for path in there}
