"""Lightning's ModelCheckpoint: the two best and the last; one that saves by steps, with a link to the last; and one
beside a moving average of the weights.

python -m tests.trainers.lightning_fit BASE OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader

from tests.trainers.tiny import base_model, collated, samples, say


class Model(lightning.LightningModule):
    def __init__(self, base: str) -> None:
        super().__init__()
        self.model = base_model(base)

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, number: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-3)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4)}


class Said(lightning.Callback):
    def __init__(self, run: str) -> None:
        self.run = run

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        say(self.run, "save", step=trainer.global_step, epoch=trainer.current_epoch, values=logged)


def fit(run: str, base: str, out: Path, *callbacks: lightning.Callback, **settings: Any) -> None:
    keep = ModelCheckpoint(dirpath=out / run, **settings)
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[keep, Said(run), *callbacks], log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(
        Model(base),
        DataLoader(samples(8), batch_size=2, collate_fn=collated),
        DataLoader(samples(4, seed=1), batch_size=2, collate_fn=collated),
    )


if __name__ == "__main__":
    base, out = sys.argv[1], Path(sys.argv[2])
    named = "{epoch}-{step}-{val_loss:.3f}"
    fit("best", base, out, monitor="val_loss", save_top_k=2, save_last=True, filename=named)
    fit("steps", base, out, every_n_train_steps=3, save_top_k=-1, save_last="link", save_weights_only=True)
    fit("average", base, out, EMAWeightAveraging(decay=0.5), every_n_train_steps=6, filename="{step}")
