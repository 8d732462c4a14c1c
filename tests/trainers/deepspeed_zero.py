"""DeepSpeed's ZeRO 1, 2 and 3 on two ranks, two checkpoints each.

python -m torch.distributed.run --nproc_per_node 2 -m tests.trainers.deepspeed_zero BASE OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

from tests.trainers.tiny import base_model, batches, leave, say


def write(base: str, out: Path, stage: int, **settings: Any) -> None:
    model = base_model(base)
    config = {
        "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {}}, **settings,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    for step, batch in enumerate(batches(4, seed=dist.get_rank()), 1):
        engine.backward(engine(**batch).loss)
        engine.step()
        if step % 2 == 0:
            engine.save_checkpoint(str(out / f"zero{stage}"))
            say(f"zero{stage}", "save", step=step)


if __name__ == "__main__":
    base, out = sys.argv[1], Path(sys.argv[2])
    deepspeed.init_distributed("gloo")
    write(base, out, 1)
    write(base, out, 2, bf16={"enabled": True})
    write(base, out, 3)
    leave()
