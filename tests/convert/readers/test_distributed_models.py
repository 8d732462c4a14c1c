"""What several ranks left of a model, converted: transformers says with it what the trained model says, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit
from tests.trainers.written import Trainers

SHARDED = {"rows/step-2": "rows.pt", "columns/step-2": "columns.pt", "ranks/actor": "rows.pt"}
SHARDED |= {"huggingface/shards": "rows.pt", "columns": "columns.pt"}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(40).reshape(2, 20)).logits
    return found


def converted(checkpoint: Path, out: Path, base: Path, dtype: str = "keep") -> torch.Tensor:
    lorakit.convert(checkpoint, out, like=base, dtype=dtype)
    assert len(AutoTokenizer.from_pretrained(out)) == len(AutoTokenizer.from_pretrained(base))
    return logits(AutoModelForCausalLM.from_pretrained(out, dtype="auto"))


@pytest.mark.parametrize("place", SHARDED)
def test_a_model_of_fsdp_says_the_same(trainers: Trainers, place: str, tmp_path: Path) -> None:
    folder = trainers.wrote("two_ranks").folder / "sharded"
    state = torch.load(folder / SHARDED[place])
    trained = AutoModelForCausalLM.from_pretrained(trainers.base, dtype=state["lm_head.weight"].dtype)
    trained.load_state_dict(state)
    assert torch.equal(converted(folder / place, tmp_path / "out", trainers.base), logits(trained))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_model_of_deepspeed_says_the_same(trainers: Trainers, stage: int, tmp_path: Path) -> None:
    written = trainers.wrote("deepspeed_zero").folder
    trained = AutoModelForCausalLM.from_pretrained(trainers.base, dtype=torch.bfloat16 if stage == 2 else torch.float32)
    trained.load_state_dict(torch.load(written / "trained" / f"zero{stage}.pt"))
    dtype = "bf16" if stage == 2 else "keep"  # it was trained in bfloat16, and its master weights are read
    assert torch.equal(converted(written / f"zero{stage}", tmp_path / "out", trainers.base, dtype), logits(trained))
