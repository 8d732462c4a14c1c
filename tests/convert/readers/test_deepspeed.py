"""DeepSpeed's ZeRO 1, 2 and 3: what two ranks saved is the model that they trained, bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.convert.readers.deepspeed import read
from lorakit.errors import Incomplete, InvalidFile, NotFound, Refused, UsageError
from tests.convert.readers.same import ensure_gives, ensure_same
from tests.convert.readers.state import state_of
from tests.trainers.written import PROGRAMS, Trainers, environment

STAGES = ["zero1", "zero2", "zero3"]


def by_deepspeed(run: Path, out: Path, *words: str) -> dict[str, torch.Tensor]:
    """What the program makes of it that DeepSpeed puts beside its checkpoints."""
    subprocess.run(
        [sys.executable, str(run / "zero_to_fp32.py"), str(run), str(out), *words],
        env=environment(PROGRAMS["deepspeed_zero"]), check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    found: dict[str, torch.Tensor] = torch.load(out / "pytorch_model.bin")
    return found


@pytest.fixture
def written(trainers: Trainers) -> Path:
    return trainers.wrote("deepspeed_zero").folder


OTHERS = ["odd/zero1", "odd/zero3", "odd/zero3-bf16", *STAGES]


@pytest.mark.parametrize("run", ["odd/zero2", *(pytest.param(run, marks=pytest.mark.slow) for run in OTHERS)])
def test_it_is_what_deepspeeds_own_program_makes_of_it(written: Path, run: str, tmp_path: Path) -> None:
    theirs = by_deepspeed(written / run, tmp_path / "out")  # which leaves frozen parameters out in ZeRO 1
    found = read(written / run)
    mine = {name: tensor.float() for name, tensor in state_of(found).items()}
    assert mine.keys() - theirs.keys() == ({"frozen.weight", "frozen.bias"} if run == "odd/zero1" else set())
    ensure_same({name: mine[name] for name in theirs}, {name: tensor.float() for name, tensor in theirs.items()})
    (note,) = found.notes
    assert f"fp32 master weights, from 2 ranks of ZeRO {run.partition('zero')[2][0]}" in note


@pytest.mark.parametrize("run", ["zero0", "zero1", "zero3"])
def test_it_is_the_state_of_the_model_that_was_trained(written: Path, run: str) -> None:
    ensure_gives(read(written / "odd" / run), torch.load(written / "odd" / run / "whole.pt"))


@pytest.mark.parametrize("run", ["zero2", "zero3-bf16"])
def test_what_was_trained_in_16_bit_is_the_master_rounded_once(written: Path, run: str) -> None:
    trained = torch.load(written / "odd" / run / "whole.pt")
    mine = state_of(read(written / "odd" / run))
    assert {tensor.dtype for name, tensor in mine.items() if name.startswith("layers")} == {torch.float32}
    assert {tensor.dtype for name, tensor in mine.items() if name.startswith("frozen")} == {torch.bfloat16}
    ensure_same({name: tensor.to(trained[name].dtype) for name, tensor in mine.items()}, trained)


@pytest.mark.parametrize("run", STAGES)
def test_a_step_and_the_folder_whose_latest_names_it_are_the_same(written: Path, run: str) -> None:
    one, other = read(written / run), read(written / run / "global_step4")
    assert one.states == other.states
    assert read(written / run / "global_step2").states.keys().isdisjoint(one.states)


@pytest.mark.slow
def test_a_checkpoint_of_the_trainer_has_the_step_in_it(trainers: Trainers, tmp_path: Path) -> None:
    checkpoint = trainers.wrote("deepspeed_trainer").folder / "whole" / "checkpoint-10"
    found = read(checkpoint)
    ensure_gives(found, by_deepspeed(checkpoint, tmp_path / "out"))
    assert found.beside == checkpoint


@pytest.mark.parametrize("run", ["odd/zero1", "odd/zero3"])
def test_frozen_parameters_that_were_not_saved_are_not_there(written: Path, run: str) -> None:
    whole = state_of(read(written / run))
    found = read(written / run / "without-frozen")
    ensure_gives(found, {name: tensor for name, tensor in whole.items() if not name.startswith("frozen")})


def test_without_the_optimizers_files_the_models_own_weights_are_read(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written / "odd" / "zero2" / "step-3", tmp_path / "step-3")
    for file in folder.glob("*optim*"):
        file.unlink()
    found = read(folder)
    ensure_gives(found, torch.load(written / "odd" / "zero2" / "whole.pt"))
    assert "those that the model computed with" in found.notes[0]


def test_zero_3_without_the_optimizers_files_has_no_weights(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written / "zero3" / "global_step4", tmp_path / "global_step4")
    for file in folder.glob("*optim*"):
        file.unlink()
    with pytest.raises(Incomplete, match="in optimizer's files that are not there"):
        read(folder)


@pytest.mark.parametrize("which", ["model", "optim"])
def test_a_rank_that_is_missing_is_named(written: Path, which: str, tmp_path: Path) -> None:
    folder = shutil.copytree(written / "zero3" / "global_step4", tmp_path / "global_step4")
    (folder / f"zero_pp_rank_1_mp_rank_00_{which}_states.pt").unlink()
    with pytest.raises(Incomplete, match=r"lacks the file of rank 1, one of 2"):
        read(folder)


@pytest.mark.parametrize("other", ["odd/zero1/step-3", "zero1/global_step2"])
def test_files_of_two_saves_are_refused(written: Path, other: str, tmp_path: Path) -> None:
    folder = shutil.copytree(written / "zero1" / "global_step4", tmp_path / "global_step4")
    for file in (written / other).glob("*optim*"):
        shutil.copy(file, folder)
    with pytest.raises(InvalidFile, match="of two saves"):
        read(folder)


@pytest.mark.parametrize("extra", ["mp_rank_01_model_states.pt", "layer_03-model_00-model_states.pt"])
def test_what_no_rank_has_whole_is_refused_with_the_way(written: Path, extra: str, tmp_path: Path) -> None:
    folder = shutil.copytree(written / "zero1" / "global_step4", tmp_path / "global_step4")
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / extra)
    with pytest.raises(Refused, match="ds_to_universal"):
        read(folder)


@pytest.mark.parametrize("latest", [None, "../zero1/global_step4", "global_step9", ".", "\x00", ""])
def test_latest_names_a_folder_beside_it_or_nothing(tmp_path: Path, latest: str | None) -> None:
    if latest is not None:
        (tmp_path / "latest").write_text(latest)
    with pytest.raises(NotFound, match="name a global_stepN folder"):
        read(tmp_path)


def empty(state: dict[str, Any]) -> None:
    state.clear()


@pytest.mark.parametrize(
    ("which", "change", "reason"),
    [
        ("model", lambda state: state.update(param_shapes=7), "no shapes by name"),
        ("model", lambda state: state.update(param_shapes=[{"w": (1 << 62, 8)}]), "no shape of 'w'"),
        ("model", lambda state: state.update(param_shapes=[{"w": "four"}]), "no shape of 'w'"),
        ("model", lambda state: state["param_shapes"][0].update(more=torch.Size([9999]))   , "end before 'more'"),
        ("optim", empty, "no state of an optimizer"),
        ("optim", lambda state: state["optimizer_state_dict"].clear(), "no fp32 weights"),
    ],
)  # fmt: skip
def test_states_that_lie_are_refused(
    tmp_path: Path, which: str, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    model = {"module": {"w": torch.ones(4)}, "param_shapes": [{"w": torch.Size([4])}], "dp_world_size": 1}
    states = {"model": model, "optim": {"optimizer_state_dict": {"single_partition_of_fp32_groups": [torch.ones(4)]}}}
    names = {"model": "mp_rank_00_model_states.pt", "optim": "zero_pp_rank_0_mp_rank_00_optim_states.pt"}
    for name, state in states.items():
        torch.save(state, tmp_path / names[name])
    ensure_gives(read(tmp_path), {"w": torch.ones(4)})
    change(states[which])
    torch.save(states[which], tmp_path / names[which])
    with pytest.raises(InvalidFile, match=reason):
        read(tmp_path)


def test_a_parameter_under_two_names_has_both(tmp_path: Path) -> None:
    for shared in ({"head": "w"}, [["head", "w"]]):
        model = {"module": {"w": torch.ones(4)}, "param_shapes": [{"w": torch.Size([4])}], "shared_params": shared}
        torch.save(model, tmp_path / "mp_rank_00_model_states.pt")
        ensure_gives(read(tmp_path), {"w": torch.ones(4), "head": torch.ones(4)})


def test_no_pickle_runs(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"module": {"w": torch.ones(4)}, "ds_config": Runs()}, tmp_path / "mp_rank_00_model_states.pt")
    ensure_gives(read(tmp_path), {"w": torch.ones(4)})
    assert not (tmp_path / "ran").exists()


def test_it_has_no_average_of_the_weights(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave out --weights ema"):
        read(tmp_path, weights="ema")
