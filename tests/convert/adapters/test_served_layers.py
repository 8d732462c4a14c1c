"""The tables are what vLLM's own source says, read here without importing it."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.adapters.delta import Delta, Made
from lorakit.convert.adapters.served_layers import (
    STACKED_EXPERTS,
    WITHOUT_ADAPTERS,
    WITHOUT_EMBEDDINGS,
    WITHOUT_HEAD,
    not_served,
)


def delta(out: int = 8, into: int = 8, kind: Any = "linear") -> Delta:
    return Delta((Made((out, into), lambda: pytest.fail("nothing is computed"), known_rank=2),), kind)


def refused(modules: dict[str, Delta], architecture: str, **config: Any) -> list[str]:
    return [str(check.reason) for check in not_served(modules, {"architectures": [architecture], **config})]


def test_embeddings_and_heads_are_refused_of_models_that_take_none() -> None:
    tables = {"lm_head": delta()}, {"model.embed_tokens": delta(kind="embedding")}
    assert [len(refused(table, "Qwen2ForCausalLM")) for table in tables] == [1, 1]
    assert [len(refused(table, "CohereForCausalLM")) for table in tables] == [1, 0]
    assert [len(refused(table, "LlamaForCausalLM")) for table in tables] == [0, 0]
    assert refused({"model.layers.0.self_attn.q_proj": delta()}, "Qwen2ForCausalLM") == []


def test_models_that_take_no_adapter_are_refused_for_any_layer() -> None:
    (problem,) = refused({"transformer.h.0.attn.c_attn": delta()}, "GPT2LMHeadModel")
    assert "GPT2LMHeadModel" in problem


def test_a_head_of_too_many_tokens_is_refused_and_an_embedding_of_them_is_not() -> None:
    assert refused({"lm_head": delta(262_144)}, "LlamaForCausalLM")
    assert not refused({"model.embed_tokens": delta(8, 262_144, "embedding")}, "LlamaForCausalLM")


@pytest.mark.parametrize("module", ["model.visual.blocks.0.attn.qkv", "vision_tower.vision_model.layers.0.mlp.fc1"])
def test_towers_of_models_that_see_are_refused(module: str) -> None:
    assert "leaves such out" in refused({module: delta()}, "Qwen2VLForConditionalGeneration", vision_config={})[0]
    assert refused({"model.language_model.layers.0.mlp.up_proj": delta()}, "X", vision_config={}) == []
    assert refused({module: delta()}, "LlamaForCausalLM") == []


def test_experts_by_themselves_are_refused_of_models_that_want_them_stacked() -> None:
    experts = {"model.layers.0.mlp.experts.0.up_proj": delta()}
    assert refused(experts, "GptOssForCausalLM")
    assert refused(experts, "Qwen3MoeForCausalLM") == []


def test_a_config_that_says_nothing_is_taken_for_a_model_that_takes_all() -> None:
    assert list(not_served({"lm_head": delta()}, {})) == []


# what vLLM says

MODELS = "model_executor/models"


@pytest.fixture(scope="module")
def classes() -> dict[str, tuple[tuple[str, ...], dict[str, Any]]]:
    """By name: the names of its bases, and what its body sets."""
    found = {}
    for file in _sources():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                found[node.name] = tuple(_names(node.bases)), dict(_settings(node))
    return found


def _sources() -> list[Path]:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    return sorted((Path(spec.origin).parent / MODELS).glob("*.py"))


def _names(bases: list[ast.expr]) -> Iterator[str]:
    for base in bases:
        if isinstance(base, ast.Name | ast.Attribute):
            yield base.id if isinstance(base, ast.Name) else base.attr


def _settings(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for line in node.body:
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        value = getattr(line, "value", None)
        if isinstance(targets[0], ast.Name) and value is not None:
            try:
                yield targets[0].id, ast.literal_eval(value)
            except ValueError:
                continue


def _inherited(classes: dict[str, Any], name: str, setting: str) -> Any:
    bases, own = classes.get(name, ((), {}))
    if setting in own:
        return own[setting]
    return next((found for base in bases if (found := _inherited(classes, base, setting)) is not None), None)


def _takes_adapters(classes: dict[str, Any], name: str) -> bool:
    return name == "SupportsLoRA" or any(_takes_adapters(classes, base) for base in classes.get(name, ((), {}))[0])


def _registered(table: str) -> dict[str, str]:
    (file,) = (file for file in _sources() if file.name == "registry.py")
    for node in ast.parse(file.read_text()).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if getattr(target, "id", None) == table:
            return {name: found[1] for name, found in ast.literal_eval(node.value).items()}  # type: ignore[attr-defined]
    raise AssertionError(f"vLLM has no {table}")


def test_the_tables_are_vllms(classes: dict[str, Any]) -> None:
    texts = {arch: name for arch, name in _registered("_TEXT_GENERATION_MODELS").items()
             if _takes_adapters(classes, name)}  # fmt: skip
    tables = {arch: set(_inherited(classes, name, "embedding_modules") or ()) for arch, name in texts.items()}
    assert {arch for arch, layers in tables.items() if not layers} == WITHOUT_EMBEDDINGS
    assert {arch for arch, layers in tables.items() if layers and "lm_head" not in layers} == WITHOUT_HEAD


def test_the_models_that_take_no_adapter_are_vllms(classes: dict[str, Any]) -> None:
    registered = _registered("_TEXT_GENERATION_MODELS")
    known = {arch for arch, name in registered.items() if name in classes and not _takes_adapters(classes, name)}
    assert known == WITHOUT_ADAPTERS


def test_the_models_with_stacked_experts_are_vllms(classes: dict[str, Any]) -> None:
    every = _registered("_TEXT_GENERATION_MODELS") | _registered("_MULTIMODAL_MODELS")
    stacked = {arch for arch, name in every.items() if _inherited(classes, name, "is_3d_moe_weight") is True}
    assert stacked == STACKED_EXPERTS
