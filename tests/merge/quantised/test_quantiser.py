"""Weights quantised as they are written: transformers loads them, and to the values that were meant."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from lorakit.errors import Refused, UsageError
from lorakit.files.safetensors import read_header
from lorakit.files.tensors import torch_dtype
from lorakit.merge.quantised import Quantiser, quantised_weights
from lorakit.merge.quantised.library import compressed_tensors
from tests.merge.quantised.folders import DATA, random

Planned = list[tuple[str, str, tuple[int, ...]]]
BASE: Planned = [
    ("model.embed_tokens.weight", "BF16", (50, 256)),
    ("model.layers.0.self_attn.q_proj.weight", "BF16", (256, 256)),
    ("model.layers.0.self_attn.q_proj.bias", "BF16", (256,)),
    ("model.layers.0.mlp.down_proj.weight", "BF16", (256, 96)),
    ("model.layers.0.mlp.gate.weight", "BF16", (8, 256)),
    ("model.layers.0.input_layernorm.weight", "BF16", (256,)),
    ("model.visual.blocks.0.attn.proj.weight", "BF16", (256, 256)),
    ("lm_head.weight", "BF16", (50, 256)),
]


def _plain(folder: Path) -> tuple[dict[str, Any], Planned, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=128, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    header = read_header(folder / "model.safetensors")
    planned = [(name, stored.dtype, stored.shape) for name, stored in header.tensors.items()]
    return json.loads((folder / "config.json").read_text()), planned, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["fp8", "int8", "w4a16"])
def test_transformers_loads_what_was_quantised(tmp_path: Path, kind: str) -> None:
    config, planned, tensors = _plain(tmp_path / "plain")
    quantiser = Quantiser.of(kind, config, planned)
    written: dict[str, torch.Tensor] = {}
    for name, dtype, shape in planned:
        plan = quantiser.planned(name, dtype, shape)
        if plan is None:
            written[name] = tensors[name]
            continue
        parts = quantiser.quantise(name, dtype, tensors[name].float())
        assert [(part, parts[part].dtype, tuple(parts[part].shape)) for part in parts] == [
            (part, torch_dtype(its_dtype), its_shape)
            for part, its_dtype, its_shape in sorted(plan, key=lambda entry: list(parts).index(entry[0]))
        ]
        written |= parts
    folder = tmp_path / kind
    folder.mkdir()
    config |= {"quantization_config": quantiser.config_section()}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})

    read = quantised_weights(config, read_header(folder / "model.safetensors").tensors)
    assert len(read) == 7
    for name, weight in read.items():
        off = (weight.read() - tensors[name].float()).norm() / tensors[name].float().norm()
        assert off < {"fp8": 0.03, "int8": 0.01, "w4a16": 0.12}[kind]

    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in read.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(_values(module), weight.read()), name
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    tokens = torch.arange(16).unsqueeze(0)
    with torch.inference_mode():
        assert torch.cosine_similarity(model(tokens).logits, plain(tokens).logits, dim=-1).min() > 0.95


def _values(module: Any) -> torch.Tensor:
    """The weight of a layer of compressed-tensors or of transformers' own for fp8."""
    held = {name: value.detach() for name, value in [*module.named_parameters(), *module.named_buffers()]}
    if "weight_packed" not in held and held["weight"].dtype == torch.float8_e4m3fn:
        return (held["weight"].to(torch.bfloat16) * held["weight_scale"].reshape(-1, 1).to(torch.bfloat16)).float()
    scheme = module.quantization_scheme
    compressor = compressed_tensors().BaseCompressor.get_value_from_registry(scheme.format)
    values: torch.Tensor = compressor.decompress(held, scheme)["weight"]
    return values.float()


