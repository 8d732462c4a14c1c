"""What two ranks of FSDP2 leave of a model in other ways than dcp.py's: a file a rank, as verl writes them; shards of
columns; DCP in Hugging Face's format; and the whole model that each of it is of.

two_ranks.py calls it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from transformers import AutoTokenizer

from tests.trainers.dcp import app_state, train
from tests.trainers.tiny import base_model


def write(base: str, out: Path) -> None:
    rows, optimizer = trained(base, torch.bfloat16)
    save_whole(rows, out / "rows.pt")
    each_rank(rows, base, out / "ranks" / "actor")
    hugging_face(rows, out / "huggingface")
    dcp.save({"app": app_state(rows, optimizer), "step": 2}, checkpoint_id=out / "rows" / "step-2")
    columns, _ = trained(base, torch.float32, shard_placement_fn=lambda one: Shard(1) if one.dim() > 1 else None)
    save_whole(columns, out / "columns.pt")
    dcp.save({"model": columns.state_dict()}, checkpoint_id=out / "columns" / "step-2")
    torch.save(columns.state_dict(), out / "columns" / f"model-rank{dist.get_rank()}.pt")


def trained(base: str, dtype: torch.dtype, **settings: Any) -> tuple[Any, Any]:
    model = base_model(base).to(dtype)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **settings)
    fully_shard(model, mesh=mesh, **settings)
    return model, train(model)


def save_whole(model: Any, file: Path) -> None:
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, file)
    dist.barrier()


def each_rank(model: Any, base: str, folder: Path) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / f"model_world_size_{ranks}_rank_{rank}.pt")
    torch.save({"state": {}}, folder / f"optim_world_size_{ranks}_rank_{rank}.pt")
    torch.save({"lr_scheduler": None, "rng": None}, folder / f"extra_state_world_size_{ranks}_rank_{rank}.pt")
    if rank == 0:
        (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": ranks}))
        model.config.save_pretrained(folder / "huggingface")
        AutoTokenizer.from_pretrained(base).save_pretrained(folder / "huggingface")
    dist.barrier()


def hugging_face(model: Any, folder: Path) -> None:
    names = {name: 1 + ("layers.1" in name) for name in model.state_dict()}
    for run, consolidated in (("shards", False), ("both", True)):
        writer = dcp.HuggingFaceStorageWriter(
            str(folder / run), names, save_distributed=True, enable_consolidation=consolidated
        )
        dcp.save(model.state_dict(), storage_writer=writer)
