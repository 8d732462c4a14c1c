"""What the programs wrote and said: each runs once, two beside one another, for all of the suite's processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.trainers.by_hand import kept, said
from tests.trainers.expected import BY_HAND, Run

ROOT = Path(__file__).parents[2]
LIMIT = 500  # seconds: DeepSpeed compiles a part of itself when it first runs


@dataclass(frozen=True, slots=True)
class Program:
    """A module beside this one, and the folder under .venv with what it alone may import."""

    module: str
    ranks: int = 1
    site: str | None = None
    compiles: bool = False


PROGRAMS = {
    "two_ranks": Program("two_ranks", ranks=2),
    "hf_trainer": Program("hf_trainer"),
    "trl_sft": Program("trl_sft", site="trainers"),
    "lightning_fit": Program("lightning_fit", site="trainers"),
    "deepspeed_zero": Program("deepspeed_zero", ranks=2, site="deepspeed", compiles=True),
}
SLOW = {
    "fsdp_trainer": Program("fsdp_trainer", ranks=2),
    "deepspeed_trainer": Program("deepspeed_trainer", ranks=2, site="deepspeed", compiles=True),
}


@dataclass(frozen=True)
class Written:
    """The folder that a program wrote into, and its lines: `run`, `what` (log, save), and what it measured."""

    folder: Path
    said: list[dict[str, Any]]

    def checkpoint(self, run: Run, step: int) -> Path:
        (found,) = (self.folder / run.name).glob(run.places[step])
        return found

    def of(self, run: str, what: str) -> list[dict[str, Any]]:
        return [line for line in self.said if (line["run"], line["what"]) == (run, what)]


@dataclass
class Trainers:
    base: Path
    folder: Path
    pool: ThreadPoolExecutor
    running: dict[str, Future[Written]] = field(default_factory=dict)

    def wrote(self, name: str) -> Written:
        """Skips where the program can't run; the first call starts the everyday ones as well."""
        if name in {run.program for run in BY_HAND}:
            return self.left(name)
        program = (PROGRAMS | SLOW)[name]
        if reason := why_not(program):
            pytest.skip(reason)
        for other in (name, *PROGRAMS):
            if other not in self.running and not why_not((PROGRAMS | SLOW)[other]):
                self.running[other] = self.pool.submit(once, (PROGRAMS | SLOW)[other], self.base, self.folder / other)
        return self.running[name].result()

    def left(self, name: str) -> Written:
        """By a trainer that ran elsewhere."""
        folder = self.folder / "by-hand"
        with FileLock(f"{self.folder / name}.lock"):
            if not (folder / name).exists():
                kept(name, folder / name)
        return Written(folder, said(name))


def why_not(program: Program) -> str | None:
    """What this machine lacks to run a program; None when it can."""
    if program.site and not site(program.site).is_dir():
        return f"{site(program.site)} is not there: make setup-trainers"
    if program.compiles and not (shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()):
        return f"{program.module} compiles a part of itself: that takes g++ and Python's headers"
    return None


def site(name: str) -> Path:
    return Path(sys.prefix) / name


def command(program: Program, base: Path, out: Path, *names: str) -> list[str]:
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(program.ranks)]
    started = [sys.executable, *(ranks if program.ranks > 1 else ())]
    return [*started, "-m", f"tests.trainers.{program.module}", str(base), str(out), *names]


def environment(program: Program) -> dict[str, str]:
    """Only what a program asks for can be imported by it: transformers does otherwise where it finds DeepSpeed."""
    return {
        **os.environ,
        "PYTHONPATH": str(site(program.site)) if program.site else "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_EXTENSIONS_DIR": str(site("torch-extensions")),
    }


def once(program: Program, base: Path, out: Path) -> Written:
    """What it wrote, be it in another of the suite's processes."""
    said = out.with_suffix(".jsonl")
    with FileLock(f"{out}.lock"):
        if not said.exists():
            said.write_text("".join(json.dumps(line) + "\n" for line in run(program, base, out).said))
    return Written(out, [json.loads(line) for line in said.read_text().splitlines()])


def run(program: Program, base: Path, out: Path, before: Sequence[str] = ()) -> Written:
    """`before` is a command that runs the program: strace, for one."""
    ended = subprocess.run(
        [*before, *command(program, base, out)],
        cwd=ROOT, env=environment(program), capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, f"{program.module}: {ended.stdout[-2000:]}{ended.stderr[-4000:]}"
    lines = [line for line in ended.stdout.splitlines() if line.startswith('{"run"')]
    return Written(out, [json.loads(line) for line in lines])


@pytest.fixture(scope="session")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainers]:
    from tests.server.real import make_tiny_model

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which this process shares with the others
    folder /= "trainers"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "base.lock"):
        base = folder / "base"
        if not base.exists():
            make_tiny_model(base)
    pool = ThreadPoolExecutor(2)
    yield Trainers(base, folder, pool)
    pool.shutdown(cancel_futures=True)
