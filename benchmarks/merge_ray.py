"""`lorakit merge` with and without `--ray`, on one machine: what spreading costs before there is a second one.
Run: python benchmarks/merge_ray.py [--scale 0.25] [--repeat 3] [--folder DIR]

The model is that of merge.py, 1.1 B in bf16. It needs Ray: pip install 'lorakit[ray]'.
"""

import argparse
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import merge

HERE, STARTED, JOINED = "one process", "`--ray`, which starts a cluster", "on a cluster that runs, workers there"

PROGRAM = """
import sys, time, torch, lorakit.merge.blocks
from lorakit.cluster.joining import joined
base, adapter, out = sys.argv[1:]
with joined(True):
    lorakit.merge(base, [adapter], out=out + "-before", device="cpu", ray=True)
    begun = time.perf_counter()
    lorakit.merge(base, [adapter], out=out, device="cpu", ray=True)
    print(time.perf_counter() - begun)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the layers")
    parser.add_argument("--repeat", type=int, default=3, help="the best of so many counts")
    parser.add_argument("--folder", help="where to work; by default among temporary files")
    arguments = parser.parse_args()
    beside = Path(__file__).parent.parent / ".venv" / "ray"
    if find_spec("ray") is None and not beside.is_dir():
        print("Ray is not installed: nothing to measure")
        return
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(beside)]))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        report(Path(folder), max(1, round(merge.LAYERS * arguments.scale)), arguments.repeat)


def report(folder: Path, layers: int, repeat: int) -> None:
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    merge.make_base(base, layers)
    merge.make_adapter(adapter, base, layers)
    os.sync()
    command = [
        sys.executable, "-m", "lorakit", "merge", str(adapter), "--base", str(base), "--out", str(out),
        "--device", "cpu",
    ]  # fmt: skip
    best: dict[str, float] = {}
    for _ in range(repeat):
        for name, todo in (
            (HERE, command),
            (merge.WORK_ALONE, [sys.executable, "-c", merge.WORK, str(base), str(adapter), str(out), "cpu"]),
            (STARTED, [*command, "--ray"]),
            (JOINED, [sys.executable, "-c", PROGRAM, str(base), str(adapter), str(out)]),
        ):
            seconds, _, printed = merge.measured(todo)
            if name in (merge.WORK_ALONE, JOINED):
                seconds = float(printed)
            best[name] = min(best.get(name, seconds), seconds)
            for left in (out, folder / "out-before"):
                shutil.rmtree(left, ignore_errors=True)
            os.sync()
    size = sum(file.stat().st_size for file in base.iterdir()) / 1e9
    print(f"{size:.2f} GB in bf16, {merge.SHARDS} shards, rank {merge.RANK}, {os.cpu_count()} cores, one machine\n")
    print("| what | seconds | × the same without Ray |\n|---|---|---|")
    for name, alone in (
        (HERE, HERE),
        (STARTED, HERE),
        (merge.WORK_ALONE, merge.WORK_ALONE),
        (JOINED, merge.WORK_ALONE),
    ):
        print(f"| {name} | {best[name]:.2f} | {best[name] / best[alone]:.2f} |")


if __name__ == "__main__":
    main()
