"""Two small programs for the supervisor's tests: a supervisor, and an engine that is no vLLM.

python -m tests.server.programs supervise PIDFILE ENGINE-FLAGS...
python -m tests.server.programs succeed PIDFILE ENGINE-FLAGS...      (with --takeover)
python -m tests.server.programs engine PIDFILE ENGINE-FLAGS...

The engine's flags: `fail` (say why and end), `late` (need a while to start), `orphan` (leave a child behind that hears
no SIGTERM), `stubborn` (ignore SIGTERM, and not end), `mute` (never say that it is up), `flaky` (fail at every second
start), `ill` (call itself dead after a while), `numb` (be there, and answer no canary), `mad` (answer it wrong), `busy`
(answer it late, and count tokens meanwhile), `cold` (never have all adapters that it should), `alone` (be asked by a
gateway elsewhere). With `quick` the
supervisor loses its patience soon, and with `tls` both speak https, with the certificate beside PIDFILE.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HOLDING = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def engine(pids: Path, flags: list[str]) -> None:
    starts = len(pids.read_text().split()) if pids.exists() else 0
    with pids.open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    print("loading weights now", flush=True)
    if "stubborn" in flags:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "orphan" in flags:
        # as a child that was forked does, it keeps whatever is open
        child = subprocess.Popen([sys.executable, "-c", HOLDING], close_fds=False)
        pids.with_suffix(".orphan").write_text(str(child.pid))
    if "late" in flags:
        time.sleep(1.0)
    if "fail" in flags or ("flaky" in flags and starts % 2):
        print("out of luck: the reason", file=sys.stderr, flush=True)
        sys.exit(3)
    if "mute" in flags:
        time.sleep(600)
    asyncio.run(_engine(pids, set(flags)))
    if "stubborn" in flags:
        time.sleep(600)


class Reconciler:
    """As much of one, and of its engine, as the listener looks at."""

    def __init__(self, flags: set[str]) -> None:
        self.flags = flags
        self.began = time.monotonic()
        self.converged = "cold" not in flags
        self.engine = self
        self.limits = SimpleNamespace(base="base")
        self.events = SimpleNamespace(tell=lambda kind, message, **data: self.told.append({"message": message, **data}))
        self.told: list[dict[str, Any]] = []
        self.held = False

    async def hold(self) -> None:
        self.held = True

    def resume(self) -> None:
        self.held = False

    async def alive(self, *, now: bool = False) -> bool:
        return "ill" not in self.flags or time.monotonic() - self.began < 0.5

    async def try_out(self, name: str) -> str | None:
        if "numb" in self.flags or "busy" in self.flags:
            await asyncio.sleep(600)
        return "its first token has the logprob [nan]" if "mad" in self.flags else None

    async def metrics(self) -> bytes:
        tokens = int(time.monotonic() * 100) if "busy" in self.flags else 7
        return b'vllm:generation_tokens_total{engine="0"} %d.0\n' % tokens


def certificate_beside(pids: Path, flags: set[str]) -> dict[str, str]:
    return {f"tls_{name}": str(pids.parent / f"{name}.pem") for name in ("cert", "key")} if "tls" in flags else {}


async def _engine(pids: Path, flags: set[str]) -> None:
    from lorakit.server.settings import Settings
    from lorakit.server.supervision import listener

    listener.HEARTBEAT = 0.2

    known = Reconciler(flags)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/hang":
            time.sleep(600)  # noqa: ASYNC251 - this is what is meant
        if scope["path"] == "/slow":
            await asyncio.sleep(1.0)
        said = {"/told": known.told, "/held": known.held}.get(scope["path"], f"engine {os.getpid()}")
        body = str(said).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    settings = Settings(drain=2.0, canary=0.2, hang_limit=3.2 if "quick" in flags else 60.0)
    line = listener.supervised(replace(settings, **certificate_beside(pids, flags)))
    assert line is not None
    await line.may_begin()
    if "alone" in flags:
        with contextlib.suppress(asyncio.CancelledError):
            await line.run_alone(known, SimpleNamespace(stuck=False))
        return
    gateway: Any = SimpleNamespace(reconciler=known)
    await line.run(app, gateway)


def supervise(pids: Path, flags: list[str], takeover: bool = False) -> None:
    """Its store's home is beside the file of the engines' ids."""
    from contextlib import ExitStack

    from lorakit.errors import LorakitError
    from lorakit.server.settings import Settings
    from lorakit.server.supervision import supervisor as module
    from lorakit.server.supervision.supervisor import Supervisor, Times, listen
    from lorakit.server.supervision.takeover import SUFFIX, take_over
    from lorakit.store.serving import serving, serving_now

    module.BACKOFF = (0.2,)
    home = pids.parent / "home"
    home.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.server.programs", "engine", str(pids), *flags]
    times = Times(drain=2.0, ending=1.0)
    if "quick" in flags:
        times = replace(times, silent=0.8, hung=2.0, start=2.0)

    def phase_of(line: str) -> str | None:
        return "loading weights" if "loading weights" in line else None

    try:
        with ExitStack() as stack:
            if takeover:
                taken = take_over(home, "base", serving_now(home)[0].url)
                public, end = taken.public, taken.end
                assert taken.members, "it does not say which processes its engine is"
            else:
                public, end = listen("127.0.0.1", 0), None
            port = public.getsockname()[1]
            file = stack.enter_context(serving(home, "base", f"http://127.0.0.1:{port}"))
            print(port, flush=True)
            supervisor = Supervisor(
                public, lambda socket: (command, dict(os.environ)), phase_of=phase_of, times=times,
                way_in=file.with_suffix(SUFFIX), taken=end,
                certificate=Settings(**certificate_beside(pids, set(flags))).certificate,  # type: ignore[arg-type]
            )  # fmt: skip
            asyncio.run(supervisor.run())
        sys.exit(supervisor.exit_code)
    except LorakitError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    verb, pids, flags = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    if verb == "engine":
        engine(pids, flags)
    else:
        supervise(pids, flags, takeover=verb == "succeed")
