"""The states of a checkpoint, and copies of some of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lorakit.errors import Conflict, LorakitError, NotFound, OutOfSpace, UsageError
from lorakit.training.states import STATES, copied_from, copy_states, files_of, parse_states
from tests.checkpoints.written import evaluated, write_checkpoint
from tests.disks import small_disk_at


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "run" / "checkpoint-500", [{"step": 500, "loss": 1.5}, evaluated(500, 0.7)])
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth", "training_args.bin"):
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.mark.parametrize(
    ("said", "states"),
    [
        ("model", ("model",)),
        ("optimizer, model", ("model", "optimizer")),
        (["rng", "model"], ("model", "rng")),
        ("all", STATES),
    ],
)
def test_states_are_named_in_any_order(said: str | list[str], states: tuple[str, ...]) -> None:
    assert parse_states(said) == states


@pytest.mark.parametrize("said", ["weights", "", [], "model,", "all,model"])
def test_an_unknown_state_is_an_error_that_lists_them(said: str | list[str]) -> None:
    with pytest.raises(UsageError, match="model, optimizer, scheduler, scaler, rng, trainer_state, and all"):
        parse_states(said)


def test_each_file_belongs_to_one_state(checkpoint: Path) -> None:
    assert files_of(checkpoint) == {
        "model": ["adapter_config.json", "adapter_model.safetensors"],
        "optimizer": ["optimizer.pt"],
        "scheduler": ["scheduler.pt"],
        "rng": ["rng_state_0.pth", "rng_state_1.pth"],
        "trainer_state": ["trainer_state.json", "training_args.bin"],
    }


def test_a_copy_is_of_the_states_that_were_asked_for_and_says_what_it_is(checkpoint: Path) -> None:
    copy = checkpoint.with_name("model_checkpoint-500")
    copy_states(checkpoint, copy, ("model",))
    assert sorted(os.listdir(copy)) == ["adapter_config.json", "adapter_model.safetensors", "lorakit.json"]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (copy / name).read_bytes() == (checkpoint / name).read_bytes()
        assert (copy / name).stat().st_mtime_ns == (checkpoint / name).stat().st_mtime_ns
        assert (copy / name).stat().st_nlink == 1, "no hard link: a trainer may write into the file again"
    said = json.loads((copy / "lorakit.json").read_text())
    assert said["parents"] == [{"path": "checkpoint-500", "step": 500}]
    assert (said["settings"], said["train_loss"], said["eval_loss"]) == ({"states": ["model"]}, 1.5, 0.7)


def test_what_is_not_there_is_left_out_unless_it_is_the_model(checkpoint: Path, tmp_path: Path) -> None:
    copy_states(checkpoint, tmp_path / "all", STATES)
    assert set(os.listdir(tmp_path / "all")) == {*os.listdir(checkpoint), "lorakit.json"}
    (checkpoint / "adapter_model.safetensors").unlink()
    with pytest.raises(NotFound, match="holds optimizer, scheduler, rng, trainer_state, and not model"):
        copy_states(checkpoint, tmp_path / "none", ("model",))
    with pytest.raises(NotFound):
        copy_states(checkpoint, tmp_path / "none", ("scaler",))
    assert not (tmp_path / "none").exists()


def test_nothing_is_ever_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(Conflict):
        copy_states(checkpoint, tmp_path / "there", ("model",))


def test_what_is_no_number_is_null_in_what_a_copy_says(checkpoint: Path) -> None:
    state = checkpoint / "trainer_state.json"
    state.write_text('{"global_step": 500, "log_history": [{"step": 500, "eval_loss": NaN, "loss": Infinity}]}')
    copy = checkpoint.with_name("model_checkpoint-500")
    copy_states(checkpoint, copy, ("model",))
    said = json.loads((copy / "lorakit.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (said["eval_loss"], said["train_loss"], said["eval_step"]) == (None, None, 500)
    assert copied_from(copy) == "checkpoint-500"
    assert copied_from(checkpoint) is None


def test_on_a_full_disk_there_is_no_copy_and_nothing_else_is_lost(checkpoint: Path, tmp_path: Path) -> None:
    with small_disk_at(tmp_path / "small", 8) as disk:
        with pytest.raises((OutOfSpace, LorakitError)):
            copy_states(checkpoint, disk / "model_checkpoint-500", STATES)
        assert os.listdir(disk) == []
    assert "model" in files_of(checkpoint)
