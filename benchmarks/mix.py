"""Mix and extract beside PEFT, LoRAX's arithmetic and mergekit: seconds, private memory, and the error against float64.
Run: python benchmarks/mix.py [--scale 0.25] [--all-shapes] [--repeat 3] [--only mix|extract] [--shape 8b] [--layers 2]
     [--mergekit PROGRAM] [--folder DIR]

It needs torch, safetensors, PEFT and lorakit; mergekit's row wants its program mergekit-extract-lora. PEFT's `svd` of
the two largest shapes of an 8 B Llama takes many minutes and is measured with `--all-shapes` alone. What takes longer
than 20 s is run once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import merge
from mixing.exact import error, least_error, ties, weighted_sum
from mixing.pairs import RANK, WEIGHTS, changes, make_pair, make_tuned
from mixing.peers import (
    Prepare,
    as_lorax,
    extracted,
    extracted_by_full_svd,
    mixed,
    mixed_and_saved,
    with_lorakit,
    with_peft,
)
from mixing.processes import Figures, alone, command, in_turns

if TYPE_CHECKING:
    import torch

HIDDEN, INNER, KEY_VALUE, LAYERS = 4096, 14336, 1024, 32  # of Llama 3 8 B
EXTRACTED_RANK = 32


@dataclass(frozen=True, slots=True)
class Way:
    """One way to mix a module: `wanted` gives what should come out, `peer` names the way that does the same."""

    name: str
    prepare: Prepare
    arguments: tuple[Any, ...]
    wanted: Callable[[Path], torch.Tensor] = weighted_sum
    truncated: bool = False
    peer: str | None = None


WAYS = (
    Way("PEFT `svd`", with_peft, ("svd",), truncated=True),
    Way(f"lorakit, rank {RANK}", with_lorakit, ("linear", RANK), truncated=True, peer="PEFT `svd`"),
    Way("PEFT `cat`", with_peft, ("cat",)),
    Way("lorakit, exact", with_lorakit, ("linear", None), peer="PEFT `cat`"),
    Way("LoRAX's `linear`", as_lorax, ()),
    Way("PEFT `ties_svd`", with_peft, ("ties_svd",), ties, truncated=True),
    Way(
        f"lorakit `peft:ties_svd`, rank {RANK}", with_lorakit, ("peft:ties_svd", RANK), ties, truncated=True,
        peer="PEFT `ties_svd`",
    ),
)  # fmt: skip


def linears() -> dict[str, tuple[int, int]]:
    """Of a layer, as (out, in)."""
    attention = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (KEY_VALUE, HIDDEN), "v_proj": (KEY_VALUE, HIDDEN)}
    attention |= {"o_proj": (HIDDEN, HIDDEN)}
    feed_forward = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    named = {f"self_attn.{name}": shape for name, shape in attention.items()}
    return named | {f"mlp.{name}": shape for name, shape in feed_forward.items()}


def report_whole(folder: Path, layers: int, repeat: int) -> None:
    modules = {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in linears().items()}
    pair = make_pair(folder / "whole", modules)
    size = (pair / "first" / "adapter_model.safetensors").stat().st_size / 1e6
    adapters = [f"{pair / name}={weight}" for name, weight in WEIGHTS.items()]
    ours, out = [sys.executable, "-m", "lorakit", "mix", *adapters, "--device", "cpu"], folder / "out"
    todo: dict[str, Callable[[], Figures]] = {
        f"`lorakit mix --rank {RANK}`": partial(command, out, *ours, "--rank", RANK, "--out"),
        "its work, torch imported before": partial(alone, mixed_and_saved, pair, out),
        "`lorakit mix`, exact": partial(command, out, *ours, "--out"),
        "PEFT `cat`, loaded before and not saved": partial(alone, mixed, with_peft, pair, None, "cat"),
        "LoRAX's `linear`, loaded before and not saved": partial(alone, mixed, as_lorax, pair, None),
    }
    print(
        f"Two adapters of rank {RANK} in float32 ({size:.0f} MB each) on {len(modules)} modules of a Llama of 8 B, "
        f"{os.cpu_count()} cores\n\n| what | seconds | private memory, MB |\n|---|---|---|"
    )
    for name, figures in in_turns(todo, repeat).items():
        print(f"| {name} | {figures.seconds:.2f} | {figures.peak:.0f} |")
    shutil.rmtree(pair)


def report_modules(folder: Path, every: bool, repeat: int) -> None:
    print(
        "\nThe mix of one module, all else done before; what takes less than half a second is the best of several\n\n"
        "| shape | what | seconds | its peer's time in it | memory added, MB | relative error | above the least |\n"
        "|---|---|---|---|---|---|---|"
    )
    of_a_layer = list(linears().values())
    shapes = [shape for shape in sorted(set(of_a_layer)) if every or max(shape) <= HIDDEN]
    seconds = {}
    for shape in shapes:
        pair = make_pair(folder / f"{shape[0]}x{shape[1]}", {"model.layers.0.self_attn.q_proj": shape})
        seconds[shape] = report_module(pair, shape, repeat)
    longest = max(seconds.values())
    hours = LAYERS * sum(seconds.get(shape, longest) for shape in of_a_layer) / 3600
    larger = LAYERS * sum(shape not in seconds for shape in of_a_layer)
    said = f", were the {larger} larger ones as quick as the slowest of these" if larger else ""
    print(
        f"\nReckoned, not measured: PEFT's `svd` of all {LAYERS * len(of_a_layer)} modules takes {hours:.1f} h{said}\n"
    )


def report_module(pair: Path, shape: tuple[int, int], repeat: int) -> float:
    """Prints the rows of one shape; gives the seconds of PEFT's `svd`."""
    from safetensors.torch import load_file

    outs = {way.name: pair / f"{number}.safetensors" for number, way in enumerate(WAYS)}
    todo = {way.name: partial(alone, mixed, way.prepare, pair, outs[way.name], *way.arguments) for way in WAYS}
    best = in_turns(todo, repeat)
    targets = {wanted: wanted(pair) for wanted in dict.fromkeys(way.wanted for way in WAYS)}
    least = {wanted: least_error(target, RANK) for wanted, target in targets.items()}
    for way in WAYS:
        figures, stored, target = best[way.name], load_file(outs[way.name]), targets[way.wanted]
        lost = error(target, stored["B"], stored["A"])
        ratio = f"{best[way.peer].seconds / figures.seconds:.1f}" if way.peer else "-"
        above = f"{lost / least[way.wanted] - 1:+.1e}" if way.truncated else "-"
        print(
            f"| {shape[0]}×{shape[1]} | {way.name} | {figures.seconds:.4f} | {ratio} | {figures.added:.0f} "
            f"| {lost / float(target.norm()):.2e} | {above} |"
        )
    return best["PEFT `svd`"].seconds


