"""Each checkpoint finds its reader, whatever lies around it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakit.convert.readers import read_source
from lorakit.errors import InvalidFile, NotFound, Refused
from tests.folders import base_tensors, write_base
from tests.trainers.written import Trainers


def state() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(one) for name, one in base_tensors().items()}


@pytest.mark.parametrize("name", ["step.pt", "last.ckpt", "weights.pth", "pytorch_model.bin"])
def test_a_file_is_opened_by_what_it_is(tmp_path: Path, name: str) -> None:
    torch.save({"model": state()}, tmp_path / name)
    source = read_source(tmp_path / name)
    assert (source.format, source.path, set(source.tensors)) == ("torch", tmp_path / name, set(state()))


def test_the_models_own_files_come_before_the_optimizers(trainers: Trainers, tmp_path: Path) -> None:
    """Trainers gather the model beside DeepSpeed's folder; the wider weights are there for who names it."""
    folder = write_base(tmp_path / "checkpoint-5")
    (folder / "global_step5").symlink_to(trainers.wrote("deepspeed_zero").folder / "zero2" / "global_step2")
    source = read_source(folder)
    assert source.format == "huggingface"
    assert f"fp32 master weights are in '{folder / 'global_step5'}'" in source.notes[-1]
    assert read_source(folder / "global_step5").format == "deepspeed"


def test_one_file_of_many_is_not_the_checkpoint(trainers: Trainers) -> None:
    folder = trainers.wrote("deepspeed_zero").folder / "zero3" / "global_step2"
    with pytest.raises(Refused, match=f"name its folder, '{folder}'"):
        read_source(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")


@pytest.mark.parametrize("config", ["run/step/config.json", "run/config.json", "run/step/huggingface/config.json"])
def test_the_nearest_config_belongs_to_it(tmp_path: Path, config: str) -> None:
    for name in (config, "config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"model_type": "llama"}')
    file = tmp_path / "run" / "step" / "step.pt"
    file.parent.mkdir(exist_ok=True)
    torch.save(state(), file)
    assert read_source(file).beside == (tmp_path / config).parent


def test_what_no_reader_knows_is_said(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("nothing")
    with pytest.raises(Refused, match="no checkpoint of a kind that is known"):
        read_source(tmp_path / "notes")
    with pytest.raises(NotFound):
        read_source(tmp_path / "elsewhere")
    write_base(tmp_path / "empty", {})
    with pytest.raises(InvalidFile, match="holds no tensors"):
        read_source(tmp_path / "empty")


@pytest.mark.parametrize("name", ["weights.safetensors", "model.fp16.safetensors"])
def test_safetensors_of_any_name_are_read(tmp_path: Path, name: str) -> None:
    folder = write_base(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / name)
    assert read_source(folder).tensors.keys() == state().keys()


def test_a_models_own_files_come_before_llama_cpps(tmp_path: Path) -> None:
    """Who quantised it there has both, and one is a rounded copy of the other."""
    folder = write_base(tmp_path / "model")
    (folder / "model.Q8_0.gguf").write_bytes(b"GGUF")
    assert read_source(folder).format == "huggingface"


def test_settings_of_other_programs_are_no_config_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"lr": 0.001}')
    (tmp_path / "run" / "step").mkdir(parents=True)
    torch.save(state(), tmp_path / "run" / "step.pt")
    torch.save(state(), tmp_path / "step.pt")
    for file in (tmp_path / "run" / "step.pt", tmp_path / "step.pt"):
        assert read_source(file).beside == file.parent
    (tmp_path / "run" / "config.json").write_text("[")
    assert read_source(tmp_path / "run" / "step.pt").beside == tmp_path / "run"
