"""Merge beside PEFT, mergekit and `cp`: whole-process seconds and peak private memory, on the shape of a 1.1 B Llama.
Run: python benchmarks/merge.py [--shape 7b] [--scale 0.25] [--repeat 3] [--cold] [--device cuda] [--without-peft]
     [--mergekit PROGRAM] [--folder DIR]

It needs torch, safetensors and lorakit; PEFT and transformers for PEFT's row. `--cold` has the system drop the base's
pages before each run. With a GPU it says which one, how fast memory is copied to it, and the share that is reached.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, INNER, LAYERS, VOCABULARY, KEY_VALUE, SHARDS, RANK = 2048, 5632, 22, 32000, 256, 5, 16
SEVEN = {"HIDDEN": 4096, "INNER": 11008, "LAYERS": 32, "VOCABULARY": 32000, "KEY_VALUE": 4096, "SHARDS": 14}

COPY, WORK_ALONE, THEIRS = "`cp -r` and `sync`", "its work, torch imported before", "PEFT: load, merge, save"
MERGEKIT = "mergekit: `model+lora`"

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(out, max_shard_size="500MB")
"""

WORK = """
import sys, time, torch, lorakit.merge.blocks
base, adapter, out, device = sys.argv[1:]
if device != "cpu":
    torch.zeros(1, device=device)
begun = time.perf_counter()
lorakit.merge(base, [adapter], out=out, device=device)
print(time.perf_counter() - begun)
"""


def linears(layer: int) -> dict[str, tuple[int, int]]:
    attention = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (KEY_VALUE, HIDDEN), "v_proj": (KEY_VALUE, HIDDEN)}
    attention |= {"o_proj": (HIDDEN, HIDDEN)}
    feed_forward = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    named = {f"self_attn.{name}": shape for name, shape in attention.items()}
    named |= {f"mlp.{name}": shape for name, shape in feed_forward.items()}
    return {f"model.layers.{layer}.{name}": shape for name, shape in named.items()}


