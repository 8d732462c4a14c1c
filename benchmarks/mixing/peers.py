"""The work itself: lorakit's, PEFT's, LoRAX's arithmetic, and an extraction by full SVD. Each runs in a new process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from mixing.pairs import DENSITY, RANK, SCALE, WEIGHTS, Factors, changes, read_factors, write_adapter
from mixing.processes import SHORT, Figures, seconds_of, timed

Prepare = Callable[..., Callable[[], Factors]]


def with_lorakit(pair: Path, method: str, rank: int | None) -> Callable[[], Factors]:
    import lorakit

    adapters = [(lorakit.load_adapter(pair / name), weight) for name, weight in WEIGHTS.items()]

    def work() -> Factors:
        mixed = lorakit.mix(adapters, method, rank, device="cpu")
        return {module: (delta.B, delta.A) for module, delta in mixed.deltas.items()}

    return work


def with_peft(pair: Path, method: str) -> Callable[[], Factors]:
    """PEFT's own `add_weighted_adapter`, on a base whose weights take no memory, both adapters loaded before."""
    import torch
    from peft import PeftModel

    base = torch.nn.Module()
    for module, (b, a) in read_factors(pair / "first").items():
        linear = torch.nn.Linear(a.shape[1], b.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(torch.zeros(1).expand(b.shape[0], a.shape[1]), requires_grad=False)
        *parents, last = module.split(".")
        place = base
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, torch.nn.Module())
            place = place.get_submodule(parent)
        place.add_module(last, linear)
    first, second = WEIGHTS
    model = PeftModel.from_pretrained(base, pair / first, adapter_name=first)
    model.load_adapter(pair / second, adapter_name=second)
    options = {"cat": {}, "svd": {"svd_rank": RANK}, "ties_svd": {"svd_rank": RANK, "density": DENSITY}}[method]
    numbers = count()

    def work() -> Factors:
        name = f"mixed {next(numbers)}"  # for a name that exists PEFT does nothing
        model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), name, method, **options)
        layers = {path: layer for path, layer in model.base_model.model.named_modules() if hasattr(layer, "lora_A")}
        return {
            path: (layer.lora_B[name].weight.data * layer.scaling[name], layer.lora_A[name].weight.data)
            for path, layer in layers.items()
        }

    return work


def as_lorax(pair: Path) -> Callable[[], Factors]:
    """What LoRAX's `linear` comes to (server/lorax_server/utils/merges/strategies.py): A and B are summed apart, with
    the weight on both, so that it counts squared and each B meets the other's A.
    """
    adapters = [(read_factors(pair / name), weight) for name, weight in WEIGHTS.items()]

    def work() -> Factors:
        return {
            module: (
                SCALE * sum(weight * factors[module][0] for factors, weight in adapters),
                sum(weight * factors[module][1] for factors, weight in adapters),
            )
            for module in adapters[0][0]
        }

    return work


def mixed(prepare: Prepare, pair: Path, out: Path | None, *arguments: Any) -> Figures:
    """The mix of two adapters that are loaded, after a small one that loads the libraries; `out` gets the factors."""
    from safetensors.torch import save_file

    prepare(pair.parent / "small", *arguments)()
    work = prepare(pair, *arguments)
    factors, figures = timed(work)
    if figures.seconds < SHORT:
        figures = replace(figures, seconds=min(seconds_of(work) for _ in range(5)))
    if out is not None:
        ((b, a),) = factors.values()
        save_file({"B": b.contiguous(), "A": a.contiguous()}, out)
    return figures


def mixed_and_saved(pair: Path, out: Path) -> Figures:
    """What `lorakit mix --rank` does once torch is there."""
    import lorakit

    def work(pair: Path, out: Path) -> Path:
        adapters = [(pair / name, weight) for name, weight in WEIGHTS.items()]
        return lorakit.mix(adapters, rank=RANK, device="cpu").save(out)

    for folder in (pair.parent / "small", pair):
        shutil.rmtree(out, ignore_errors=True)
        _, figures = timed(partial(work, folder, out))
    return figures


def extracted(tuned: Path, base: Path, out: Path, rank: int) -> Figures:
    """What `lorakit extract` does once torch is there."""
    import torch

    import lorakit

    torch.linalg.svd(torch.randn(64, 64))
    shutil.rmtree(out, ignore_errors=True)
    return timed(lambda: lorakit.extract(tuned, base, out, rank=rank, device="cpu"))[1]


def extracted_by_full_svd(tuned: Path, base: Path, out: Path, rank: int) -> Figures:
    """Each difference by `torch.linalg.svd`, as mergekit and axolotl have it, torch imported before."""
    import torch

    torch.linalg.svd(torch.randn(64, 64))
    shutil.rmtree(out, ignore_errors=True)

    def work() -> None:
        factors = {}
        for module, change in changes(tuned, base):
            u, s, vh = torch.linalg.svd(change, full_matrices=False)
            factors[module] = ((u[:, :rank] * s[:rank]).contiguous(), vh[:rank].contiguous())
        write_adapter(out, factors, rank, 1.0)

    return timed(work)[1]
