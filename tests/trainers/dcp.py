"""torch.distributed.checkpoint on two ranks: DDP and FSDP2, saved at once and in the background.

two_ranks.py calls it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.trainers.tiny import base_model, batches, say


def train(model: Any, steps: int = 2) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in batches(steps, seed=dist.get_rank()):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return optimizer


def app_state(model: Any, optimizer: Any) -> dict[str, Any]:
    weights, optimized = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": optimized}


def write(base: str, out: Path) -> None:
    model = DistributedDataParallel(base_model(base))
    state = app_state(model, train(model))
    dcp.save(state, checkpoint_id=out / "ddp" / "step-2")
    dcp.save(state["model"], checkpoint_id=out / "ddp-model" / "step-2")
    sharded = base_model(base)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    state = app_state(sharded, train(sharded))
    dcp.save(state, checkpoint_id=out / "fsdp" / "step-2")
    dcp.async_save(state, checkpoint_id=out / "fsdp-async" / "step-2").result()
    dist.barrier()
    for run in ("ddp", "ddp-model", "fsdp", "fsdp-async"):
        say(run, "save", step=2)
