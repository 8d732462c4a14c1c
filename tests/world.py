"""One real vLLM for the whole run, and the answers of a cold one to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.server.real import Answer, Server

ADAPTERS = 6
SLOTS = 3
PLACES = 4


@dataclass
class World:
    """A server with an empty run, adapters to put into it, and what each has to answer."""

    server: Server
    base: Path
    watched: Path
    adapters: list[Path]
    cold: dict[tuple[str, str], Answer]
    plain: str  # where the cold one is: it has PLACES to spare, and can take adapters out

    def cold_answer(self, adapter: int | None, prompt: str) -> Answer:
        return self.cold["base" if adapter is None else f"a{adapter}", prompt]


@pytest.fixture(scope="session")
def materials(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A tiny base and adapters for it."""
    from tests.server.real import make_random_adapter, make_tiny_model

    folder = tmp_path_factory.mktemp("materials")
    base = make_tiny_model(folder / "base")
    return base, [make_random_adapter(folder / f"a{seed}", base, seed) for seed in range(ADAPTERS)]


@pytest.fixture(scope="session")
def world(materials: tuple[Path, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    from tests.server.real import answers_of, named_modules, plain_vllm, serving

    base, adapters = materials
    folder = tmp_path_factory.mktemp("world")
    watched = folder / "runs"
    watched.mkdir()
    named = {f"a{number}": path for number, path in enumerate(adapters)}

    def start_cold(stack: ExitStack) -> tuple[dict[tuple[str, str], Answer], str]:
        plain = plain_vllm(
            base, folder / "cold.log", *named_modules(named), max_loras=ADAPTERS + PLACES + 1, max_rank=8,
            VLLM_SERVER_DEV_MODE="1",
        )  # fmt: skip
        client = stack.enter_context(plain)
        return answers_of(client, named), str(client.base_url)

    with ExitStack() as stack, ThreadPoolExecutor(1) as beside:
        cold = beside.submit(start_cold, stack)
        flags = ("--watch", str(watched), "--max-loras", str(SLOTS), "--max-lora-rank", "8", "--max-mix-error", "0.6")
        with serving(base, folder / "home", folder / "serve.log", *flags) as server:
            yield World(server, base, watched, adapters, *cold.result())