def test_the_section_is_that_of_llm_compressor() -> None:
    for kind, name in (("fp8", "ct-fp8-dynamic"), ("int8", "ct-w8a8"), ("w4a16", "ct-w4a16")):
        planned: Planned = [("model.layers.0.self_attn.k_proj.weight", "BF16", (64, 128))]
        mine = Quantiser.of(kind, {}, planned).config_section()
        theirs = json.loads((DATA / name / "config.json").read_text())["quantization_config"]
        for key in ("format", "quant_method", "quantization_status", "ignore"):
            assert mine[key] == theirs[key]
        my_group, their_group = mine["config_groups"]["group_0"], theirs["config_groups"]["group_0"]
        assert my_group["targets"] == their_group["targets"]
        for part in ("weights", "input_activations"):
            for key in ("num_bits", "type", "strategy", "symmetric", "dynamic", "group_size"):
                assert (my_group[part] or {}).get(key) == (their_group[part] or {}).get(key)


def test_only_linear_layers_are_quantised_and_the_others_are_named() -> None:
    quantiser = Quantiser.of("w4a16", {}, BASE)
    assert quantiser.groups == {"model.layers.0.self_attn.q_proj": 128, "model.layers.0.mlp.down_proj": 32}
    assert quantiser.planned("model.layers.0.self_attn.q_proj.bias", "BF16", (256,)) is None
    assert quantiser.left["model.embed_tokens"] == "an embedding"
    section = quantiser.config_section()
    assert section["ignore"] == ["lm_head", "model.layers.0.mlp.gate", "model.visual.blocks.0.attn.proj"]
    sizes = {tuple(group["targets"]): group["weights"]["group_size"] for group in section["config_groups"].values()}
    assert sizes == {("Linear",): 128, ("model.layers.0.mlp.down_proj",): 32}


def test_a_layer_that_can_not_be_cut_into_groups_stays_as_it_is() -> None:
    quantiser = Quantiser.of("w4a16", {}, [*BASE, ("odd.weight", "BF16", (8, 100))])
    assert quantiser.planned("odd.weight", "BF16", (8, 100)) is None
    assert "100 inputs" in quantiser.left["odd"]
    assert "odd" in quantiser.config_section()["ignore"]
    assert Quantiser.of("fp8", {}, [("odd.weight", "BF16", (8, 100))]).groups == {"odd": 0}


@pytest.mark.parametrize("kind", ["fp8", "int8", "w4a16"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_weight_is_as_near_as_its_bits_allow(kind: str, dtype: str) -> None:
    quantiser = Quantiser.of(kind, {}, [("a.weight", dtype, (32, 256))])
    weight = random(32, 256)
    weight[3] = 0.0
    parts = quantiser.quantise("a.weight", dtype, weight)
    library = compressed_tensors()
    scheme = quantiser._scheme(quantiser.groups["a"])
    compressor = library.BaseCompressor.get_value_from_registry(scheme.format)
    values = compressor.decompress({name.removeprefix("a."): part for name, part in parts.items()}, scheme)["weight"]
    assert values.dtype == torch_dtype(dtype)
    assert not values[3].any()
    assert (values.float() - weight).norm() / weight.norm() < {"fp8": 0.03, "int8": 0.01, "w4a16": 0.12}[kind]


def test_what_can_not_be_quantised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="name one of fp8, int8, w4a16"):
        Quantiser.of("int3", {}, BASE)
    with pytest.raises(Refused, match="gpt2"):
        Quantiser.of("fp8", {"model_type": "gpt2"}, BASE)
    with pytest.raises(Refused, match="all experts in one tensor"):
        Quantiser.of("fp8", {}, [("m.experts.gate_up_proj", "BF16", (4, 8, 8))])
    with pytest.raises(Refused, match="no linear layer"):
        Quantiser.of("fp8", {}, BASE[:1])
    with pytest.raises(Refused, match="not finite"):
        Quantiser.of("fp8", {}, BASE).quantise(BASE[1][0], "BF16", torch.full((256, 256), torch.inf))
    compressed_tensors.cache_clear()
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(Refused, match=r"lorakit\[quantize\]"):
        Quantiser.of("fp8", {}, BASE)
    compressed_tensors.cache_clear()
