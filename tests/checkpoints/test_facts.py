"""Steps, epochs and losses from wherever a writer keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.checkpoints.facts import number_in
from lorakit.checkpoints.metadata import Metadata, checkpoints_in, metadata_of
from lorakit.checkpoints.places import LocalPlace
from lorakit.checkpoints.writers.torch_keys import keys_in
from tests.checkpoints.writings import torch_bytes
from tests.folders import write_adapter

NAME = "epoch=1-step=16-val_loss=1.013.ckpt"


def row_of(file: Path, **said: Any) -> Metadata:
    value = {"pytorch-lightning_version": "2.6.6", "state_dict": {"w": torch.zeros(2)}, "epoch": 1, "global_step": 16}
    file.write_bytes(torch_bytes({**value, **said}))
    (candidate,) = checkpoints_in(file)
    return metadata_of(candidate)


def checkpointing(**state: Any) -> dict[str, Any]:
    return {"callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": {"monitor": "val_loss", **state}, "Other": {}}}


def test_a_lightning_file_says_its_step_epoch_and_the_loss_that_it_was_kept_for(tmp_path: Path) -> None:
    scores = {"/gone/epoch=0-step=8.ckpt": torch.tensor(2.0), f"/gone/{NAME}": torch.tensor(1.0125)}
    row = row_of(tmp_path / NAME, **checkpointing(best_k_models=scores, best_model_score=torch.tensor(0.5)))
    assert (row.step, row.epoch, row.kind, row.state) == (16, 1.0, "regular", "finished")
    assert (row.eval_loss, row.eval_step) == (pytest.approx(1.0125), 16)
    assert row.metric("eval_loss") == row.metric("val_loss")


def test_the_best_score_counts_for_the_best_file_alone(tmp_path: Path) -> None:
    best = {"best_model_path": f"/x/{NAME}", "best_model_score": torch.tensor(0.5)}
    assert row_of(tmp_path / NAME, **checkpointing(**best)).eval_loss == 0.5
    other = row_of(tmp_path / "last.ckpt", **checkpointing(**best))
    assert (other.step, other.eval_loss, other.metrics) == (16, None, {})


def test_another_metric_is_no_loss(tmp_path: Path) -> None:
    state = {"monitor": "accuracy", "best_k_models": {NAME: torch.tensor(0.75)}}
    row = row_of(tmp_path / NAME, callbacks={"ModelCheckpoint": state})
    assert (row.eval_loss, row.metrics) == (None, {"accuracy": 0.75})


@pytest.mark.parametrize(
    "callbacks",
    [None, [], {"a": 1}, {"a": {"monitor": 3}}, {"a": {"monitor": "x"}},
     {"a": {"monitor": "x", "best_k_models": {5: 1}, "best_model_path": None}}],
)  # fmt: skip
def test_callbacks_that_say_nothing_give_no_metric(tmp_path: Path, callbacks: Any) -> None:
    assert row_of(tmp_path / NAME, callbacks=callbacks).metrics == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numbers_are_read_out_of_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {"one": torch.tensor(1.5, dtype=dtype), "many": torch.zeros(2, dtype=dtype)}
    (tmp_path / "a.pt").write_bytes(torch_bytes(values))
    said = keys_in(LocalPlace(tmp_path), "a.pt")
    assert (number_in(said["one"]), number_in(said["many"])) == (1.5, None)


def test_ranks_of_adapters_in_torch_files_are_known(tmp_path: Path) -> None:
    lora = {
        "q.lora_A.weight": torch.zeros(3, 8),
        "v.lora_A.weight": torch.zeros(5, 8),
        "q.lora_B.weight": torch.zeros(8, 3),
    }
    row = row_of(tmp_path / NAME, state_dict=lora)
    assert (row.kind, row.rank) == ("adapter", 5)


def test_torchtunes_own_state_says_the_epoch(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "tt" / "epoch_0")
    (folder / "recipe_state.pt").write_bytes(torch_bytes({"epochs_run": 1, "seed": 5, "optimizer": {}}))
    (candidate,) = checkpoints_in(folder)
    row = metadata_of(candidate)
    assert (row.id, row.step, row.epoch, row.kind) == ("tt@epoch_0", None, 1.0, "adapter")
