"""A module path means one stored weight, or none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
