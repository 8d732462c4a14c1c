"""transformers.Trainer with FSDP2 on two ranks: a sharded and a full state, of a whole model and of a LoRA.

accelerate passes FSDP by on a CPU and says nothing, so its state is told that there is a plugin.

python -m torch.distributed.run --nproc_per_node 2 -m tests.trainers.fsdp_trainer BASE OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import accelerate.state
import torch.distributed as dist
from accelerate.utils import DistributedType

from tests.trainers.hf_trainer import train
from tests.trainers.tiny import base_model, leave, with_lora

_init = accelerate.state.AcceleratorState.__init__


def _init_with_fsdp(self: Any, *arguments: Any, fsdp_plugin: Any = None, **settings: Any) -> None:
    _init(self, *arguments, fsdp_plugin=fsdp_plugin, **settings)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
    if self.__dict__.get("fsdp_plugin") is not None:  # again at each call: a later AcceleratorState() takes it away
        self.distributed_type = DistributedType.FSDP


def write(run: str, base: str, out: Path, model: Any, kind: str) -> None:
    config = {"version": 2, "state_dict_type": kind, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    train(run, base, out, model, fsdp="full_shard auto_wrap", fsdp_config=config, save_steps=5, eval_steps=5)


if __name__ == "__main__":
    accelerate.state.AcceleratorState.__init__ = _init_with_fsdp  # type: ignore[method-assign]
    base, out = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    write("sharded", base, out, base_model(base), "SHARDED_STATE_DICT")
    write("full", base, out, base_model(base), "FULL_STATE_DICT")
    write("lora-sharded", base, out, with_lora(base_model(base)), "SHARDED_STATE_DICT")
    write("lora-full", base, out, with_lora(base_model(base)), "FULL_STATE_DICT")
    leave()
