"""What the programs train, and how they say what they measured."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

LENGTH = 16  # tokens
LAYERS = ["q_proj", "v_proj", "down_proj"]

Sample = dict[str, list[int]]


def say(run: str, what: str, **values: Any) -> None:
    """One line of JSON on stdout: what the tests hold lorakit's reading of the files against."""
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"run": run, "what": what, **values}), flush=True)


def leave() -> NoReturn:
    """The end of one of several ranks. Gloo's threads now and then abort an interpreter that shuts down: none does."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def samples(count: int, seed: int = 0) -> list[Sample]:
    """Letters in their order, from different ones on: a model learns them in a few steps."""
    starts = torch.randint(0, 200, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [list(range(start, start + LENGTH)) for start in starts]
    return [{"input_ids": row, "attention_mask": [1] * LENGTH, "labels": row} for row in rows]


def batches(count: int, size: int = 2, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    rows = samples(count * size, seed)
    for start in range(0, len(rows), size):
        yield collated(rows[start : start + size])


def collated(rows: list[Sample]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def base_model(base: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_pretrained(base)


def with_lora(model: Any, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, lora_config(LoraConfig, **settings))


def lora_config(kind: Any, **settings: Any) -> Any:
    return kind(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": LAYERS, **settings})
