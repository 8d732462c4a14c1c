"""Find the weights of a mix by how well it answers nine questions: no gradients, some twenty tries.
Run: python examples/search.py work/runs/sql/checkpoint-120 work/runs/shout/checkpoint-120 --base work/base"""

import argparse
from pathlib import Path

import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=Path, nargs="?", default=Path("work/runs/sql/checkpoint-120"))
    parser.add_argument("second", type=Path, nargs="?", default=Path("work/runs/shout/checkpoint-120"))
    parser.add_argument("--base", type=Path, default=Path("work/base"))
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("work/best"))
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    wanted = tiny.batch(tiny.lessons(tokenizer, "mix", phrasings=[0]), tokenizer.pad_token_id)

    @torch.inference_mode()
    def loss(candidate) -> float:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(arguments.base), candidate.folder)
        return model(**wanted).loss.item()

    found = lorakit.search([arguments.first, arguments.second], loss, maximise=False, evaluations=arguments.evaluations)
    found.adapter.save(arguments.out)
    for trial in found.trials[:3]:
        print(f"loss {trial.score:.3f} with {' and '.join(f'{weight:g}' for weight in trial.weights)}")
    print(f"{arguments.out}: loss {found.score:.3f} with {' and '.join(f'{weight:.2f}' for weight in found.weights)}")


if __name__ == "__main__":
    main()
