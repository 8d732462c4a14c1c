"""A module path means one stored weight, or none."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
)

from lorakit.merge.families import RENAMES, Rename
from lorakit.merge.resolve import PREFIXES, Resolver, copied_from_base

Q_PROJ = "layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("module", "stored"),
    [
        (f"model.{Q_PROJ}", f"model.{Q_PROJ}"),
        (f"model.{Q_PROJ}", Q_PROJ),
        (Q_PROJ, f"model.{Q_PROJ}"),
        (f"model.language_model.{Q_PROJ}", f"language_model.model.{Q_PROJ}"),
        (f"language_model.model.{Q_PROJ}", f"model.language_model.{Q_PROJ}"),
        (f"module.model.{Q_PROJ}", f"model.{Q_PROJ}"),
        ("transformer.h.0.attn.c_attn", "h.0.attn.c_attn"),
        ("language_model.lm_head", "lm_head"),
        ("lm_head", "language_model.lm_head"),
        (f"model.text_model.{Q_PROJ}", f"text_model.model.{Q_PROJ}"),
        (f"model.{Q_PROJ}", f"thinker.model.{Q_PROJ}"),
        ("model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"),
        ("visual.blocks.0.attn.qkv", "thinker.visual.blocks.0.attn.qkv"),
        ("multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
        ("model.vision_tower.layers.0.fc1", "vision_tower.vision_model.layers.0.fc1"),
        (f"base_model.model.base_model.model.model.{Q_PROJ}", f"model.{Q_PROJ}"),
        (f"module._orig_mod.model.{Q_PROJ}", f"model.{Q_PROJ}"),
        ("model.layers.0._orig_mod.self_attn._fsdp_wrapped_module.q_proj", f"model.{Q_PROJ}"),
    ],
)
def test_a_prefix_may_differ(module: str, stored: str) -> None:
    others = ["vision_tower.layers.0.self_attn.q_proj.weight", "model.norm.weight"]
    assert Resolver([f"{stored}.weight", *others]).weight_of(module) == f"{stored}.weight"


def test_the_same_name_is_taken_before_a_moved_one() -> None:
    assert Resolver([f"{Q_PROJ}.weight", f"model.{Q_PROJ}.weight"]).weight_of(Q_PROJ) == f"{Q_PROJ}.weight"


def test_two_moved_names_are_no_answer() -> None:
    names = [f"{Q_PROJ}.weight", f"language_model.model.{Q_PROJ}.weight"]
    assert Resolver(names).weight_of(f"model.{Q_PROJ}") is None


def test_the_end_of_a_name_alone_is_no_match() -> None:
    assert Resolver([f"vision_tower.{Q_PROJ}.weight"]).weight_of(f"model.{Q_PROJ}") is None


def test_the_nearest_names_are_offered() -> None:
    resolver = Resolver(["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"])
    assert resolver.nearest("model.layers.0.self_attn.qproj") == ["model.layers.0.self_attn.q_proj.weight"]
    assert resolver.nearest("zzz") == []


@pytest.mark.parametrize(
    ("module", "stored"),
    [
        ("model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate"),
        ("model.layers.0.mlp.router", "model.layers.0.block_sparse_moe.gate"),
        ("model.layers.0.block_sparse_moe.experts.3.w1", "model.layers.0.mlp.experts.3.gate_proj"),
        ("model.language_model.layers.0.mlp.experts.3.up_proj", "model.layers.0.block_sparse_moe.experts.3.w3"),
        ("lm_head", "embed_out"),
        ("vit.layers.0.attention.q_proj", "vit.encoder.layer.0.attention.attention.query"),
        ("vit.encoder.layer.0.output.dense", "vit.layers.0.mlp.fc2"),
    ],
)
def test_a_part_may_be_spelled_otherwise(module: str, stored: str) -> None:
    assert Resolver([f"{stored}.weight", "model.norm.weight"]).weight_of(module) == f"{stored}.weight"


def test_a_moved_name_is_taken_before_one_spelled_otherwise() -> None:
    names = ["layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"]
    assert Resolver(names).weight_of("model.layers.0.mlp.gate") == names[0]


def test_only_experts_have_numbered_names_for_their_layers() -> None:
    assert Resolver(["model.layers.0.mlp.w1.weight"]).weight_of("model.layers.0.mlp.gate_proj") is None


TINY: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "family", "settings"),
    [
        (AutoModelForCausalLM, "mixtral", {**TINY, "num_local_experts": 2}),
        (AutoModelForCausalLM, "phimoe", {**TINY, "num_local_experts": 2}),
        (AutoModelForCausalLM, "granitemoe", {**TINY, "num_local_experts": 2}),
        (AutoModelForCausalLM, "gpt_neox", TINY),
        (
            AutoModelForImageTextToText,
            "llava",
            {
                "text_config": {"model_type": "llama", **TINY},
                "vision_config": {"model_type": "siglip_vision_model", **VISION},
            },
        ),
        (
            AutoModelForImageTextToText,
            "qwen2_5_vl",
            {
                "text_config": {**TINY, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
                "vision_config": {
                    "depth": 1,
                    "hidden_size": 16,
                    "intermediate_size": 8,
                    "num_heads": 2,
                    "out_hidden_size": 16,
                },
            },
        ),
        (AutoModelForImageClassification, "vit", VISION),
        (AutoModel, "dinov2", VISION),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_transformers_renames_is_found(tmp_path: Path, kind: Any, family: str, settings: Any) -> None:
    torch.manual_seed(0)
    model = kind.from_config(AutoConfig.for_model(family, **settings))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    resolver = Resolver(stored)
    assert model.state_dict().keys() != stored.keys()
    for path, tensor in model.state_dict().items():
        name = resolver.tensor_of(path)
        if any(same(tensor, other) for other in stored.values()):
            assert name is not None, path
            assert same(tensor, stored[name]), (path, name)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def test_a_large_base_takes_no_time() -> None:
    names = [
        f"language_model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"
        for layer in range(65) for expert in range(256) for part in ("w1", "w2", "w3")
    ]  # fmt: skip
    started = time.process_time()
    resolver = Resolver(names)
    for index in range(500):
        layer, expert = index % 65, index % 256
        found = resolver.weight_of(f"model.language_model.layers.{layer}.mlp.experts.{expert}.up_proj")
        assert found == f"language_model.model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight"
    assert len(resolver.nearest("model.layers.7.mlp.experts.9.up_projection")) > 0
    assert time.process_time() - started < 10  # a comparison with every name would take hours


def test_the_nearest_names_have_the_module_s_numbers() -> None:
    names = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(40) for part in "qkvo"]
    nearest = Resolver(names).nearest("model.layers.31.self_attn.q_pro")
    assert nearest[0] == "model.layers.31.self_attn.q_proj.weight"
    assert all(".31." in name for name in nearest)


@pytest.mark.parametrize(
    ("module", "stored", "said"),
    [
        ("model.layers.0.self_attn.q_proj", ["self_attn.qkv_proj"], "in one piece with others, as 'model.layers.0"),
        ("model.layers.0.mlp.up_proj", ["mlp.gate_up_proj"], "in one piece with others"),
        (
            "model.layers.0.mlp.gate_up_proj",
            ["mlp.gate_proj", "mlp.up_proj"],
            "in pieces: model.layers.0.mlp.gate_proj",
        ),
        ("model.layers.0.mlp.down_proj", ["mlp.gate_up_proj"], None),
    ],
)
def test_what_the_base_has_fused_or_split_is_said(module: str, stored: list[str], said: str | None) -> None:
    resolver = Resolver([f"model.layers.0.{name}.weight" for name in stored])
    assert resolver.weight_of(module) is None
    found = resolver.stored_otherwise(module)
    assert found is None if said is None else said in (found or "")


PATHS = st.lists(
    st.sampled_from(["model", "language_model", "0", "mlp", "block_sparse_moe", "experts", "w1", "up_proj", "gate"]),
    min_size=1, max_size=7,
).map(".".join)  # fmt: skip


@given(PATHS, st.sets(PATHS))
def test_an_answer_is_always_a_stored_name_and_the_same_name_if_there_is_one(path: str, others: set[str]) -> None:
    names = {f"{other}.weight" for other in others}
    found = Resolver(names).weight_of(path)
    assert found is None or found in names
    assert Resolver({*names, f"{path}.weight"}).weight_of(path) == f"{path}.weight"


@given(st.sampled_from(RENAMES), st.sampled_from(PREFIXES), st.sampled_from(PREFIXES), st.booleans())
def test_every_other_spelling_is_found_below_any_prefix(rename: Rename, old: str, new: str, forth: bool) -> None:
    start = f"tower{rename.within}" if rename.within not in rename.one + rename.other else "tower"
    one, other = (f"{start.rstrip('.')}.{part.strip('.')}.weight" for part in (rename.one, rename.other))
    path, stored = (one, other) if forth else (other, one)
    assert Resolver([new + stored]).tensor_of(old + path) == new + stored


@given(
    st.sampled_from(PREFIXES),
    st.sampled_from(PREFIXES),
    st.from_regex(r"[a-z]{1,8}(\.[a-z0-9]{1,8}){0,3}", fullmatch=True),
)
def test_any_known_prefix_is_found_under_any_other(old: str, new: str, path: str) -> None:
    assert Resolver([f"{new}{path}.weight"]).weight_of(old + path) == f"{new}{path}.weight"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("base_model.model.model.embed_tokens.base_layer.weight", "model.embed_tokens.weight"),
        ("base_model.model.lm_head.weight", "lm_head.weight"),
        ("base_model.model.lm_head.lora_magnitude_vector", None),
        ("base_model.model.model.layers.0.mlp.up_proj.bias", None),
    ],
)
def test_copies_of_the_base_are_known_by_their_names(name: str, path: str | None) -> None:
    assert copied_from_base(name) == path