def report_extraction(folder: Path, shape: str, layers: int, repeat: int, program: str | None) -> None:
    if shape == "8b":
        merge.HIDDEN, merge.KEY_VALUE, merge.INNER = 4096, 1024, 14336
    base, tuned = folder / "base", folder / "tuned"
    merge.make_base(base, layers)
    make_tuned(tuned, base)
    by_lorakit, by_full_svd, by_mergekit = "`lorakit extract`", "full SVD of each, torch imported before", "mergekit"
    work = "its work, torch imported before"
    outs = {name: folder / f"out-{number}" for number, name in enumerate((by_lorakit, work, by_full_svd, by_mergekit))}
    ours = [sys.executable, "-m", "lorakit", "extract", tuned, "--base", base, "--rank", EXTRACTED_RANK]
    todo: dict[str, Callable[[], Figures]] = {
        by_lorakit: partial(command, outs[by_lorakit], *ours, "--device", "cpu", "--out"),
        work: partial(alone, extracted, tuned, base, outs[work], EXTRACTED_RANK),
        by_full_svd: partial(alone, extracted_by_full_svd, tuned, base, outs[by_full_svd], EXTRACTED_RANK),
    }
    if program:
        todo[by_mergekit] = partial(
            command, outs[by_mergekit], program, "--model", tuned, "--base-model", base, "--max-rank", EXTRACTED_RANK,
            "-e", "embed_tokens", "-e", "lm_head", "--no-copy-tokenizer", "--out-path",
        )  # fmt: skip
    best = in_turns(todo, repeat)
    modules = dict(changes(tuned, base))
    print(
        f"Rank {EXTRACTED_RANK} of a fine-tune in bf16: the linear layers of {layers} of a Llama of {shape.upper()}, "
        f"{os.cpu_count()} cores\n\n"
        "| what | seconds | mergekit's time in it | full SVD's | private memory, MB | relative error "
        "| above the least |\n|---|---|---|---|---|---|---|"
    )
    norm = sum(float(change.double().square().sum()) for change in modules.values()) ** 0.5
    least = sum(least_error(change, EXTRACTED_RANK) ** 2 for change in modules.values()) ** 0.5
    for name, figures in best.items():
        lost = error_of(outs[name], modules)
        mergekit = f"{best[by_mergekit].seconds / figures.seconds:.1f}" if program else "-"
        print(
            f"| {name} | {figures.seconds:.2f} | {mergekit} | {best[by_full_svd].seconds / figures.seconds:.1f} "
            f"| {figures.peak:.0f} | {lost / norm:.3e} | {lost / least - 1:+.1e} |"
        )


def error_of(folder: Path, modules: dict[str, torch.Tensor]) -> float:
    """‖Δ - B A‖ over all modules of an adapter that was written."""
    import lorakit

    adapter = lorakit.load_adapter(folder)
    squares = 0.0
    for module, change in modules.items():
        delta = adapter.delta(module)
        squares += error(change, delta.B.double() * delta.scale, delta.A) ** 2
    return squares**0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the 32 layers that are mixed")
    parser.add_argument("--all-shapes", action="store_true", help="PEFT's SVDs of 14336×4096 and 4096×14336, too")
    parser.add_argument("--repeat", type=int, default=3, help="the best of so many counts")
    parser.add_argument("--only", choices=["mix", "extract"], help="one of the two")
    parser.add_argument("--shape", choices=["1b", "8b"], default="1b", help="of the models that are extracted from")
    parser.add_argument("--layers", type=int, help="of those models: 4 of 1.1 B, 1 of 8 B")
    parser.add_argument("--mergekit", help="the program mergekit-extract-lora, where it is installed")
    parser.add_argument("--folder", help="where to work; by default among temporary files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        if arguments.only != "extract":
            make_pair(folder / "small", {"model.layers.0.self_attn.q_proj": (64, 64)})
            report_whole(folder, max(1, round(LAYERS * arguments.scale)), arguments.repeat)
            report_modules(folder, arguments.all_shapes, arguments.repeat)
        if arguments.only != "mix":
            layers = arguments.layers or (4 if arguments.shape == "1b" else 1)
            report_extraction(folder, arguments.shape, layers, arguments.repeat, arguments.mergekit)


if __name__ == "__main__":
    main()
