"""Which weights are quantised, told from config and headers; and the config of a model that is so no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.errors import InvalidFile, Refused
from lorakit.files.safetensors import read_header
from lorakit.merge.quantised import activation_scales, dequantised_config, quantisation_settings, quantised_weights
from tests.merge.quantised.folders import DATA, FOLDERS, made, weights_in


@pytest.mark.parametrize("name", FOLDERS)
def test_every_stored_tensor_is_a_part_of_one_weight(name: str) -> None:
    weights = weights_in(DATA / name)
    parts = [part.name for weight in weights.values() for part in weight.parts.values()]
    assert sorted(parts) == sorted(read_header(DATA / name / "model.safetensors").tensors)


@pytest.mark.parametrize("name", [name for name in FOLDERS if not name.startswith("ct-")])
def test_planning_needs_no_torch(name: str) -> None:
    program = (
        "import json, sys; from pathlib import Path; from lorakit.merge.quantised import quantised_weights\n"
        "from lorakit.files.safetensors import read_header\n"
        "folder = Path(sys.argv[1]); config = json.loads((folder / 'config.json').read_text())\n"
        "assert quantised_weights(config, read_header(folder / 'model.safetensors').tensors)\n"
        "assert 'torch' not in sys.modules"
    )
    if name in ("awq-gemm", "bnb-nf4", "gptq-4bit"):  # a process each
        subprocess.run([sys.executable, "-c", program, str(DATA / name)], check=True)


def test_a_model_that_is_not_quantised_has_none() -> None:
    assert quantised_weights({"dtype": "bfloat16"}, {}) == {}
    assert quantised_weights({"quantization_config": {}}, {}) == {}


@pytest.mark.parametrize("method", ["aqlm", "mxfp4", "hqq", "torchao", "quanto"])
def test_another_method_is_refused_by_its_name(method: str) -> None:
    with pytest.raises(Refused, match=f"quantised by {method}, which can't be read here: merge onto"):
        quantised_weights({"quantization_config": {"quant_method": method}}, {})


def test_settings_that_are_no_object_are_refused() -> None:
    with pytest.raises(InvalidFile, match="no JSON object"):
        quantised_weights({"quantization_config": "4bit"}, {})


GPTQ = {
    "a.qweight": torch.zeros(8, 32, dtype=torch.int32),
    "a.qzeros": torch.zeros(2, 4, dtype=torch.int32),
    "a.scales": torch.ones(2, 32, dtype=torch.float16),
}
AWQ = {
    "a.qweight": torch.zeros(64, 4, dtype=torch.int32),
    "a.qzeros": torch.zeros(2, 4, dtype=torch.int32),
    "a.scales": torch.ones(2, 32, dtype=torch.float16),
}


@pytest.mark.parametrize(
    ("settings", "tensors", "error", "said"),
    [
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, GPTQ, Refused, "marlin"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"}, GPTQ, Refused, "int16"),
        ({"quant_method": "gptq", "bits": 5}, GPTQ, InvalidFile, "whole number of bits"),
        ({"quant_method": "gptq", "bits": 4}, {"a.qweight": GPTQ["a.qweight"]}, InvalidFile, "'a.qzeros' is not there"),
        ({"quant_method": "gptq", "bits": 4}, {"a.scales": GPTQ["a.scales"]}, Refused, "belongs to a weight"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, AWQ, Refused, "gemv"),
        ({"quant_method": "awq", "bits": 8}, AWQ, Refused, "8 bits"),
        ({"quant_method": "awq", "bits": 4}, {**AWQ, "a.scales": torch.ones(2, 8)}, InvalidFile, "do not fit"),
    ],
)
def test_a_layout_that_is_not_understood_is_refused(
    tmp_path: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        weights_in(made(tmp_path, settings, tensors))


def test_groups_without_an_index_are_in_a_row(tmp_path: Path) -> None:
    tensors = {**GPTQ, "a.scales": torch.tensor([[1.0] * 32, [2.0] * 32]).half()}
    folder = made(tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 32}, tensors)
    (weight,) = weights_in(folder).values()
    assert weight.shape == (32, 64)
    assert weight.read()[0].tolist() == [-1.0] * 32 + [-2.0] * 32


@pytest.mark.parametrize(
    ("config", "dtype"),
    [({}, "BF16"), ({"dtype": "float16"}, "F16"), ({"dtype": None, "text_config": {"dtype": "float32"}}, "F32")],
)
def test_the_logical_dtype_is_the_configs(tmp_path: Path, config: dict[str, Any], dtype: str) -> None:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    written = {"torch_dtype": None, **config}
    folder = made(tmp_path, settings, GPTQ, **{"dtype": None, **written})
    (weight,) = weights_in(folder).values()
    assert weight.dtype == dtype


def test_a_dequantised_config_says_nothing_of_quantisation() -> None:
    config = {
        "model_type": "x",
        "torch_dtype": "float16",
        "quantization_config": {"quant_method": "awq"},
        "text_config": {"dtype": "float16", "quantization_config": {}},
    }
    plain = dequantised_config(config, "BF16")
    assert plain == {"model_type": "x", "torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}}
    assert quantisation_settings(plain) is None
    assert "quantization_config" in config
    assert dequantised_config({"model_type": "x"}, "F32") == {"model_type": "x", "dtype": "float32"}


def test_scales_of_the_cache_are_told_from_those_of_weights(tmp_path: Path) -> None:
    tensors = {**GPTQ, "l.self_attn.k_scale": torch.ones(1), "l.self_attn.attn.v_scale": torch.ones(1)}
    folder = made(tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 32}, tensors)
    stored = read_header(folder / "model.safetensors").tensors
    assert set(activation_scales(stored)) == {"l.self_attn.k_scale", "l.self_attn.attn.v_scale"}
