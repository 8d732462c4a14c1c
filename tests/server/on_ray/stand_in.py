"""What stands for vLLM in a replica where Ray alone is what is tried: it starts at once, and knows no model.

`python -m vllm.entrypoints.openai.api_server`, with the folder that `put_stand_in` makes before the others.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from pathlib import Path

from tests.server.fake_vllm import FakeVllm, listening

VERSION = "0.32.0+cpu"


class StandIn(FakeVllm):
    """Its metrics say as well how many adapters it has."""

    def metrics(self) -> str:
        return f"{super().metrics()}stand_in_adapters {len(self.named)}\n"


def put_stand_in(folder: Path) -> Path:
    """A package `vllm` that is this."""
    package = folder / "vllm"
    (package / "entrypoints" / "openai").mkdir(parents=True)
    for part in (package, package / "entrypoints", package / "entrypoints" / "openai"):
        (part / "__init__.py").touch()
    (package / "_version.py").write_text(f'__version__ = "{VERSION}"\n')
    program = package / "entrypoints" / "openai" / "api_server.py"
    program.write_text("from tests.server.on_ray.stand_in import main\n\nmain()\n")
    return folder


async def serve(base: Path, name: str, socket: Path, slots: int) -> None:
    vllm = StandIn(base, slots=slots, version=VERSION, removes=True, cpu=True)
    vllm.name = name
    ends = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ends.set)
    async with listening(vllm, path=socket):
        await ends.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    for flag in ("--model", "--uds"):
        parser.add_argument(flag, type=Path)
    parser.add_argument("--served-model-name")
    parser.add_argument("--max-loras", type=int)
    given, _ = parser.parse_known_args()
    asyncio.run(serve(given.model, given.served_model_name, given.uds, given.max_loras))
