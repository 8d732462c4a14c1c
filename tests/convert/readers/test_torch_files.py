"""Files of torch.save, whatever stands around the model in them; torch.load and the module itself are the measure."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lorakit.convert.readers.torch_files import COUNTERS, NO_TENSORS, NO_WEIGHTS, OF_EMA, OTHER_MODELS, read
from lorakit.convert.source import Source, numel
from lorakit.errors import Refused, UsageError
from tests.models import CONFIGS

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    made: LlamaForCausalLM = AutoModelForCausalLM.from_config(CONFIGS["tied-llama"])
    return made


@pytest.fixture
def state(model: LlamaForCausalLM) -> State:
    return dict(model.state_dict())


@pytest.fixture
def average(state: State) -> State:
    return {name: tensor * 0.5 for name, tensor in state.items()}


def content(source: Source) -> State:
    return {name: one.read(0, numel(one)).reshape(one.shape) for name, one in source.tensors.items()}


def same(source: Source, state: State) -> bool:
    found = content(source)
    return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def saved(folder: Path, value: Any, **how: Any) -> Path:
    torch.save(value, folder / "it.pt", **how)
    return folder / "it.pt"


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_state_dict_alone_is_the_model(tmp_path: Path, state: State, new: bool) -> None:
    file = saved(tmp_path, state, _use_new_zipfile_serialization=new)
    source = read(file)
    assert same(source, torch.load(file))
    assert (source.format, source.beside, source.left_out) == ("torch", tmp_path, {})


@pytest.mark.parametrize("name", ["model", "state_dict", "model_state_dict", "net"])
def test_the_model_is_found_among_what_a_training_keeps(
    tmp_path: Path, model: LlamaForCausalLM, state: State, name: str
) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    optimizer.step()
    source = read(saved(tmp_path, {name: state, "optimizer": optimizer.state_dict(), "epoch": 3, "best": 0.1}))
    assert same(source, state)
    assert source.left_out == {NO_WEIGHTS: ("optimizer", "epoch", "best")}


def test_a_module_that_was_saved_as_a_whole_is_its_state(tmp_path: Path, model: LlamaForCausalLM) -> None:
    """Its pickle names transformers' own classes, and none is made."""
    source = read(saved(tmp_path, model))
    assert same(source, dict(model.state_dict()))


def test_what_is_no_tensor_in_a_state_dict_is_listed(tmp_path: Path, state: State) -> None:
    source = read(saved(tmp_path, {**state, "model.version": 2, "extra": None}))
    assert same(source, state)
    assert source.left_out == {NO_TENSORS: ("model.version", "extra")}


def test_a_tensor_that_is_more_than_its_bytes_is_refused(tmp_path: Path, state: State) -> None:
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(Refused, match=r"'model.wrong' is a torch"):
        read(saved(tmp_path, {**state, "model.wrong": sparse}))


def in_order(average: State) -> dict[str, Any]:
    return {"decay": 0.99, "num_updates": 4, "shadow_params": list(average.values())}


def in_ema_pytorch(state: State, average: State) -> dict[str, Any]:
    """As lucidrains' EMA is a module of both."""
    both = {"ema_model": average, "online_model": state}
    inner = {f"{place}.{name}": one for place, held in both.items() for name, one in held.items()}
    return {"initted": torch.tensor(True), "step": torch.tensor([5]), **inner}


def in_lit_ema(average: State) -> dict[str, Any]:
    """As stable-diffusion's LitEma keeps it: in buffers, whose names have no dots."""
    counters = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    return counters | {f"model_ema.{name.replace('.', '')}": one for name, one in average.items()}


@pytest.mark.parametrize(
    "around",
    [
        lambda state, average: {"state_dict": state, "ema": average},
        lambda state, average: {"model": state, "model_ema": {"state_dict": average, "decay": 0.9}},
        lambda state, average: {"model": state, "ema_model": {"module": average}},
        lambda state, average: {"model": state, "ema": in_order(average)},
        lambda state, average: {"state_dict": state, "callbacks": {"EMACallback{'decay': 1}": {"ema": average}}},
        lambda state, average: {"state_dict": state | {f"ema_model.{name}": average[name] for name in average}},
        lambda state, average: {"state_dict": average, "current_model_state": state},
        lambda state, average: {"model": state, "ema": in_ema_pytorch(state, average)},
        lambda state, average: {"state_dict": {f"net.{name}": state[name] for name in state} | in_lit_ema(average)},
    ],
    ids=["ema", "model_ema", "nested", "list", "callback", "inside", "lightning", "ema_pytorch", "lit_ema"],
)
def test_the_moving_average_is_taken_when_it_is_asked_for(
    tmp_path: Path, state: State, average: State, around: Any
) -> None:
    file = saved(tmp_path, around(state, average))
    found, averaged = read(file), read(file, weights="ema")
    prefix = next(iter(found.tensors)).removesuffix(next(iter(state)))
    assert same(found, {f"{prefix}{name}": one for name, one in state.items()})
    prefix = next(iter(averaged.tensors)).removesuffix(next(iter(state)))
    assert same(averaged, {f"{prefix}{name}": one for name, one in average.items()})
    assert averaged.notes[0].startswith("the weights are those of '")


def test_an_average_that_was_not_asked_for_is_listed(tmp_path: Path, state: State, average: State) -> None:
    source = read(saved(tmp_path, {"model": state, "ema": average, "step": 3}))
    assert source.left_out == {OF_EMA: ("ema",), NO_WEIGHTS: ("step",)}


def test_without_an_average_what_there_is_is_named(tmp_path: Path, state: State) -> None:
    with pytest.raises(UsageError, match="it has model, optimizer"):
        read(saved(tmp_path, {"model": state, "optimizer": {}}), weights="ema")


def test_a_list_of_other_tensors_is_no_average(tmp_path: Path, state: State) -> None:
    with pytest.raises(Refused, match="list of 2 tensors"):
        read(saved(tmp_path, {"model": state, "ema": {"shadow_params": [torch.ones(2), torch.ones(3)]}}), weights="ema")


def test_a_file_without_a_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="holds no model"):
        read(saved(tmp_path, {"optimizer": {"state": {}}, "step": 1}))


def test_a_folder_holds_one_model(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "weights.pt")
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.pt")
    assert same(read(tmp_path), state)
    torch.save(copy.deepcopy(state), tmp_path / "second.pt")
    with pytest.raises(Refused, match=r"second\.pt, weights\.pt: name the file"):
        read(tmp_path)


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_what_torch_averages_is_the_model_without_its_counter(
    tmp_path: Path, model: LlamaForCausalLM, weights: str
) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    states = {"model": averaged.state_dict(), "ema": {"ema_model": averaged.state_dict()}}
    source = read(saved(tmp_path, states["model"] if weights == "model" else states["ema"]), weights=weights)
    assert source.left_out == {COUNTERS: ("n_averaged",)}
    module = averaged.module.state_dict()
    assert same(source, {f"module.{name}": one for name, one in module.items()})


def test_of_several_averages_none_is_guessed(tmp_path: Path, state: State, average: State) -> None:
    file = saved(tmp_path, {"model": state, "ema": average, "model_ema": {**state}})
    with pytest.raises(Refused, match="several moving averages, ema, model_ema"):
        read(file, weights="ema")
    assert same(read(file), state)


def test_other_models_in_the_file_are_listed(tmp_path: Path, state: State, average: State) -> None:
    source = read(saved(tmp_path, {"model": state, "net": average, "teacher": {**average}, "step": 3}))
    assert same(source, state)
    assert source.left_out == {OTHER_MODELS: ("net", "teacher"), NO_WEIGHTS: ("step",)}
    assert source.notes == ("the weights are those of 'model'",)


@pytest.mark.parametrize(
    "around",
    [
        lambda state: {"checkpoint": state},
        lambda state: {"actor": state, "optimizer": {"state": state}, "epoch": 3},
        lambda state: {"state": {"model": state}},
    ],
)
def test_the_only_state_dict_is_the_model_whatever_it_is_called(tmp_path: Path, state: State, around: Any) -> None:
    value = around(state)
    source = read(saved(tmp_path, value))
    assert same(source, state)
    assert source.notes[0].startswith(f"the weights are those of '{next(iter(value))}")


def test_of_several_state_dicts_of_unknown_names_none_is_guessed(tmp_path: Path, state: State, average: State) -> None:
    with pytest.raises(Refused, match="several state dicts, actor, critic"):
        read(saved(tmp_path, {"actor": state, "critic": average}))
