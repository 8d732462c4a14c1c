"""What trainers wrote, with whole logs, for pages that have something to show; and an engine that says something."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from starlette.types import Receive, Send

from tests.folders import factors, linear_modules, write_adapter
from tests.server.fake_engine import FakeEngine, put_adapter

ANSWERS = {
    "sql": "SELECT c.name, SUM(o.total) AS revenue\nFROM customers AS c\nJOIN orders AS o ON o.customer_id = c.id\n"
           "WHERE o.placed_at >= DATE '2026-01-01'\nGROUP BY c.name\nORDER BY revenue DESC\nLIMIT 5;",
    "chat": "Here is how I would find them: add up what each customer spent this year, sort by that sum, and keep the "
            "first five. In SQL that is a join of customers and orders, grouped by customer.",
    "mix": "SELECT c.name, SUM(o.total) AS revenue\nFROM customers AS c JOIN orders AS o ON o.customer_id = c.id\n"
           "GROUP BY c.name ORDER BY revenue DESC LIMIT 5;\n\nThis adds up what each customer spent, and keeps the "
           "five who spent the most.",
    "base": "The top five customers are the customers who are at the top. To list the top five customers, list the "
            "customers and take the top five customers.",
}  # fmt: skip


class TalkingEngine(FakeEngine):
    """Says what its adapter would, a word at a time."""

    pause = 0.0

    async def _say(self, request: dict[str, Any], model: str, receive: Receive, send: Send) -> None:
        said = "base" if model == self.limits.base else self.inside[model]
        if not request.get("stream") or said in self.fails:
            await super()._say(request, model, receive, send)
            return
        name = "base" if model == self.limits.base else model.partition("@")[0]
        words = ANSWERS.get(name, ANSWERS["base"]).split(" ")
        head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
        await send(head)
        for place, word in enumerate(words):
            text = word if place == 0 else f" {word}"
            piece = {"delta": {"content": text}} if "messages" in request else {"text": text}
            await _event(send, {"model": model, "choices": [{"index": 0, **piece}]})
            await asyncio.sleep(self.pause)
        usage = {"prompt_tokens": 12, "completion_tokens": len(words), "total_tokens": 12 + len(words)}
        await _event(send, {"model": model, "choices": [], "usage": usage})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _event(send: Send, said: dict[str, Any]) -> None:
    body = b"data: " + json.dumps(said, separators=(",", ":")).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})


def loss_log(last: int, every: int = 10, seed: int = 1, best: int | None = None) -> list[dict[str, Any]]:
    """What a Trainer logs: a train loss every few steps, an eval loss at each hundredth; after `best` it gets worse."""
    chance = np.random.default_rng(seed)
    log: list[dict[str, Any]] = []
    for step in range(every, last + 1, every):
        noise = float(chance.normal(0, 0.035))
        log.append({"step": step, "epoch": step / 500, "loss": round(0.55 + 1.6 * math.exp(-step / 260) + noise, 4)})
        if step % 100 == 0:
            over = max(0, step - (best or last)) / 900
            log.append(
                {"step": step, "epoch": step / 500, "eval_loss": round(0.68 + 1.5 * math.exp(-step / 280) + over, 4)}
            )
    return log


def put_step(run: Path, step: int, *, seed: int = 1, best: int | None = None, like: int | None = None) -> Path:
    """A checkpoint with the log of all that came before it; `like`: near the adapter of another seed."""
    number = seed * 10_000 + step
    folder = run / f"checkpoint-{step}"
    if like is None:
        put_adapter(folder, number)
    else:
        near, far = (factors(linear_modules(), 2, one) for one in (like, number))
        write_adapter(folder, {name: (near[name] + 0.4 * far[name]).astype("float32") for name in near})
    state = {"global_step": step, "epoch": step / 500, "log_history": loss_log(step, seed=seed, best=best)}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder
