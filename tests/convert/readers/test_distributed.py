"""torch.distributed.checkpoint: what two ranks saved is the model that they trained, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lorakit.convert.readers.distributed import SHARDING, read
from lorakit.errors import Conflict, Incomplete, InvalidFile, NotFound, Refused, UsageError
from tests.convert.readers.same import ensure_gives
from tests.trainers.written import Trainers

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def sharded(trainers: Trainers) -> Path:
    return trainers.wrote("two_ranks").folder / "sharded"


def saved(folder: Path, state: dict[str, Any]) -> Path:
    dcp.save(state, checkpoint_id=folder)
    return folder


@pytest.mark.parametrize(("run", "prefix"), [("rows", "app.model."), ("columns", "model.")])
def test_what_fsdp_saved_is_the_model_that_was_trained(trainers: Trainers, run: str, prefix: str) -> None:
    folder = sharded(trainers)
    ensure_gives(read(folder / run / "step-2"), torch.load(folder / f"{run}.pt"), prefix)


@pytest.mark.parametrize("run", ["ddp", "fsdp", "fsdp-async"])
def test_it_is_what_torchs_own_converter_makes_of_it(trainers: Trainers, run: str, tmp_path: Path) -> None:
    folder = trainers.wrote("two_ranks").folder / run / "step-2"
    dcp_to_torch_save(folder, tmp_path / "whole.pt")
    ensure_gives(read(folder), torch.load(tmp_path / "whole.pt")["model"], "model.")


def test_a_state_dict_alone_keeps_its_names(trainers: Trainers) -> None:
    run = trainers.wrote("two_ranks").folder
    names = read(run / "ddp" / "step-2").tensors
    found = read(run / "ddp-model" / "step-2")
    assert {f"model.{name}" for name in found.tensors} == set(names)
    assert not found.left_out


def test_optimizer_and_counters_are_left_out_and_named(trainers: Trainers) -> None:
    found = read(sharded(trainers) / "rows" / "step-2")
    resumed, no_tensors = (set(names) for names in found.left_out.values())
    assert {name.split(".")[1] for name in resumed} == {"optimizer"}
    assert "app.optimizer.state.model.norm.weight.exp_avg" in resumed
    assert "step" in no_tensors


def test_shards_of_safetensors_are_what_torch_consolidates(trainers: Trainers) -> None:
    folder = sharded(trainers) / "huggingface"
    consolidated: dict[str, torch.Tensor] = {}
    for file in (folder / "both").glob("model-*.safetensors"):
        consolidated |= load_file(file)
    ensure_gives(read(folder / "shards"), consolidated)
    ensure_gives(read(folder / "both" / "sharded"), torch.load(folder.parent / "rows.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("run", ["sharded", "lora-sharded"])
def test_a_checkpoint_of_the_trainer_with_fsdp_has_one_in_it(trainers: Trainers, run: str, tmp_path: Path) -> None:
    checkpoint = trainers.wrote("fsdp_trainer").folder / run / "checkpoint-10"
    dcp_to_torch_save(checkpoint / "pytorch_model_fsdp_0", tmp_path / "whole.pt")
    ensure_gives(read(checkpoint), torch.load(tmp_path / "whole.pt")["model"], "model.")


def test_the_average_of_the_weights_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    model, average = {"w": torch.arange(4.0)}, {"w": torch.ones(4)}
    folder = saved(tmp_path / "step", {"model": model, "ema": average, "optim": {"w": torch.zeros(4)}, "epoch": 3})
    ensure_gives(read(folder), {"model.w": model["w"]})
    ensure_gives(read(folder, weights="ema"), {"ema.w": average["w"]})
    assert sorted(name for names in read(folder).left_out.values() for name in names) == ["ema.w", "epoch", "optim.w"]
    with pytest.raises(UsageError, match="only model"):
        read(saved(tmp_path / "plain", {"model": model}), weights="ema")


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="only optimizer"):
        read(saved(tmp_path / "step", {"optimizer": {"w": torch.zeros(4)}}))


def test_of_several_models_one_has_to_be_named(tmp_path: Path) -> None:
    for number in range(2):
        saved(tmp_path / f"pytorch_model_fsdp_{number}", {"model": {"w": torch.full((3,), float(number))}})
    with pytest.raises(Refused, match=r"several models.*name the folder"):
        read(tmp_path)
    ensure_gives(read(tmp_path / "pytorch_model_fsdp_1"), {"model.w": torch.ones(3)})


def test_the_config_is_looked_for_around_the_folder(tmp_path: Path) -> None:
    saved(tmp_path / "pytorch_model_fsdp_0", {"model": {"w": torch.ones(3)}})
    assert read(tmp_path).beside is None
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert read(tmp_path).beside == tmp_path
    assert read(tmp_path / "pytorch_model_fsdp_0").beside == tmp_path


def test_a_folder_without_metadata_was_not_finished(trainers: Trainers, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded(trainers) / "rows" / "step-2", tmp_path / "step")
    (folder / ".metadata").unlink()
    with pytest.raises(NotFound, match=r"\.metadata"):
        read(folder)


def test_a_ranks_file_that_is_cut_short_or_gone_is_named(trainers: Trainers, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded(trainers) / "rows" / "step-2", tmp_path / "step")
    found = read(folder)
    file = folder / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(Conflict, match="written again"):
        found.ensure_unchanged()
    with pytest.raises(InvalidFile, match=r"__1_0\.distcp' is cut short"):
        read(folder)
    file.unlink()
    with pytest.raises(NotFound, match=r"lacks __1_0\.distcp"):
        read(folder)


def written_shards(folder: Path, *offsets: Any) -> Path:
    """Two rows of three columns a shard, each said to begin where it should be."""
    folder.mkdir()
    for number, at in enumerate(offsets, 1):
        metadata = {} if at is None else {SHARDING: json.dumps({"w": {"saved_offsets": at}})}
        save_file({"w": torch.ones(2, 3)}, folder / f"shard-0000{number}-model-00001-of-00001.safetensors", metadata)
    return folder


@pytest.mark.parametrize(
    ("offsets", "reason"),
    [
        ([[0, 0], [1, 0]], "are not the whole of it"),
        ([[0, 0], [3, 0]], "are not the whole of it"),
        ([[0, 0], [2]], "begins at"),
        ([[0, 0], [2, -3]], "begins at"),
        ([[0, 0], None], "does not say what of"),
        ([[0, 0], 7], "can't be read"),
    ],
)
def test_shards_that_contradict_one_another_are_refused(tmp_path: Path, offsets: list[Any], reason: str) -> None:
    assert read(written_shards(tmp_path / "good", [2, 0], [0, 0])).tensors["w"].shape == (4, 3)
    with pytest.raises(InvalidFile, match=reason):
        read(written_shards(tmp_path / "bad", *offsets))


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = written_shards(tmp_path / "shards", [0, 0], [2, 0], [4, 0])
    (folder / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(Incomplete, match="none of rank 2"):
        read(folder)
