"""Has a whole model what its config.json implies? What transformers saves is the measure, and what is taken from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit.convert import whole_model
from lorakit.convert.check import Check
from lorakit.convert.whole_model import LLAMAS, check_model
from lorakit.files.safetensors import Header, StoredTensor
from lorakit.merge.base import BaseModel, read_base

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
OTHERS = ("gpt2", "gpt_neox", "phi3", "olmo2", "cohere", "starcoder2", "qwen3_moe", "mixtral", "bloom", "opt")
Tensors = dict[str, torch.Tensor]


def save(folder: Path, model_type: str, **config: Any) -> Path:
    settings = AutoConfig.for_model(model_type, **{**SIZES, **config})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    return folder


def answers(folder: Path, *, sampled: bool = False) -> dict[str, Check]:
    return {check.name: check for check in check_model(read_base(folder), sampled=sampled)}


def change(folder: Path, how: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    how(tensors)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **said: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | said
    left = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(left))


@pytest.mark.parametrize("model_type", sorted(LLAMAS))
def test_what_transformers_saves_has_all_that_its_config_implies(tmp_path: Path, model_type: str) -> None:
    found = answers(save(tmp_path / "model", model_type))
    assert (found["layers"].ok, found["vocabulary"].ok, found["finite"].ok) == (True, True, True), found
    assert "each of what config.json implies" in str(found["layers"].reason)


@pytest.mark.parametrize("model_type", OTHERS)
def test_of_what_is_not_known_so_well_nothing_whole_is_called_broken(tmp_path: Path, model_type: str) -> None:
    found = answers(save(tmp_path / "model", model_type))
    assert (found["layers"].ok, found["vocabulary"].ok) == (True, True), found


@pytest.mark.parametrize("tied", [False, True])
def test_each_tensor_that_is_missing_or_of_another_shape_is_told(tmp_path: Path, tied: bool) -> None:
    folder = save(tmp_path / "model", "llama", tie_word_embeddings=tied)
    whole = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in whole) is not tied
    for name in whole:
        change(folder, lambda tensors, name=name: tensors.pop(name))
        assert not all(check.ok is not False for check in answers(folder).values()), name
        save_file({**whole, name: whole[name][1:].contiguous()}, folder / "model.safetensors")
        assert not all(check.ok is not False for check in answers(folder).values()), name
        save_file(whole, folder / "model.safetensors")


def test_a_shape_that_all_layers_share_is_told_by_the_config_or_by_the_tensors_beside_it(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    change(folder, lambda ts: ts.update({name: ts[name][:4].clone() for name in ts if "q_proj" in name}))
    assert "layer 0's self_attn.q_proj.weight is [4, 16]" in str(answers(folder)["layers"].reason)
    configure(folder, head_dim=None, num_attention_heads=None)
    assert "imply [16, 4]" in str(answers(folder)["layers"].reason)


def test_layers_that_are_not_there_are_told_of_any_model(tmp_path: Path) -> None:
    for gone, model_type in ((2, "gpt2"), (0, "gpt_neox"), (1, "llama")):
        folder = save(tmp_path / model_type, model_type)
        change(folder, lambda ts, gone=gone: [ts.pop(name) for name in list(ts) if f".{gone}." in name])
        layers = answers(folder)["layers"]
        assert (layers.ok, f"layer {gone} is not there" in str(layers.reason)) == (False, True)


def test_layers_that_differ_may_be_meant_so_in_models_that_are_not_known(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "gpt_neox")
    change(folder, lambda ts: ts.pop(next(name for name in ts if ".1.mlp" in name)))
    layers = answers(folder)["layers"]
    assert (layers.ok, layers.reason) == (
        None, "layer 1 has other tensors, or of other shapes, than layer 0, as some models want it",
    )  # fmt: skip


def test_a_config_that_says_too_little_leaves_it_open(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    configure(folder, num_hidden_layers=None)
    assert answers(folder)["layers"].ok is None


def test_other_tensors_than_a_models_are_none(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    found = answers(folder)
    assert (found["layers"].ok, found["vocabulary"].ok) == (False, False)
    configure(folder, model_type="something-new")
    found = answers(folder)
    assert (found["layers"].ok, found["vocabulary"].ok) == (None, None)


def test_numbers_far_within_a_tensor_are_looked_at_unless_it_says_that_it_samples(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    far = torch.ones(40_000)
    far[30_000] = torch.nan
    change(folder, lambda ts: ts.update({"model.big": far}))
    assert answers(folder)["finite"].reason == "'model.big' holds NaN or infinity"
    sampled = answers(folder, sampled=True)["finite"]
    assert (sampled.ok, str(sampled.reason).startswith("sampled: ")) == (True, True)


def test_a_file_of_nothing_but_zeros_was_never_filled(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    change(folder, lambda ts: ts.update({name: value * 0 for name, value in ts.items()}))
    assert answers(folder)["filled"].ok is False
    assert answers(folder, sampled=True)["filled"].ok is None


def test_an_index_is_spoken_of_where_there_is_one(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    assert "index" not in str(answers(folder)["readable"].reason)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    found = answers(tmp_path / "sharded")
    assert "all that its index names" in str(found["readable"].reason)
    assert found["layers"].ok


def test_a_quantised_model_has_tensors_of_other_names_and_shapes(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    configure(folder, quantization_config={"quant_method": "gptq", "bits": 4})

    def quantise(tensors: Tensors) -> None:
        for name in [name for name in tensors if "proj" in name or "lm_head" in name]:
            tensors[name.removesuffix("weight") + "qweight"] = tensors.pop(name)[:2].clone()

    change(folder, quantise)
    found = answers(folder)
    assert (found["layers"].ok, found["vocabulary"].ok) == (True, True), found


ODD_VALUES = (None, True, -1, 0, 10**30, "3", [3], {"a": 1}, 1.5)


@given(st.dictionaries(st.sampled_from([*SIZES, "tie_word_embeddings", "text_config", "architectures", "model_type"]),
                       st.sampled_from(ODD_VALUES)))  # fmt: skip
def test_whatever_a_config_says_there_is_an_answer(said: dict[str, Any]) -> None:
    shapes = {"lm_head.weight": (), "model.embed_tokens.weight": (3, 2), "model.norm.weight": (2,),
              "model.layers.0.input_layernorm.weight": (3,)}  # fmt: skip
    tensors = {name: StoredTensor(name, Path("a"), "F32", shape, 0, 0) for name, shape in shapes.items()}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **said}
    model = BaseModel("a", Path("a"), config, (Header(Path("a"), 0, 0, tensors, {}),), None, ())
    assert whole_model._layers(model).reason
    assert whole_model._vocabulary(model).reason
