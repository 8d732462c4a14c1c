"""A thousand adapters behind eight slots of a real vLLM."""

from __future__ import annotations

import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.server.real import PROMPTS, Answer, ask, serving, write_checkpoint
from tests.world import World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
COUNT, SLOTS = 1_000, 8


def nearly(adapter: Path, number: int, folder: Path) -> Path:
    """The same adapter with other content: its last number, a float32, is another by less than any answer shows."""
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    (last,) = struct.unpack("<f", content[-4:])
    weights.write_bytes(content[:-4] + struct.pack("<f", last + number * 1e-6))
    return folder


def test_each_of_a_thousand_adapters_answers_as_itself_behind_eight_slots(world: World, tmp_path: Path) -> None:
    watched, kinds = tmp_path / "runs", len(world.adapters)
    for number in range(COUNT):
        adapter = nearly(world.adapters[number % kinds], number, tmp_path / "one")
        write_checkpoint(watched / f"user-{number}", adapter, 1)
    flags = ("--watch", str(watched), "--max-loras", str(SLOTS), "--max-lora-rank", "8")
    with serving(world.base, tmp_path / "home", tmp_path / "serve.log", *flags) as server, server.client() as client:

        def answered(number: int) -> tuple[int, Answer]:
            return number, ask(client, f"user-{number}", PROMPTS[number % len(PROMPTS)])

        with ThreadPoolExecutor(2 * SLOTS) as clients:
            for number, answer in clients.map(answered, [*range(COUNT), *range(0, COUNT, 7)]):
                assert str(answer.revision).startswith(f"user-{number}@step-1-")
                assert answer.agrees_with(world.cold_answer(number % kinds, PROMPTS[number % len(PROMPTS)]))
        inside = [
            revision["id"]
            for adapter in client.get("/v1/adapters").json()["data"]
            for revision in adapter["revisions"]
            if revision["in_engine"]
        ]
        assert len(inside) == SLOTS
