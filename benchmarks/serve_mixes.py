"""How much longer the first request for a mix takes than the next one, on the demo's model: median and largest.
Run: python benchmarks/serve_mixes.py [--mixes 41]"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the tests' real servers
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))  # the demo's model
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.server.real import make_random_adapter, serving, write_checkpoint

ASKED = {"prompt": "question: hello\nanswer: ", "max_tokens": 16, "temperature": 0}
KINDS = {"exact": "", "cut to rank 12": ",rank=12", "ties, cut to rank 16": ",method=ties"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mixes", type=int, default=41, help="of each kind")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = make_base(folder / "base")
        for seed, run in enumerate(("sql", "chat")):
            adapter = make_random_adapter(folder / run, base, seed, r=8, lora_alpha=16)
            write_checkpoint(folder / "runs" / run, adapter, 100)
        flags = ("--watch", str(folder / "runs"), "--max-lora-rank", "16", "--max-mix-error", "1")
        engine = ("--max-model-len", "512", "--dtype", "float32")
        with (
            serving(base, folder / "home", folder / "serve.log", *flags, engine=engine) as server,
            server.client() as client,
        ):
            print("| mix | first, median | next, median | more, median | more, largest |\n|---|---|---|---|---|")
            for kind, options in KINDS.items():
                first, following = zip(
                    *(twice(client, f"mix(sql={0.5 + number / 1000},chat=0.5{options})")
                      for number in range(arguments.mixes)), strict=True,
                )  # fmt: skip
                more = [one - other for one, other in zip(first, following, strict=True)]
                numbers = (statistics.median(first), statistics.median(following), statistics.median(more), max(more))
                print(f"| {kind} | " + " | ".join(f"{seconds * 1e3:.0f} ms" for seconds in numbers) + " |")


def make_base(folder: Path) -> Path:
    """Of the demo's shape; its weights are random."""
    import tiny
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = tiny.byte_tokenizer()
    LlamaForCausalLM(tiny.tiny_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def twice(client: httpx.Client, model: str) -> tuple[float, float]:
    return seconds(client, model), seconds(client, model)


def seconds(client: httpx.Client, model: str) -> float:
    begun = time.perf_counter()
    client.post("/v1/completions", json={"model": model, **ASKED}).raise_for_status()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
