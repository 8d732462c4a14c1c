"""What a config describes: the names and shapes that transformers itself writes for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, Qwen2_5_VLConfig

import lorakit
from lorakit.convert import expected as module
from lorakit.convert.expected import architecture_of, expected_like, expected_of
from lorakit.errors import InvalidFile, Refused
from lorakit.merge.base import read_base
from tests.models import CONFIGS, make_base

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 8, "num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2}
TYPES = ("llama", "gpt2", "qwen3", "gemma3_text", "gpt_neox", "phi3", "bloom", "opt", "qwen3_moe", "mixtral", "olmoe")


def saved(folder: Path, model_type: str) -> dict[str, torch.Tensor]:
    config = AutoConfig.for_model(model_type, **SIZES, **(EXPERTS if "mo" in model_type or "mix" in model_type else {}))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return dict(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("model_type", TYPES)
def test_the_names_and_shapes_on_disk_are_those_that_transformers_writes(tmp_path: Path, model_type: str) -> None:
    written = saved(tmp_path, model_type)
    expected = expected_of(tmp_path, json.loads((tmp_path / "config.json").read_text()))
    shapes = {name: part.shape for name, part in expected.stored.items() if part.whole not in expected.tied}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in written.items()}


def test_the_parts_of_fused_experts_are_where_they_begin(tmp_path: Path) -> None:
    written = saved(tmp_path, "qwen3_moe")
    model = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    expected = expected_of(tmp_path, json.loads((tmp_path / "config.json").read_text()))
    assert len(expected.stored) > len(model)
    for name, part in expected.stored.items():
        elements = model[part.whole].reshape(-1)[part.begin : part.begin + written[name].numel()]
        assert torch.equal(elements.reshape(part.shape), written[name]), name


def test_the_moved_names_of_a_model_that_sees_are_known(tmp_path: Path) -> None:
    text = {key: SIZES[key] for key in SIZES if not key.startswith("head")} | {"hidden_size": 32}
    sees = {"depth": 1, "hidden_size": 32, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    model = AutoModelForImageTextToText.from_config(Qwen2_5_VLConfig(text_config=text, vision_config=sees))
    model.save_pretrained(tmp_path)
    expected = expected_of(tmp_path, json.loads((tmp_path / "config.json").read_text()))
    assert expected.shapes.keys() == model.state_dict().keys()
    assert expected.stored.keys() - expected.tied.keys() == load_file(tmp_path / "model.safetensors").keys()


def test_a_tied_head_is_known_by_both_names(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "tied-llama")
    by_class = expected_of(base, json.loads((base / "config.json").read_text()))
    by_files = expected_like(read_base(base))
    for expected in (by_class, by_files):
        assert expected.tied == {"lm_head.weight": "model.embed_tokens.weight"}
        assert expected.tables == {"lm_head.weight", "model.embed_tokens.weight"}
    assert by_class.shapes == by_files.shapes


def test_what_transformers_does_not_know_is_not_guessed(tmp_path: Path) -> None:
    for config in (
        {"model_type": "of_ours", "architectures": ["OursForCausalLM"]},
        {"model_type": "llama", "architectures": ["MyOwnLlama"]},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            Refused, match=rf"has no model of type '{config['model_type']}'.*'{config['architectures'][0]}'"
        ):
            expected_of(tmp_path, config)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path) -> None:
    config = {"model_type": "of_ours", "architectures": ["OursForCausalLM"], "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(Refused, match="no code of a checkpoint is run"):
        expected_of(tmp_path, config)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("named", "right"),
    [
        (["LlamaForCausalLM"], "LlamaForCausalLM"),
        (["FSDPLlamaForCausalLM"], "LlamaForCausalLM"),
        (["PeftModelForCausalLM"], "LlamaForCausalLM"),
        (["LlamaForSequenceClassification"], "LlamaForSequenceClassification"),
        (["OursForCausalLM"], "OursForCausalLM"),
        (None, "LlamaForCausalLM"),
    ],
)
def test_a_wrappers_name_is_no_architecture(named: Any, right: str) -> None:
    assert architecture_of({"model_type": "llama", "architectures": named}) == right


def test_a_model_of_the_same_type_says_the_architecture() -> None:
    like = {"model_type": "llama", "architectures": ["LlamaForTokenClassification"]}
    assert architecture_of({"model_type": "llama"}, like) == "LlamaForTokenClassification"
    assert architecture_of({"model_type": "gpt2"}, like) == CONFIGS["gpt2"].architectures or "GPT2LMHeadModel"


def configured(folder: Path, **said: Any) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(said))
    return said


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_attention_heads": 5}, "hidden size"),
        ({"vocab_size": "x"}, "vocab_size"),
        ({"dtype": 5}, "dtype|int"),
        ({"hidden_size": -96}, "."),
    ],
)
def test_what_is_wrong_with_a_config_is_said(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    sizes = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_attention_heads": 4}
    config = configured(tmp_path, **sizes | wrong)
    with pytest.raises(InvalidFile, match=rf"config.json' describes no LlamaForCausalLM .*\(.*({said}).*\)"):
        expected_of(tmp_path, config)


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("Qwen2MoeForCausalLM", {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 20480}),
        (
            "Gemma3nForCausalLM",
            {"model_type": "gemma3n_text", "vocab_size_per_layer_input": 262144, "num_kv_shared_layers": 0},
        ),
        ("DogeForCausalLM", {"model_type": "doge", "num_experts": 16384, "is_moe": True}),
    ],
)
def test_sizes_of_models_that_there_are_are_no_attack(tmp_path: Path, architecture: str, sizes: dict[str, Any]) -> None:
    small = {key: value for key, value in SIZES.items() if not key.endswith("token_id")}
    config = configured(tmp_path, architectures=[architecture], **small, **sizes)
    assert expected_of(tmp_path, config).shapes


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("SwinModel", {"model_type": "swin", "depths": [2, 10**9, 2, 2]}),
        ("MusicgenForCausalLM", {"model_type": "musicgen_decoder", "num_codebooks": 10**9}),
        ("LlamaForCausalLM", {"model_type": "llama", "num_hidden_layers": 10**9}),
        ("LlamaForCausalLM", {"model_type": "llama", "num_hidden_layers": 19_999}),
    ],
)
def test_a_model_without_end_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, sizes: dict[str, Any]
) -> None:
    monkeypatch.setattr(module, "MOST_MADE", 1000)
    config = configured(tmp_path, architectures=[architecture], hidden_size=32, num_attention_heads=4, **sizes)
    with pytest.raises(InvalidFile, match="no model has"):
        expected_of(tmp_path, config)


def test_what_is_computed_for_files_is_known_by_its_name_there_and_is_no_part(tmp_path: Path) -> None:
    """HRM's files hold gate and up in one, and in memory they are two."""
    config = AutoConfig.for_model("hrm_text", **SIZES)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    expected = expected_of(tmp_path, json.loads((tmp_path / "config.json").read_text()))
    written = load_file(tmp_path / "model.safetensors")
    assert {name: part.shape for name, part in expected.stored.items()} == {
        name: tuple(tensor.shape) for name, tensor in written.items()
    }
    computed = {name for name, part in expected.stored.items() if part.whole is None}
    assert any("gate_up_proj" in name for name in computed)
    lorakit.convert(tmp_path, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == written.keys()
    torch.save(model.state_dict(), tmp_path / "out" / "step.pt")
    lorakit.convert(tmp_path / "out" / "step.pt", tmp_path / "again")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
