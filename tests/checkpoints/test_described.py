"""What a checkpoint is, for the store."""

from __future__ import annotations

from pathlib import Path

import torch

from lorakit.checkpoints.described import describe
from tests.checkpoints.written import evaluated, write_checkpoint, write_model_checkpoint
from tests.folders import write_adapter


def test_a_trainers_checkpoint_by_its_files_and_its_log(tmp_path: Path) -> None:
    log = [evaluated(5, 0.5, eval_bleu=2.0)]
    said = describe(write_checkpoint(tmp_path / "a" / "checkpoint-5", log, base_model_name_or_path="org/base"), "a")
    assert (said.kind, said.writer, said.step, said.base, said.rank) == ("adapter", "transformers", 5, "org/base", 2)
    assert (said.facts.eval_loss, said.facts.eval_step, said.place) == (0.5, 5, "step")


def test_a_whole_model_and_a_single_file(tmp_path: Path) -> None:
    assert describe(write_model_checkpoint(tmp_path / "checkpoint-5"), "a").kind == "regular"
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "step_7.pt")
    said = describe(tmp_path / "step_7.pt", "a")
    assert (said.kind, said.writer, said.step) == ("regular", "torch", 7)


def test_a_runs_last_save_is_its_final_one(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "sql")
    assert (describe(folder, "sql", final=True).place, describe(folder, "sql").place) == ("final", "plain")
