"""What each program leaves in the end: the oracle for recognising it, by what the program was told to save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MODEL, TRAINED = ("model",), ("model", "optimizer")
FULL = ("model", "optimizer", "scheduler", "rng", "trainer_state")


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a program, and what its checkpoints are.

    `places`: by their steps, relative to the run; `*` is a value that was measured.
    """

    program: str
    name: str
    places: Mapping[int, str]
    writer: str
    kind: str
    holds: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.program}:{self.name}"


def at(path: str, *steps: int) -> dict[int, str]:
    return {step: path.format(step) for step in steps}


# transformers.Trainer and what is built on it: their checkpoints have a log.
LOGGED = (
    Run("hf_trainer", "lora", at("checkpoint-{}", 6, 8, 10), "transformers", "adapter", FULL),
    Run("hf_trainer", "whole", at("checkpoint-{}", 2, 4, 6, 8, 10), "transformers", "regular", FULL),
    Run(
        "hf_trainer", "weights-only", at("checkpoint-{}", 5, 10), "transformers", "adapter", ("model", "trainer_state")
    ),
    Run("two_ranks", "ranks/lora", at("checkpoint-{}", 2, 4, 6, 8, 10), "transformers", "adapter", FULL),
    Run("trl_sft", "sft", at("checkpoint-{}", 6, 9), "transformers", "adapter", FULL),
)
LIGHTNING = ("model", "optimizer", "scheduler", "trainer_state")
BY_EPOCH = {8: "epoch=1-step=8-val_loss=*.ckpt", 12: "epoch=2-step=12-val_loss=*.ckpt"}
BY_STEP = {3: "epoch=0-step=3.ckpt", 6: "epoch=1-step=6.ckpt", 9: "epoch=2-step=9.ckpt", 12: "epoch=2-step=12.ckpt"}
DEEPSPEED = ("model", "optimizer", "scheduler", "trainer_state")
OTHERS = (
    Run(
        "two_ranks", "accelerate", at("step_{}", 4), "accelerate", "regular", ("model", "optimizer", "scheduler", "rng")
    ),
    Run("two_ranks", "ddp", at("step-{}", 2), "dcp", "regular", TRAINED),
    Run("two_ranks", "ddp-model", at("step-{}", 2), "dcp", "regular", MODEL),
    Run("two_ranks", "fsdp", at("step-{}", 2), "dcp", "regular", TRAINED),
    Run("two_ranks", "fsdp-async", at("step-{}", 2), "dcp", "regular", TRAINED),
    Run("lightning_fit", "best", BY_EPOCH, "lightning", "regular", LIGHTNING),
    Run("lightning_fit", "steps", BY_STEP, "lightning", "regular", ("model", "trainer_state")),
    Run("deepspeed_zero", "zero1", at("global_step{}", 2, 4), "deepspeed", "regular", DEEPSPEED),
    Run("deepspeed_zero", "zero2", at("global_step{}", 2, 4), "deepspeed", "regular", DEEPSPEED),
    Run("deepspeed_zero", "zero3", at("global_step{}", 2, 4), "deepspeed", "regular", DEEPSPEED),
)
SLOW = (
    Run("fsdp_trainer", "sharded", at("checkpoint-{}", 5, 10), "transformers", "regular", FULL),
    Run("fsdp_trainer", "full", at("checkpoint-{}", 5, 10), "transformers", "regular", FULL),
    Run("fsdp_trainer", "lora-sharded", at("checkpoint-{}", 5, 10), "transformers", "adapter", FULL),
    Run("fsdp_trainer", "lora-full", at("checkpoint-{}", 5, 10), "transformers", "adapter", FULL),
    Run("deepspeed_trainer", "lora", at("checkpoint-{}", 5, 10), "transformers", "adapter", FULL),
    Run("deepspeed_trainer", "whole", at("checkpoint-{}", 5, 10), "transformers", "regular", FULL),
)
# What they left is all that the suite has of them: see by_hand.
BY_HAND = tuple(
    Run(name, name, at("checkpoint-{}", 2, 4), "transformers", "adapter", FULL) for name in ("axolotl", "llamafactory")
)
EVERYDAY = LOGGED + OTHERS
