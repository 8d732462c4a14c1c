"""Checkpoints to keep: as a trainer writes them, in folders within folders, and what a store should say of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorakit.store.catalog import Facts
from lorakit.store.kept import Described, Kept, keep_checkpoint

FILES = {
    "adapter_model.safetensors": b"weights",
    "adapter_config.json": b"{}",
    "optimizer.pt": b"moments",
    "global_step5/zero.pt": b"shard",
    ".metadata": b"last",
}


def write_checkpoint(folder: Path, content: str = "one", files: dict[str, bytes] | None = None) -> Path:
    for number, (name, data) in enumerate((files or FILES).items()):
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data + content.encode())
        os.utime(place, (1_700_000_000 + number, 1_700_000_000 + number))
    return folder


def described(step: int | None = 500, **more: Any) -> Described:
    return Described(**{"kind": "adapter", "writer": "transformers", "step": step, **more})


def measured(step: int, loss: float | None, **more: Any) -> Described:
    return described(step, facts=Facts(step=step, eval_loss=loss, eval_step=step), **more)


def kept(
    home: Path, source: Path, content: str = "one", *, run: str = "sql", what: Described | None = None,
    unchanged: Callable[[], bool] = lambda: True,
) -> Kept:  # fmt: skip
    if not source.exists():
        write_checkpoint(source, content)
    return keep_checkpoint(home, source, what or described(), run=run, unchanged=unchanged)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
