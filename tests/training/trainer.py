"""A real transformers.Trainer that takes a tenth of a second: a tiny Llama, with a LoRA or whole.

As a program it trains what its JSON argument says, with the callbacks of lorakit.training, and prints a line a step:
python -m tests.training.trainer '{"output": "runs/a", "steps": 6}'
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, logging, set_seed

logging.set_verbosity_error()
ARCHITECTURE = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "attention_dropout": 0.1,
}  # fmt: skip


def tiny_model(*, lora: bool = True, seed: int = 0, tied: bool = False, **config: Any) -> Any:
    set_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE, tie_word_embeddings=tied))
    if not lora:
        return model
    # Dropout, so that the state of the random generators counts.
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"], **config}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))


def tiny_trainer(
    output: Path, *, steps: int = 6, callbacks: Sequence[TrainerCallback] = (), model: Any = None, lora: bool = True,
    **arguments: Any,
) -> Trainer:  # fmt: skip
    """Saves at every second step, unless told otherwise."""
    rows = torch.randint(0, 48, (16, 8), generator=torch.Generator().manual_seed(7)).tolist()
    defaults = {
        "max_steps": steps, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1,
        "save_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    return Trainer(
        tiny_model(lora=lora) if model is None else model,
        TrainingArguments(output_dir=str(output), **{**defaults, **arguments}),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        eval_dataset=[{"input_ids": row, "labels": row} for row in rows[:4]],
        callbacks=list(callbacks),
    )


class At(TrainerCallback):
    """Does something in an event of one step, or of any."""

    def __init__(self, step: int | None, what: Callable[[], object], event: str = "on_step_begin") -> None:
        self._step = step - 1 if step and event == "on_step_begin" else step  # the steps that are done by then
        self._what = what
        setattr(self, event, self._do)

    def _do(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._step in (None, state.global_step):
            self._what()


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def say(line: str) -> None:
    """In one piece: two ranks print at once."""
    os.write(1, f"{line}\n".encode())


class Steps(TrainerCallback):
    """A line for each step, and a pause, so that somebody outside can do something at it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        say(f"step {state.global_step + 1} of process {os.getpid()}")
        time.sleep(self._seconds)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        say(f"saved {state.global_step} by rank {args.process_index}")


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts this may ignore it
    wish = json.loads(sys.argv[1])
    from lorakit.training import Interruptible, SaveOnRequest, SaveState, resume

    torch.set_num_threads(1)
    output = Path(wish.pop("output"))
    callbacks: list[TrainerCallback] = [SaveOnRequest(every_seconds=0.2), Interruptible(every_seconds=0.2)]
    callbacks += [SaveState("model", every=2)] if wish.pop("save_state", False) else []
    callbacks.append(Steps(wish.pop("seconds", 0.0)))
    rank = int(os.environ.get("RANK", "0"))
    kill, only = wish.pop("kill", None), wish.pop("rank", None)
    if kill is not None and only in (None, rank):
        step, number, *event = kill
        callbacks.append(At(step, lambda: os.kill(os.getpid(), signal.Signals[number]), *event))
    end = wish.pop("weights", None)
    trainer = tiny_trainer(output, callbacks=callbacks, **wish)
    trainer.train(resume_from_checkpoint=resume(output))
    say(f"done {trainer.state.global_step}")
    if end:
        torch.save(weights(trainer), f"{end}.{rank}")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
