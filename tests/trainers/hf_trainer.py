"""transformers.Trainer: a LoRA, a whole model, weights alone; on as many ranks as torchrun started.

python -m tests.trainers.hf_trainer BASE OUT [lora] [whole] [weights-only]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from tests.trainers.tiny import base_model, collated, samples, say, with_lora

STEPS = 10
# Logged, evaluated and saved at different steps: a checkpoint's losses are of its own step, of an earlier one, or none.
EVERY: dict[str, Any] = {"logging_steps": 3, "eval_steps": 4, "save_steps": 2}


class Said(TrainerCallback):
    def __init__(self, run: str) -> None:
        self.run = run

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        say(self.run, "log", step=state.global_step, epoch=state.epoch, values=logs)

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        say(self.run, "save", step=state.global_step, epoch=state.epoch)


def train(run: str, base: str, out: Path, model: Any, **settings: Any) -> Trainer:
    arguments = {
        "output_dir": str(out / run), "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 5e-3,
        "eval_strategy": "steps", "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 3,
        "logging_first_step": False, **EVERY, **settings,
    }  # fmt: skip
    trainer = Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=samples(24),
        eval_dataset=samples(4, seed=1),
        data_collator=collated,
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=[Said(run)],
    )
    trainer.train()
    return trainer


def lora(base: str, out: Path, **settings: Any) -> None:
    """The three newest stay; the Trainer's last save is in the run's own folder."""
    trainer = train("lora", base, out, with_lora(base_model(base)), **{"save_total_limit": 3, **settings})
    trainer.save_model()


def whole(base: str, out: Path) -> None:
    """Every checkpoint stays; so high a rate that each step makes it worse."""
    train("whole", base, out, base_model(base), learning_rate=1.0, lr_scheduler_type="constant")


def weights_only(base: str, out: Path) -> None:
    train("weights-only", base, out, with_lora(base_model(base)), save_only_model=True, save_steps=5, eval_steps=5)


WRITERS = {"lora": lora, "whole": whole, "weights-only": weights_only}

if __name__ == "__main__":
    base, out, *names = sys.argv[1:]
    for name in names or WRITERS:
        WRITERS[name](base, Path(out))
