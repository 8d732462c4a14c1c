"""One pair of ranks for all that torch alone writes with several: starting one takes longer than training.

python -m torch.distributed.run --nproc_per_node 2 -m tests.trainers.two_ranks BASE OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from tests.trainers import accelerate_state, dcp, hf_trainer, sharded
from tests.trainers.tiny import leave

if __name__ == "__main__":
    base, out = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    dcp.write(base, out)
    sharded.write(base, out / "sharded")
    accelerate_state.write(base, out)
    hf_trainer.lora(base, out / "ranks", save_total_limit=None)
    leave()
