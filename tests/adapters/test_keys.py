"""Names of adapter tensors are taken apart in every spelling that PEFT has written."""

from __future__ import annotations

import pytest

from lorakit.adapters.keys import factor_name, is_base_copy, parse_key

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "module", "part", "adapter"),
    [
        (f"base_model.model.{Q}.lora_A.weight", Q, "lora_A", None),
        (f"base_model.model.{Q}.lora_B.default.weight", Q, "lora_B", "default"),
        (f"{Q}.lora_A.weight", Q, "lora_A", None),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "model.embed_tokens", "lora_embedding_A", None),
        ("base_model.model.wte.lora_embedding_B.mine", "wte", "lora_embedding_B", "mine"),
    ],
)
def test_factors(name: str, module: str, part: str, adapter: str | None) -> None:
    key = parse_key(name)
    assert (key.module, key.part, key.adapter) == (module, part, adapter)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.embed_tokens.base_layer.weight",
        "base_model.model.lm_head.weight",
        "base_model.model.lora_A.weight.extra",
        "lora_A.weight",
        "",
    ],
)
def test_what_is_no_factor(name: str) -> None:
    assert parse_key(name).part == "other"


@pytest.mark.parametrize(
    ("name", "module", "part"),
    [
        (f"base_model.model.{Q}.lora_magnitude_vector", Q, "lora_magnitude_vector"),
        (f"base_model.model.{Q}.lora_magnitude_vector.default.weight", Q, "lora_magnitude_vector"),
        (f"base_model.model.{Q}.lora_magnitude_vector.weight", Q, "lora_magnitude_vector"),
        (f"base_model.model.{Q}.lora_B.bias", Q, "lora_B_bias"),
        (f"base_model.model.{Q}.lora_B.default.bias", Q, "lora_B_bias"),
        (
            "model.embed_tokens.token_adapter.trainable_tokens_delta",
            "model.embed_tokens",
            "token_rows",
        ),
        ("model.embed_tokens.trainable_tokens_delta.default", "model.embed_tokens", "token_rows"),
    ],
)
def test_what_stands_beside_the_factors(name: str, module: str, part: str) -> None:
    key = parse_key(name)
    assert (key.module, key.part) == (module, part)


def test_names_are_written_as_they_are_read() -> None:
    for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
        key = parse_key(factor_name(Q, part))  # type: ignore[arg-type]
        assert (key.module, key.part, key.adapter) == (Q, part, None)


def test_a_copy_of_the_base_is_known() -> None:
    assert is_base_copy("base_model.model.lm_head.base_layer.weight")
    assert not is_base_copy("base_model.model.lm_head.weight")
