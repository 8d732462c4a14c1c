"""Many adapters that differ, from one: the same numbers but for a few."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.numpy import load_file, save_file


def make_many(like: Path, folder: Path, count: int) -> list[Path]:
    tensors = load_file(like / "adapter_model.safetensors")
    name = next(iter(tensors))
    found = []
    for number in range(count):
        place = folder / f"many-{number:04}"
        place.mkdir(parents=True)
        changed = tensors[name].copy()
        changed.flat[0] += 1e-3 * (number + 1)
        save_file({**tensors, name: changed}, place / "adapter_model.safetensors")
        shutil.copyfile(like / "adapter_config.json", place / "adapter_config.json")
        found.append(place)
    return found
