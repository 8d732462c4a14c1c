"""Everything at once on one real vLLM, for an hour: a trainer that writes and rotates, moves, loads, mixes and crashes,
under load. Each answer is held against a cold server's; what grows is looked at after the last crash."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest

from tests.server.real import PROMPTS, Answer, Server, ask, serving, write_checkpoint
from tests.server.test_real_serving import streamed
from tests.world import ADAPTERS, World

FLAGS = (
    "--max-loras", "3", "--max-lora-rank", "16", "--keep-revisions", "8", "--mixes-kept", "8", "--canary", "1",
    "--hang-limit", "10",
)  # fmt: skip
ALLOWED = {"memory": 48 * 2**20, "files": 12, "descriptors": 8, "threads": 4, "series": 12}


@dataclass(frozen=True)
class Asked:
    """What a request got, or what went wrong; `begun` and `ended` as time.monotonic."""

    model: str
    prompt: str
    begun: float
    ended: float
    got: Answer | Exception


@dataclass
class Soak:
    """What the threads share. `windows` are the announced ones: from a crash until `/ready`."""

    server: Server
    world: World
    folder: Path
    ends: threading.Event = field(default_factory=threading.Event)
    asked: list[Asked] = field(default_factory=list)
    windows: list[tuple[float, float]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[float, dict[str, int]]] = field(default_factory=list)

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def excused(self, begun: float, ended: float) -> bool:
        return any(begun < closed and ended > opened for opened, closed in self.windows)

    def adapter_of(self, revision: str) -> int:
        """Which adapter a revision holds: its step says so, or its name."""
        if found := re.match(r"sql@step-(\d+)-|guest(\d+)@", revision):
            return int(found[1] or found[2]) % ADAPTERS
        raise AssertionError(f"nobody wrote {revision}")


def write(run: Path, adapter: Path, step: int) -> None:
    """A checkpoint with content of its own, which answers as the adapter does."""
    from safetensors.torch import load_file, save_file

    ours = run.parent.parent / "unlike"
    shutil.copytree(adapter, ours, dirs_exist_ok=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors, ours / "adapter_model.safetensors", {"format": "pt", "step": str(step)})
    write_checkpoint(run, ours, step)


def train(soak: Soak) -> None:
    """Writes a checkpoint, sometimes over an older one, and removes those that are more than three."""
    step = 1
    while not soak.ends.wait(2.0):
        step += 1
        write(soak.runs / "sql", soak.world.adapters[step % ADAPTERS], step)
        soak.done["checkpoints"] += 1
        for older in sorted((soak.runs / "sql").iterdir(), key=lambda path: int(path.name[11:]))[:-3]:
            shutil.rmtree(older)
        if step % 5 == 0:  # as a trainer leaves behind that was killed while it wrote
            (soak.runs / "sql" / f"checkpoint-{step}" / "adapter_model.safetensors").write_bytes(b"half")


def operate(soak: Soak) -> None:
    """Moves an alias, goes back, loads and unloads guests, and asks for mixes."""
    chance = random.Random(0)
    turn = 0
    with soak.server.client() as client:
        while not soak.ends.wait(0.5):
            turn += 1
            begun, some = time.monotonic(), list[str]()
            try:
                ready = ready_in(client)
                some = chance.sample(ready, min(2, len(ready)))
                _operate_once(soak, client, turn, some)
            except Exception as error:  # every failure is a finding
                if not await_excuse(soak, begun) and set(some) <= set(ready_in(client)):  # else they left meanwhile
                    soak.wrong.append(f"turn {turn}: {type(error).__name__}: {error}")


def ready_in(client: httpx.Client) -> list[str]:
    """The revisions of the run that can be asked for; --keep-revisions takes the oldest away at any moment."""
    known = client.get("/v1/adapters/sql").raise_for_status().json()["revisions"]
    return [revision["id"] for revision in known if revision["state"] == "ready"]


def _operate_once(soak: Soak, client: httpx.Client, turn: int, some: list[str]) -> None:
    if turn % 6 == 0:
        name = f"guest{turn // 6 % 4}"
        asked = {"name": name, "source": str(soak.world.adapters[turn // 6 % 4])}
        client.post("/v1/adapters", json=asked).raise_for_status()
        answer = ask(client, name)
        assert answer.agrees_with(soak.world.cold_answer(turn // 6 % 4, PROMPTS[0])), name
        client.delete(f"/v1/adapters/{name}").raise_for_status()
        gone = client.post("/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 1})
        assert gone.status_code == 404, gone.text
        soak.done["guests"] += 1
    elif turn % 6 == 3 and len(some) == 2:
        client.post("/v1/adapters/sql/rollback").raise_for_status()
        client.put("/v1/adapters/sql/aliases/sql", json={"revision": "latest"}).raise_for_status()  # follow again
        soak.done["rollbacks"] += 1
    elif turn % 6 == 5 and len(some) == 2:
        ask(client, f"mix({some[0]}=0.25,{some[1]}=0.75)")
        soak.done["mixes"] += 1
    elif some:
        client.put("/v1/adapters/sql/aliases/now", json={"revision": some[0]}).raise_for_status()
        soak.done["moves"] += 1


def await_excuse(soak: Soak, begun: float) -> bool:
    """Whether a window is open: it is written down when it ends."""
    ended = time.monotonic()
    soak.ends.wait(0.2)
    return soak.excused(begun, ended)


def keep_asking(soak: Soak, number: int) -> None:
    models = ("sql", "sql@now", "base", "sql@latest")
    turn = number
    with soak.server.client(timeout=90) as client:
        while not soak.ends.is_set():
            model, prompt = models[turn % len(models)], PROMPTS[turn % len(PROMPTS)]
            turn += 1
            begun = time.monotonic()
            got: Answer | Exception
            try:
                got = streamed(client, model, prompt) if turn % 2 else ask(client, model, prompt)
            except Exception as error:
                got = error
                time.sleep(0.1)
            soak.asked.append(Asked(model, prompt, begun, time.monotonic(), got))
            time.sleep(0.02)


def look(soak: Soak) -> dict[str, int]:
    """What must not grow, of the engine and the supervisor together."""
    status, descriptors = list[str](), 0
    for pid in (soak.server.process.pid, *soak.server.processes()):
        with suppress(OSError):  # one that has just ended
            status.append(Path(f"/proc/{pid}/status").read_text())
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
    with soak.server.client() as client:
        metrics = client.get("/metrics").text
    return {
        "memory": sum(int(kib) * 1024 for text in status for kib in re.findall(r"VmRSS:\s*(\d+)", text)),
        "threads": sum(int(count) for text in status for count in re.findall(r"Threads:\s*(\d+)", text)),
        "descriptors": descriptors,
        # folders that retention removes meanwhile are passed over
        "files": sum(len(folders) + len(files) for _, folders, files in os.walk(soak.folder / "home")),
        "series": sum(1 for line in metrics.splitlines() if line and not line.startswith("#")),
    }


def crash(soak: Soak, number: int) -> None:
    """The engine is killed, or stops without a word; the window that this opens ends with `/ready`."""
    opened = time.monotonic()
    soak.windows.append((opened, float("inf")))
    os.kill(soak.server.processes()[0], number)
    soak.server.wait_until(lambda: httpx.get(f"{soak.server.url}/ready", timeout=30).status_code == 503, limit=120)
    soak.server.wait_until(lambda: httpx.get(f"{soak.server.url}/ready", timeout=30).status_code == 200, limit=240)
    soak.windows[-1] = (opened, time.monotonic())
    soak.done["crashes"] += 1


@contextmanager
def together(soak: Soak, *work: Callable[[], None]) -> Iterator[None]:
    threads = [threading.Thread(target=one) for one in work]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        soak.ends.set()
        for thread in threads:
            thread.join()


def assert_right(soak: Soak) -> None:
    counted: Counter[Any] = Counter()
    for one in soak.asked:
        if isinstance(one.got, Exception):
            assert soak.excused(one.begun, one.ended), f"{one.model}: {type(one.got).__name__}: {one.got}"
            counted["excused"] += 1
            continue
        counted[one.model] += 1
        if one.model == "base":
            assert one.got.agrees_with(soak.world.cold_answer(None, one.prompt))
        else:
            adapter = soak.adapter_of(str(one.got.revision))
            assert one.got.agrees_with(soak.world.cold_answer(adapter, one.prompt)), one.got.revision
    assert not soak.wrong, soak.wrong[:5]
    print(counted)
    assert all(counted[model] for model in ("sql", "sql@now", "base", "sql@latest"))


def growth(soak: Soak, since: float) -> dict[str, tuple[float, float]]:
    """Medians of the second and of the last quarter of the time after a moment."""
    after = [sample for at, sample in soak.samples if at > since]
    quarter = max(1, len(after) // 4)
    return {
        what: (
            median(sample[what] for sample in after[quarter : 2 * quarter] or after),
            median(sample[what] for sample in after[-quarter:]),
        )
        for what in ALLOWED
    }


@pytest.mark.parametrize(
    ("seconds", "crashes"),
    [
        pytest.param(3600.0, 6, marks=[pytest.mark.slow, pytest.mark.timeout(5400)], id="an_hour"),
        pytest.param(12.0, 1, marks=pytest.mark.timeout(400), id="short"),
    ],
)
def test_no_request_fails_or_is_answered_wrongly_and_nothing_grows(
    world: World, tmp_path: Path, seconds: float, crashes: int
) -> None:
    seconds = float(os.environ.get("LORAKIT_SOAK_SECONDS", seconds))
    (tmp_path / "runs").mkdir()
    write(tmp_path / "runs" / "sql", world.adapters[1], 1)
    root = str(world.adapters[0].parent)
    flags = ("--watch", str(tmp_path / "runs"), "--root", root, *FLAGS)
    with serving(world.base, tmp_path / "home", tmp_path / "serve.log", *flags) as server:
        soak = Soak(server, world, tmp_path)
        with server.client() as client:
            client.put("/v1/adapters/sql/aliases/now", json={"revision": "step-1"}).raise_for_status()
        clients = [lambda number=number: keep_asking(soak, number) for number in range(4)]
        with together(soak, lambda: train(soak), lambda: operate(soak), *clients):
            began = time.monotonic()
            for number in range(crashes):  # all in the first half
                time.sleep(max(0.0, began + seconds / 2 * (number + 0.5) / crashes - time.monotonic()))
                crash(soak, signal.SIGSTOP if number % 3 == 2 else signal.SIGKILL)
            since = time.monotonic()
            ends = since + max(seconds / 2, began + seconds - since)
            while time.monotonic() < ends:
                soak.samples.append((time.monotonic(), look(soak)))
                time.sleep(min(5.0, seconds / 40))
        grown = growth(soak, since)
        print(soak.done, grown)
        assert_right(soak)
        if seconds > 300:  # before, much is done for the first time
            assert not [what for what, (early, late) in grown.items() if late > early + ALLOWED[what]], grown
