"""8 bit floats: what transformers makes of them is the measure."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from lorakit.errors import InvalidFile, Refused
from lorakit.merge.quantised import rounding
from tests.merge.quantised.folders import assert_stored, made, one, random, weights_in, with_delta

BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 32], "activation_scheme": "dynamic"}
E4M3 = torch.float8_e4m3fn


def _by_transformers(weight: torch.Tensor, scale_format: str | None = None) -> dict[str, torch.Tensor]:
    settings = SimpleNamespace(weight_block_size=(16, 32), scale_fmt=scale_format)
    quantised: dict[str, torch.Tensor] = Fp8Quantize(SimpleNamespace(quantization_config=settings)).convert(
        {"a.weight": weight}
    )
    return quantised


def test_a_model_in_blocks_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in plain.state_dict().items():
        linear = name.endswith("proj.weight")
        written = _by_transformers(value) if linear else {"a.weight": value}
        tensors |= {name.removesuffix("weight") + key.removeprefix("a."): tensor for key, tensor in written.items()}
    folder = made(tmp_path, BLOCKS, tensors, **{k: v for k, v in config.to_dict().items() if k != "dtype"})
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    weights = weights_in(folder)
    assert len(weights) == 7
    for name, weight in weights.items():
        assert theirs[name].dtype == torch.bfloat16
        assert torch.equal(weight.read().to(torch.bfloat16), theirs[name])


SCALED: list[tuple[str, dict[str, Any], dict[str, torch.Tensor]]] = [
    ("tensor", {"quant_method": "fp8"}, {"a.weight_scale": torch.tensor(0.01)}),
    (
        "tensor",
        {"quant_method": "fp8"},
        {"a.weight_scale_inv": torch.tensor(0.01), "a.activation_scale": torch.ones(1)},
    ),
    ("tensor", {"quant_method": "modelopt", "quant_algo": "FP8"}, {"a.weight_scale": torch.tensor([0.01])}),
    ("channel", {"quant_method": "fbgemm_fp8"}, {"a.weight_scale": random(40, 1).abs()}),
    ("channel", {"quant_method": "fp8"}, {"a.weight_scale": random(40).abs().to(torch.bfloat16)}),
    ("block", BLOCKS, {"a.weight_scale_inv": random(3, 2).abs()}),
    ("block", BLOCKS, {"a.weight_scale_inv": random(3, 2).abs().to(torch.float8_e8m0fnu)}),
]


@pytest.mark.parametrize(("kind", "settings", "scales"), SCALED)
def test_every_way_to_scale_is_read_and_written(
    tmp_path: Path, kind: str, settings: dict[str, Any], scales: dict[str, torch.Tensor]
) -> None:
    codes = random(40, 48, scale=60.0).to(E4M3)
    weight = one(made(tmp_path, settings, {"a.weight": codes, **scales}))
    assert weight.scheme.name == f"fp8 by {kind}"
    assert all(name in {part.name for part in weight.parts.values()} for name in scales)
    scale = next(iter(scales.values())).float()
    if kind == "block":
        scale = scale.repeat_interleave(16, 0)[:40].repeat_interleave(32, 1)[:, :48]
    elif kind == "channel":
        scale = scale.reshape(40, 1)
    assert torch.equal(weight.read(), codes.float() * scale)
    assert_stored(weight, weight.packed(weight.read()))
    wanted = with_delta(weight.read(), 0.3)
    assert rounding(weight.read(), wanted, weight.unpacked(weight.packed(wanted))).of_weight < 0.03


@given(st.integers(0, 1000), st.floats(1e-6, 1e3), st.sampled_from([None, "ue8m0"]))
def test_each_value_is_off_by_half_a_step_at_most(
    tmp_path: Path, seed: int, scale: float, scale_format: str | None
) -> None:
    weight = one(made(tmp_path, BLOCKS, _by_transformers(random(32, 64), scale_format)))
    wanted = random(32, 64, seed=seed, scale=scale)
    packed = weight.packed(wanted, scales="fresh")
    scales = packed["weight_scale_inv"].float().repeat_interleave(16, 0).repeat_interleave(32, 1)
    step = torch.maximum(wanted.abs() / 16, scales * 2**-10)  # 3 bits of fraction; the smallest number is 2^-9
    assert ((weight.unpacked(packed) - wanted).abs() <= step * 1.001).all()


def test_tiles_of_zeros_keep_their_scale(tmp_path: Path) -> None:
    weight = one(made(tmp_path, BLOCKS, _by_transformers(random(32, 64))))
    packed = weight.packed(torch.zeros(32, 64))
    assert not weight.unpacked(packed).any()
    assert torch.isfinite(packed["weight_scale_inv"]).all()


@pytest.mark.parametrize(
    ("settings", "tensors", "error", "said"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, {}, Refused, "NVFP4"),
        (BLOCKS, {"a.weight": torch.zeros(40, 48).to(E4M3)}, Refused, "belongs to a weight"),
        (BLOCKS, {"a.weight_scale_inv": torch.ones(3, 2)}, InvalidFile, "'a.weight' is not there"),
        (
            BLOCKS,
            {"a.weight": torch.zeros(40, 48).to(E4M3), "a.weight_scale_inv": torch.ones(2, 2)},
            InvalidFile,
            "fits",
        ),
        (BLOCKS, {"a.weight": torch.zeros(2, 4, 8).to(E4M3), "a.weight_scale_inv": torch.ones(1, 1)}, Refused, "3 dim"),
        (BLOCKS, {"a.weight": torch.zeros(4, 8), "a.weight_scale_inv": torch.ones(1, 1)}, Refused, "stored as F32"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor], error: type[Exception], said: str
) -> None:
    held = {"norm.weight": torch.ones(4), "b.weight": torch.ones(4).to(E4M3), **tensors}
    if "quant_algo" not in settings:
        held.pop("b.weight")
    with pytest.raises(error, match=said):
        weights_in(made(tmp_path, settings, held))
