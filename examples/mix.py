"""Mix two adapters into one that PEFT and vLLM load, whatever their ranks: 0.7 * a + 0.3 * b is exact.
Run: python examples/mix.py work/runs/sql/checkpoint-120 work/runs/shout/checkpoint-120 --out work/mixed"""

import argparse
from pathlib import Path

import lorakit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=Path, nargs="?", default=Path("work/runs/sql/checkpoint-120"))
    parser.add_argument("second", type=Path, nargs="?", default=Path("work/runs/shout/checkpoint-120"))
    parser.add_argument("--out", type=Path, default=Path("work/mixed"))
    arguments = parser.parse_args()

    a = lorakit.load_adapter(arguments.first)
    b = lorakit.load_adapter(arguments.second)
    mixed = 0.7 * a + 0.3 * b
    mixed.save(arguments.out)
    print(f"{arguments.out}: ranks {a.rank} and {b.rank} make {mixed.rank}, on {len(mixed.modules)} modules")


if __name__ == "__main__":
    main()
