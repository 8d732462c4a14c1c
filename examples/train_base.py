"""Train a tiny Llama from scratch on nine facts, in seconds on a CPU, and save it as a Hugging Face model folder.
Run: python examples/train_base.py --out work/base"""

import argparse
import random
from pathlib import Path

import tiny
import torch
from facts import PHRASINGS
from transformers import LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("work/base"))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    chance = random.Random(arguments.seed)
    tokenizer = tiny.byte_tokenizer()
    model = LlamaForCausalLM(tiny.tiny_config(tokenizer))
    lessons = tiny.lessons(tokenizer, "base", phrasings=list(range(len(PHRASINGS))))

    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.learning_rate, total_steps=arguments.steps)
    for step in range(1, arguments.steps + 1):
        chosen = chance.sample(lessons, arguments.batch_size)
        loss = model(**tiny.batch(chosen, tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}/{arguments.steps}  loss {loss.item():.4f}", flush=True)

    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"saved {arguments.out}")


if __name__ == "__main__":
    main()
