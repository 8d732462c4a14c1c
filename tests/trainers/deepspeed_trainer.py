"""transformers.Trainer with DeepSpeed on two ranks: a LoRA under ZeRO 2, a whole model under ZeRO 3.

python -m torch.distributed.run --nproc_per_node 2 -m tests.trainers.deepspeed_trainer BASE OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed

from tests.trainers.hf_trainer import train
from tests.trainers.tiny import base_model, leave, with_lora


def config(stage: int, **settings: Any) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage, **settings}, "train_micro_batch_size_per_gpu": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    }  # fmt: skip


if __name__ == "__main__":
    base, out = sys.argv[1], Path(sys.argv[2])
    deepspeed.init_distributed("gloo")
    steps = {"save_steps": 5, "eval_steps": 5}
    train("lora", base, out, with_lora(base_model(base)), deepspeed=config(2), **steps)
    gathered = config(3, stage3_gather_16bit_weights_on_model_save=True)
    train("whole", base, out, base_model(base), deepspeed=gathered, **steps)
    leave()