def make_base(folder: Path, layers: int) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        shapes |= {f"{name}.weight": shape for name, shape in linears(layer).items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    weight_map: dict[str, str] = {}
    names = list(shapes)
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        mine = names[len(names) * shard // SHARDS : len(names) * (shard + 1) // SHARDS]
        save_file(
            {name: (torch.randn(shapes[name]) * 0.02).bfloat16() for name in mine},
            folder / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(mine, file)
    total = sum(file.stat().st_size for file in folder.iterdir())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "vocab_size": VOCABULARY,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": KEY_VALUE * 32 // HIDDEN, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "max_position_embeddings": 2048,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def make_adapter(folder: Path, base: Path, layers: int) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {}
    for layer in range(layers):
        for name, (out, into) in linears(layer).items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, into) * 0.02
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, RANK) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none",
        "target_modules": sorted({name.rsplit(".", 1)[1] for name in linears(0)}), "base_model_name_or_path": str(base),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def measured(command: list[str]) -> tuple[float, float, str]:
    """Seconds, peak private memory in MB (RssAnon, looked at every 5 ms), and what it printed."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, private_memory(process.pid))
        time.sleep(0.005)
    seconds = time.perf_counter() - begun
    if process.returncode:
        raise SystemExit(f"{command[:4]} ended with {process.returncode}")
    return seconds, peak / 1024, process.stdout.read() if process.stdout else ""


def private_memory(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the layers")
    parser.add_argument("--repeat", type=int, default=3, help="the best of so many counts")
    parser.add_argument("--without-peft", action="store_true")
    parser.add_argument("--shape", choices=["1b", "7b"], default="1b")
    parser.add_argument("--device", default="cpu", help="where lorakit computes")
    parser.add_argument("--cold", action="store_true", help="the base is read from the disk each time")
    parser.add_argument("--mergekit", help="the program mergekit-yaml, where it is installed")
    parser.add_argument("--folder", help="where to work; by default among temporary files")
    arguments = parser.parse_args()
    if arguments.shape == "7b":
        globals().update(SEVEN)
    layers = max(1, round(LAYERS * arguments.scale))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        report(Path(folder), layers, arguments)


def report(folder: Path, layers: int, arguments: argparse.Namespace) -> None:
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    make_base(base, layers)
    make_adapter(adapter, base, layers)
    os.sync()
    size = sum(file.stat().st_size for file in base.iterdir()) / 1e9
    todo = commands(base, adapter, out, arguments)
    best, peaks = measured_in_turns(todo, out, arguments.repeat, base if arguments.cold else None)
    cache = "cold" if arguments.cold else "warm"
    print(
        f"{size:.2f} GB in bf16, {SHARDS} shards, rank {RANK} on 7 linear layers, {os.cpu_count()} cores, "
        f"{cache} cache, {arguments.device}\n"
    )
    print("| what | seconds | × `cp` | PEFT's time in it | private memory, MB |\n|---|---|---|---|---|")
    for name, seconds in best.items():
        peft = f"{best[THEIRS] / seconds:.1f}" if THEIRS in best else "-"
        print(f"| {name} | {seconds:.2f} | {seconds / best[COPY]:.2f} | {peft} | {peaks[name]:.0f} |")
    if arguments.device != "cpu":
        print_bandwidth(arguments.device, size / best[WORK_ALONE])


def print_bandwidth(device: str, reached: float) -> None:
    import torch

    block = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(5):
        there.copy_(block, non_blocking=True)
    torch.cuda.synchronize()
    speed = 5 * (1 << 30) / 1e9 / (time.perf_counter() - begun)
    name = torch.cuda.get_device_name(device)
    print(f"\n{name}: {speed:.1f} GB/s from pinned memory; the merge's work {reached:.1f} GB/s, {reached / speed:.0%}")


def commands(base: Path, adapter: Path, out: Path, arguments: argparse.Namespace) -> dict[str, list[str]]:
    here = [str(base), str(adapter), str(out)]
    todo = {
        COPY: ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(base), str(out)],
        "`lorakit merge`": [
            sys.executable, "-m", "lorakit", "merge", str(adapter), "--base", str(base), "--out", str(out),
            "--device", arguments.device,
        ],
        WORK_ALONE: [sys.executable, "-c", WORK, *here, arguments.device],
    }  # fmt: skip
    if not arguments.without_peft:
        todo[THEIRS] = [sys.executable, "-c", PEFT, *here]
    if arguments.mergekit:
        recipe = base.parent / "recipe.yaml"
        recipe.write_text(
            f"models:\n  - model: {base}+{adapter}\n    parameters: {{weight: 1.0}}\n"
            f"merge_method: linear\ndtype: bfloat16\n"
        )
        todo[MERGEKIT] = [
            arguments.mergekit, str(recipe), str(out), "--lora-merge-cache", str(base.parent / "cache"),
            "--no-copy-tokenizer",
        ]  # fmt: skip
    return todo


def drop_pages(folder: Path) -> None:
    """Have the system forget what it holds of these files."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured_in_turns(
    todo: dict[str, list[str]], out: Path, repeat: int, cold: Path | None
) -> tuple[dict[str, float], dict[str, float]]:
    """The best seconds and the highest memory of each; in turns, so that a busy moment meets all of them."""
    best: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for _ in range(repeat):
        for name, command in todo.items():
            if cold is not None:
                drop_pages(cold)
            seconds, peak, printed = measured(command)
            if name == WORK_ALONE:
                seconds = float(printed)
            best[name] = min(best.get(name, seconds), seconds)
            peaks[name] = max(peaks.get(name, peak), peak)
            for folder in (out, out.parent / "cache"):
                shutil.rmtree(folder, ignore_errors=True)
            os.sync()
    return best, peaks


if __name__ == "__main__":
    main()
