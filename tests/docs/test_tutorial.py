"""The tutorial, done: every command of it in its order, on real vLLM, and what each prints is what the page shows."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.docs.pages import PAGES, Shown, sessions
from tests.readme import ROOT, blocks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PAGE = PAGES["tutorial.md"]
PATIENCE = 300
LOOKS = ("lorakit ps", "python work/ask.py")  # what they show may take a moment to come


@contextmanager
def serving(line: str, url: str, environ: dict[str, str]) -> Iterator[None]:
    with Path("serve.log").open("wb") as log:
        command = line.replace("lorakit serve", f"exec lorakit serve --port {url.rpartition(':')[2]}")
        server = subprocess.Popen(command, shell=True, env=environ, stdout=log, stderr=log)
    try:
        end = time.monotonic() + PATIENCE
        while not is_ready(url):
            if server.poll() is not None or time.monotonic() > end:
                pytest.fail(Path("serve.log").read_text()[-2000:])
            time.sleep(0.2)
        yield
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


def do(shown: Shown, environ: dict[str, str]) -> None:
    begun = time.monotonic()
    end = begun + PATIENCE
    while True:
        ended = subprocess.run(
            shown.command, shell=True, env=environ, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        printed = ended.stdout + ended.stderr, ended.stderr + ended.stdout
        if ended.returncode == 0 and any(map(shown.is_what, printed)):
            print(f"{time.monotonic() - begun:6.1f} s  {shown.command}")
            return
        if time.monotonic() > end or not shown.command.startswith(LOOKS):
            pytest.fail(f"$ {shown.command}\n{printed[0]}")
        time.sleep(0.5)


def test_the_tutorial_leads_where_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    environ = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "LORAKIT_HOME": str(tmp_path / "store"), "LORAKIT_URL": url,
    }  # fmt: skip
    base, *others = sessions(PAGE)
    do(base, environ)
    (program,) = blocks("python", PAGE)
    Path("work/ask.py").write_text(program)
    Path("work/runs").mkdir()
    (line,) = re.findall(r"^(\w+=\S+ lorakit serve .*)$", PAGE, re.M)
    with serving(line, url, environ):
        for shown in others:
            do(shown, environ)
