"""Files of one model by rank: which are one checkpoint, and which of them are missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakit.checkpoints.finished import look_at
from lorakit.checkpoints.recognise import recognise
from lorakit.checkpoints.writers.fsdp_ranks import ranked


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["model_world_size_2_rank_1.pt", "model_world_size_2_rank_0.pt", "optim_world_size_2_rank_0.pt"], []),
        (["model_world_size_3_rank_1.pt"], ["model_world_size_3_rank_0.pt", "model_world_size_3_rank_2.pt"]),
        (["model-rank0.pth", "model-rank2.pth"], ["model-rank1.pth"]),
        (["rank_0.bin", "rank_1.bin"], []),
    ],
)
def test_ranks_are_counted_by_their_names(names: list[str], missing: list[str]) -> None:
    found = ranked(names)
    assert found is not None
    assert list(found.names) == sorted(name for name in names if not name.startswith("optim"))
    assert list(found.missing) == missing


@pytest.mark.parametrize(
    "names",
    [
        ["model.pt", "rng_state_0.pth", "random_states_0.pkl"],
        ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"],
        ["model_world_size_2_rank_0.pt", "model_world_size_4_rank_0.pt"],
        ["model_rank_999999.pt"],
        ["model_rank_0.json"],
    ],
)
def test_other_files_are_no_ranks_of_one_model(names: list[str]) -> None:
    assert ranked(names) is None


def test_a_folder_of_ranks_is_one_checkpoint_and_incomplete_without_one_of_them(tmp_path: Path) -> None:
    for what in ("model", "optim", "extra_state"):
        for rank in (0, 1):
            torch.save({"w": torch.ones(2)}, tmp_path / f"{what}_world_size_2_rank_{rank}.pt")
    found = recognise(tmp_path)
    assert found is not None
    assert (found.writer, found.kind, len(found.files)) == ("fsdp", "regular", 6)
    assert found.holds == ("model", "optimizer", "scheduler", "rng")
    (tmp_path / "model_world_size_2_rank_1.pt").unlink()
    look = look_at(tmp_path)
    assert look.state == "incomplete"
    assert "model_world_size_2_rank_1.pt" in str(look.reason)
