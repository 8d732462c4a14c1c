"""accelerate's save_state and save_model, on as many ranks as torchrun started.

two_ranks.py calls it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from tests.trainers.tiny import base_model, collated, samples, say


def write(base: str, out: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = base_model(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    loader = DataLoader(samples(16), batch_size=2, collate_fn=collated)  # four steps on each of two ranks
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    accelerator.save_state(str(out / "accelerate" / "step_4"))
    accelerator.save_model(model, str(out / "accelerate-model"))
    say("accelerate", "save", step=4)
