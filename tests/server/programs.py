"""Two small programs for the supervisor's tests: a supervisor, and an engine that is no vLLM.

python -m tests.server.programs supervise PIDFILE ENGINE-FLAGS...
python -m tests.server.programs engine PIDFILE ENGINE-FLAGS...

The engine's flags: `fail` (say why and end), `late` (need a while to start), `orphan` (leave a child behind),
`stubborn` (ignore SIGTERM, and not end), `mute` (never say that it is up), `flaky` (fail at every second start).
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def engine(pids: Path, flags: list[str]) -> None:
    starts = len(pids.read_text().split()) if pids.exists() else 0
    with pids.open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    print("loading weights now", flush=True)
    if "stubborn" in flags:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "orphan" in flags:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        pids.with_suffix(".orphan").write_text(str(child.pid))
    if "late" in flags:
        time.sleep(1.0)
    if "fail" in flags or ("flaky" in flags and starts % 2):
        print("out of luck: the reason", file=sys.stderr, flush=True)
        sys.exit(3)
    if "mute" in flags:
        time.sleep(600)
    asyncio.run(_engine())
    if "stubborn" in flags:
        time.sleep(600)


async def _engine() -> None:
    from lorakit.server.listener import supervised

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/hang":
            time.sleep(600)  # noqa: ASYNC251 - this is what is meant
        if scope["path"] == "/slow":
            await asyncio.sleep(1.0)
        body = f"engine {os.getpid()}".encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    async def alive() -> bool:
        return True

    line = supervised(2.0)
    assert line is not None
    gateway: Any = SimpleNamespace(reconciler=SimpleNamespace(engine=SimpleNamespace(alive=alive)))
    await line.run(app, gateway)


def supervise(pids: Path, flags: list[str]) -> None:
    from lorakit.errors import EngineFailed
    from lorakit.server import supervisor as module
    from lorakit.server.supervisor import Supervisor, listen

    module.SILENT, module.HUNG = 1.5, 2.5

    public = listen("127.0.0.1", 0)
    print(public.getsockname()[1], flush=True)
    command = [sys.executable, "-m", "tests.server.programs", "engine", str(pids), *flags]

    def phase_of(line: str) -> str | None:
        return "loading weights" if "loading weights" in line else None

    async def run() -> int:
        supervisor = Supervisor(public, lambda socket: (command, dict(os.environ)), drain=2.0, phase_of=phase_of)
        await supervisor.run()
        return supervisor.exit_code

    try:
        sys.exit(asyncio.run(run()))
    except EngineFailed as error:
        print(f"EngineFailed: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    {"engine": engine, "supervise": supervise}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:])
