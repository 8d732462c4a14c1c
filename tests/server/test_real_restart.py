"""What survives: the engine's death, the supervisor's, and the loss of every source; and starts that fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.real import (
    ENGINE_FLAGS,
    PROMPTS,
    QUICK,
    Server,
    ask,
    end_group,
    free_port,
    is_running,
    serving,
    wait_for,
    write_checkpoint,
)
from tests.world import World

pytestmark = pytest.mark.timeout(600)
FLAGS = ("--max-loras", "2", "--max-lora-rank", "8")


def assert_everything_answers(world: World, server: Server) -> None:
    with server.client() as client:
        for model, adapter in (("sql", 1), ("sql@best", 0), ("sql@prod", 2), ("chat", 3), ("base", None)):
            for prompt in PROMPTS:
                assert ask(client, model, prompt).agrees_with(world.cold_answer(adapter, prompt)), model


@contextmanager
def serving_without_sources(world: World, folder: Path) -> Iterator[Server]:
    """All that `assert_everything_answers` asks for, whose sources are gone."""
    watched = folder / "runs"
    for step, adapter, loss in ((1, 2, 3.0), (2, 0, 1.0), (3, 1, 2.0)):
        write_checkpoint(watched / "sql", world.adapters[adapter], step, loss)
    shutil.copytree(world.adapters[3], watched / "chat")
    with serving_again(world, folder) as server:
        with server.client() as client:
            client.put("/v1/adapters/sql/aliases/prod", json={"revision": "step-1"}).raise_for_status()
        assert_everything_answers(world, server)
        shutil.rmtree(watched)
        watched.mkdir()
        yield server


def serving_again(world: World, folder: Path) -> AbstractContextManager[Server]:
    return serving(world.base, folder / "home", folder / "serve.log", "--watch", str(folder / "runs"), *FLAGS)


def test_adapters_survive_the_supervisor_though_their_sources_are_gone(world: World, tmp_path: Path) -> None:
    with serving_without_sources(world, tmp_path):
        pass
    with serving_again(world, tmp_path) as server:
        assert_everything_answers(world, server)


@pytest.mark.slow
def test_adapters_survive_the_engine_though_their_sources_are_gone(world: World, tmp_path: Path) -> None:
    with serving_without_sources(world, tmp_path) as server:
        kill_engine(server)
        server.wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 200, limit=240)
        assert_everything_answers(world, server)
        told = first_event(server, "engine")
        assert "killed by SIGKILL" in told["message"]
        assert told["last_words"].strip()


def kill_engine(server: Server) -> None:
    """kill -9 of vLLM's API process; what it started must not outlive it, and the address answers all the while."""
    engine, *workers = server.processes()
    os.kill(engine, signal.SIGKILL)
    refusals = []
    for _ in range(20):
        response = httpx.get(f"{server.url}/v1/models", timeout=10)
        refusals.append((response.status_code, response.headers.get("retry-after"), response.json().keys()))
        time.sleep(0.05)
    assert refusals[-1] == (503, "2", {"error"})
    server.wait_until(lambda: not any(is_running(pid) for pid in workers))


def first_event(server: Server, kind: str) -> dict[str, Any]:
    """Of those that are kept, or the next one: the stream goes on for ever."""
    with server.client() as client, client.stream("GET", "/v1/events") as stream:
        for line in stream.iter_lines():
            if line.startswith("data: ") and (told := json.loads(line.removeprefix("data: ")))["type"] == kind:
                found: dict[str, Any] = told
                return found
    raise AssertionError(f"there is no event '{kind}'")


def test_vllm_started_by_hand_serves_adapters_with_the_gateway_as_its_middleware(world: World, tmp_path: Path) -> None:
    """Without VLLM_ALLOW_RUNTIME_LORA_UPDATING, so without vLLM's own routes for adapters."""
    write_checkpoint(tmp_path / "runs" / "sql", world.adapters[0], 5)
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(world.base),
        "--served-model-name", "base", "--port", str(port), "--enable-lora", "--max-loras", "2", "--max-lora-rank", "8",
        "--enforce-eager", "--distributed-executor-backend", "uni", "--middleware", "lorakit.server.Gateway",
        *ENGINE_FLAGS,
    ]  # fmt: skip
    variables = {
        **os.environ, **QUICK, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "LORAKIT_HOME": str(tmp_path / "home"), "LORAKIT_WATCH": str(tmp_path / "runs"),
    }  # fmt: skip
    log = tmp_path / "vllm.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=variables, stdout=stream, stderr=stream, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_for(client, "/ready", process, log)
            assert ask(client, "sql").agrees_with(world.cold_answer(0, PROMPTS[0]))
            write_checkpoint(tmp_path / "runs" / "sql", world.adapters[1], 6)
            ends = time.monotonic() + 30
            while "step-6-" not in str(ask(client, "sql").revision) and time.monotonic() < ends:
                time.sleep(0.1)
            assert ask(client, "sql").agrees_with(world.cold_answer(1, PROMPTS[0]))
            assert ask(client, "base").agrees_with(world.cold_answer(None, PROMPTS[0]))
    finally:
        process.terminate()
        process.wait(30)
        end_group(process)


def run_serve(*arguments: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lorakit", "serve", *arguments]
    environ = {**os.environ, **QUICK, "LORAKIT_HOME": str(home), **variables}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)


def test_a_start_that_vllm_refuses_ends_with_its_own_last_words(materials: Any, tmp_path: Path) -> None:
    base, _ = materials
    ended = run_serve(str(base), "--port", str(free_port()), "--", "--max-model-len", "100000", home=tmp_path)
    assert ended.returncode == 1
    error = ended.stderr.rpartition("error: ")[2]
    assert error.startswith("vLLM did not start:")
    assert "max_model_len (100000) is greater than the derived max_model_len" in error


def test_a_port_that_is_taken_is_said_before_vllm_is_started(materials: Any, tmp_path: Path, world: World) -> None:
    base, _ = materials
    port = world.server.url.rpartition(":")[2]
    ended = run_serve(str(base), "--port", port, "--", *ENGINE_FLAGS, home=tmp_path)
    assert ended.returncode == 5
    assert f"port {port} on 127.0.0.1 is taken" in ended.stderr
