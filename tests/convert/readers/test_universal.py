"""DeepSpeed's universal checkpoints: the model that was trained, whatever number of ranks it was trained on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.convert.readers.universal import read
from lorakit.errors import Incomplete, InvalidFile, NotFound, UsageError
from tests.convert.readers.same import ensure_gives
from tests.trainers.written import PROGRAMS, Trainers, environment


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One as ds_to_universal leaves it: of ZeRO 3 the weights are flat."""
    run = tmp_path / "run"
    (run / "step").mkdir(parents=True)
    (run / "latest_universal").write_text("step")
    for name, weight in weights().items():
        if name != "buffer":
            put(run / "step", name, {"param": weight.reshape(-1) if name == "flat" else weight, "cat_dim": 0})
    module = {"buffer": weights()["buffer"], "flat": torch.empty(0), "rows": weights()["rows"].bfloat16()}
    shapes = [{"flat": torch.Size([3, 4])}, {"rows": torch.Size([2, 5])}]
    torch.save({"module": module, "param_shapes": shapes}, run / "step" / "mp_rank_00_model_states.pt")
    return run


def weights() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    sizes = {"flat": (3, 4), "rows": (2, 5), "buffer": (3,)}
    return {name: torch.randn(size, generator=random) for name, size in sizes.items()}


def put(folder: Path, name: str, value: Any) -> None:
    (folder / "zero" / name).mkdir(parents=True, exist_ok=True)
    torch.save(value, folder / "zero" / name / "fp32.pt")
    torch.save(torch.zeros(1), folder / "zero" / name / "exp_avg.pt")


def made_universal(written: Path, folder: Path, step: str = "step-3") -> Path:
    run = shutil.copytree(written, folder / "copy")
    words = ["--input_folder", run / step, "--output_folder", run / "universal", "--inject_missing_state"]
    subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *map(str, words), "--num_extract_workers", "1",
         "--num_merge_workers", "1"],
        env=environment(PROGRAMS["deepspeed_zero"]), check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    return run / "universal"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_what_deepspeed_makes_universal_is_the_model_that_was_trained(
    trainers: Trainers, stage: int, tmp_path: Path
) -> None:
    written = trainers.wrote("deepspeed_zero").folder / "odd" / f"zero{stage}"
    ensure_gives(read(made_universal(written, tmp_path)), torch.load(written / "whole.pt"))


@pytest.mark.slow
def test_weights_that_deepspeed_takes_for_one_another_are_refused(trainers: Trainers, tmp_path: Path) -> None:
    """With round_robin_gradients it stores them in another order than the one that ds_to_universal (0.19.8) reads."""
    written = trainers.wrote("deepspeed_zero").folder / "odd" / "zero2"
    with pytest.raises(InvalidFile, match="are not those of the model beside them"):
        read(made_universal(written, tmp_path))


def test_weights_have_their_shapes_and_buffers_are_there(folder: Path) -> None:
    for path in (folder, folder / "step"):
        ensure_gives(read(path), weights())


def test_a_weight_alone_is_one_too(folder: Path) -> None:
    put(folder / "step", "flat", weights()["flat"].reshape(-1))
    ensure_gives(read(folder), weights())


def test_of_several_parts_the_weights_are_whole_and_nothing_else_is_taken(folder: Path) -> None:
    shutil.copy(folder / "step" / "mp_rank_00_model_states.pt", folder / "step" / "mp_rank_01_model_states.pt")
    ensure_gives(read(folder), {name: weight for name, weight in weights().items() if name != "buffer"})


def test_weights_that_are_not_those_of_the_model_are_refused(folder: Path) -> None:
    put(folder / "step", "rows", {"param": weights()["rows"].flip(0)})
    with pytest.raises(InvalidFile, match="'rows' are not those of the model"):
        read(folder)


def test_what_is_missing_or_no_weight_is_named(folder: Path) -> None:
    put(folder / "step", "rows", {"step": 3})
    with pytest.raises(InvalidFile, match=r"rows/fp32\.pt holds no weight"):
        read(folder)
    (folder / "step" / "zero" / "rows" / "fp32.pt").unlink()
    with pytest.raises(Incomplete, match=r"rows/fp32\.pt"):
        read(folder)
    (folder / "step" / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(Incomplete, match="model_states"):
        read(folder / "step")


def test_another_folder_is_none(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="zero/"):
        read(tmp_path)
    with pytest.raises(UsageError, match="leave out --weights ema"):
        read(tmp_path, weights="ema")
