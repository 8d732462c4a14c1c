"""What an engine takes for a step, a prompt and a load: fitted to what was recorded, or put together from what others
published of GPUs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
RECORDED, PUBLISHED = HERE / "recorded.json", HERE / "h100.json"
# Of an 8 B Llama with LoRA on all seven linear layers, in bf16: (in + out) of each, 32 layers.
BYTES_PER_RANK = 2 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. A step is one token for each of `batch` requests, which name `adapters`, in an engine whose largest rank
    is `rank`; nothing else goes on meanwhile, nor during a prompt or a load."""

    name: str
    step_fixed: float
    step_per_request: float
    step_per_request_rank: float  # a kernel that gathers an adapter for each token
    step_per_adapter_rank: float  # one that reads each adapter once
    prompt_per_token: float
    prompt_per_token_rank: float
    load_fixed: float
    load_per_byte: float

    def step(self, batch: int, adapters: int, rank: int) -> float:
        by_request = self.step_per_request + self.step_per_request_rank * rank
        return self.step_fixed + by_request * batch + self.step_per_adapter_rank * adapters * rank

    def prompt(self, tokens: float, rank: int) -> float:
        return tokens * (self.prompt_per_token + self.prompt_per_token_rank * rank)

    def load(self, rank: int) -> float:
        return self.load_fixed + self.load_per_byte * rank * BYTES_PER_RANK

    def rate(self, rank: int, *, batch: int, adapters: int, prompt: float, answer: float) -> float:
        """Requests a second that an engine answers with this many at a time."""
        return 1 / (answer * self.step(batch, adapters, rank) / batch + self.prompt(prompt, rank))


def published(path: Path = PUBLISHED) -> Timings:
    found = json.loads(path.read_text(encoding="utf-8"))
    return Timings(found["name"], **{key: value["seconds"] for key, value in found["timings"].items()})


def recorded(path: Path = RECORDED) -> Timings:
    return fitted(json.loads(path.read_text(encoding="utf-8")))


def fitted(record: dict[str, Any]) -> Timings:
    """By least squares of the relative error, no part of it negative."""
    steps = record["steps"]
    step = _fit(
        [[1, row["batch"], row["batch"] * row["max_rank"], row["adapters"] * row["max_rank"]] for row in steps],
        [row["seconds"] for row in steps],
    )
    prompts = record["prompts"]
    prompt = _fit(
        [[1, row["tokens"], row["tokens"] * row["max_rank"]] for row in prompts], [row["seconds"] for row in prompts]
    )
    loads = record["loads"]
    load = _fit([[1, row["bytes"]] for row in loads], [row["seconds"] for row in loads])
    return Timings(record["name"], *step, *prompt[1:], *load)


def _fit(rows: list[list[float]], seconds: list[float]) -> list[float]:
    """What each column costs; the columns that would cost less than nothing cost nothing."""
    known = np.array(seconds)
    matrix = np.array(rows, float) / known[:, None]
    columns = list(range(matrix.shape[1]))
    while True:
        found = np.linalg.lstsq(matrix[:, columns], np.ones(len(known)), rcond=None)[0]
        if (found >= 0).all():
            costs = dict(zip(columns, found.tolist(), strict=True))
            return [costs.get(column, 0.0) for column in range(matrix.shape[1])]
        columns.pop(int(found.argmin()))


def worst_error(record: dict[str, Any], timings: Timings) -> float:
    """By how much of it a recorded step is missed at most."""
    missed = [timings.step(row["batch"], row["adapters"], row["max_rank"]) / row["seconds"] for row in record["steps"]]
    return max(abs(one - 1) for one in missed)
