"""What looking at checkpoints costs: `lorakit ls` of many beside `find` with the same number of stats and beside
reading every log; the watcher's scan of runs that do not change; `lorakit fetch` beside `curl | tar`.
Run: python benchmarks/checkpoints.py"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the tests' small checkpoints

from tests.checkpoints.written import evaluated, write_checkpoint

if TYPE_CHECKING:
    from lorakit.server.following.watcher import Watcher

LOGGED = 20  # entries in a checkpoint's log
SCANS = 40
READ_EVERY_LOG = """
import json, os, sys
for folder in os.scandir(sys.argv[1]):
    with open(os.path.join(folder.path, "trainer_state.json")) as file:
        json.load(file)["log_history"]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=10_000)
    parser.add_argument("--megabytes", type=int, default=1000, help="in the archive that is fetched")
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LORAKIT_HOME"] = str(folder / "home")
        print("| what | seconds |\n|---|---|")
        listing(folder / "runs" / "sql", arguments.checkpoints, arguments.repeat)
        watching(folder / "watched" / "sql", arguments.checkpoints)
        fetching(folder / "fetched", arguments.megabytes, arguments.repeat)


def listing(run: Path, count: int, repeat: int) -> None:
    many(run, count)
    command = [sys.executable, "-m", "lorakit", "ls", str(run)]
    row(f"`lorakit ls` of {count}, the first time", once(command))
    row("again", best(repeat, lambda: once(command)))
    row("`lorakit --version`", best(repeat, lambda: once([sys.executable, "-m", "lorakit", "--version"])))
    row("`find -printf '%s %T@'`", best(repeat, lambda: once(["find", str(run), "-printf", "%s %T@\n"])))
    row("reading every log", best(repeat, lambda: once([sys.executable, "-c", READ_EVERY_LOG, str(run)])))


def watching(run: Path, checkpoints: int) -> None:
    """As the server does: a scan each half second, of a run in which nothing changes."""
    from lorakit.server.following.watcher import Watcher

    for count in (100, 1000, checkpoints):
        many(run, count)
        watcher = Watcher([run.parent])
        for sight in watcher.scan():
            watcher.settle(sight)
        seconds = [scanned(watcher) for _ in range(SCANS)]
        row(f"a scan of a run of {count}, the median", statistics.median(seconds))
        row("all scans of a second", sum(seconds) * 2 / SCANS)
        shutil.rmtree(run)


def scanned(watcher: Watcher) -> float:
    time.sleep(0.5)
    begun = time.process_time()
    watcher.scan()
    return time.process_time() - begun


def fetching(folder: Path, megabytes: int, repeat: int) -> None:
    folder.mkdir()
    source = write_checkpoint(folder / "checkpoint-500", [evaluated(500, 1.1)])
    with (source / "optimizer.pt").open("wb") as file:
        for _ in range(megabytes):
            file.write(os.urandom(1 << 20))
    with tarfile.open(folder / "checkpoint.tar", "w") as archive:
        archive.add(source, "checkpoint-500")
    with served(folder) as url:
        row(
            f"`curl | tar x` of {megabytes} MB",
            best(repeat, lambda: into(folder, curl_and_tar(f"{url}/checkpoint.tar"))),
        )
        fetch = [sys.executable, "-m", "lorakit", "fetch", f"{url}/checkpoint.tar", "--out", str(folder / "out" / "it")]
        row("`lorakit fetch`, synced", best(repeat, lambda: into(folder, fetch)))


def curl_and_tar(url: str) -> list[str]:
    return ["sh", "-c", f"curl -s '{url}' | tar x -C out"]


def into(folder: Path, command: list[str]) -> float:
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out").mkdir()
    return once(command, folder)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def many(run: Path, count: int) -> None:
    """Checkpoints that differ in their step and log alone; each has files of its own."""
    first = write_checkpoint(run / "checkpoint-10")
    names = [file.name for file in first.iterdir() if file.name != "trainer_state.json"]
    log: list[dict[str, float]] = []
    for number in range(1, count + 1):
        step = 10 * number
        log = [*log, {"step": step, "epoch": step / 1e4, "loss": 2.0 - step / 1e6}, evaluated(step, 1.9)][-LOGGED:]
        folder = run / f"checkpoint-{step}"
        if number > 1:
            folder.mkdir()
            for name in names:
                shutil.copyfile(first / name, folder / name)
        state = {"global_step": step, "epoch": step / 1e4, "log_history": log}
        (folder / "trainer_state.json").write_text(json.dumps(state))


def best(repeat: int, measured: Callable[[], float]) -> float:
    return min(measured() for _ in range(repeat))


def once(command: list[str], where: Path | None = None) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, cwd=where, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begun


def row(what: str, seconds: float) -> None:
    print(f"| {what} | {seconds:.4f} |", flush=True)


if __name__ == "__main__":
    main()
