"""Merge a checkpoint into its base: a model folder that needs neither PEFT nor lorakit any more.
Run: python examples/merge.py work/runs/sql/checkpoint-120 --base work/base --out work/merged"""

import argparse
from pathlib import Path

import lorakit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path, nargs="?", default=Path("work/runs/sql/checkpoint-120"))
    parser.add_argument("--base", type=Path, default=Path("work/base"))
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("work/merged"))
    arguments = parser.parse_args()

    report = lorakit.merge(arguments.base, [(arguments.adapter, arguments.weight)], out=arguments.out)
    print(f"{report.out}: {report.as_dict()['tensors']} tensors, in {report.seconds:.1f} s")


if __name__ == "__main__":
    main()
