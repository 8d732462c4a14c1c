"""compressed-tensors: its own compressors are the measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.errors import InvalidFile, Refused
from lorakit.merge.quantised import rounding
from lorakit.merge.quantised.compressed_config import group_of
from lorakit.merge.quantised.library import compressed_tensors
from lorakit.merge.quantised.tiles import tiles
from tests.merge.quantised.folders import DATA, assert_stored, made, one, random, source, weights_in, with_delta

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}

ARGUMENTS = {
    "w4 by group": ("pack-quantized", INT4),
    "w4 by group, with zeros": ("pack-quantized", {**INT4, "symmetric": False}),
    "w4 by channel, with zeros": ("pack-quantized", {**INT8, "num_bits": 4, "symmetric": False}),
    "w3 by group": ("pack-quantized", {**INT4, "num_bits": 3}),
    "w8 by group": ("pack-quantized", {**INT4, "num_bits": 8}),
    "w8 by channel": ("int-quantized", INT8),
    "w8 by tensor": ("int-quantized", {**INT8, "strategy": "tensor"}),
    "fp8 by channel": ("float-quantized", FP8),
    "fp8 by tensor": ("naive-quantized", {**FP8, "strategy": "tensor"}),
    "fp8 by block": ("float-quantized", {**FP8, "strategy": "block", "block_structure": [16, 32]}),
    "w4 by group, in the order of activations": ("pack-quantized", {**INT4, "actorder": "group"}),
}  # fmt: skip


def _settings(layout: str, arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"dynamic": False, **arguments}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}, **more}


def _compress(layout: str, arguments: dict[str, Any], weight: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
    """The tensors of a weight by compressed-tensors' own compressor, and what it decompresses them to."""
    library = compressed_tensors()
    args = library.QuantizationArgs.model_validate({"dynamic": False, **arguments})
    tile = {
        "tensor": tuple(weight.shape),
        "channel": (1, weight.shape[1]),
        "group": (1, args.group_size),
        "block": tuple(args.block_structure or (1, 1)),
    }[args.strategy]
    parts: dict[str, torch.Tensor] = {}
    ordered = weight
    if args.actorder:
        index = torch.arange(weight.shape[1]).flip(0) // 32
        parts["weight_g_idx"] = index.int()
        ordered = weight[:, torch.argsort(index)]
    cut = tiles(ordered, tile)
    scale, zeros = library.calculate_qparams(cut.amin((2, 3)), cut.amax((2, 3)), args)
    parts |= {"weight": weight, "weight_scale": scale.to(torch.bfloat16), "weight_zero_point": zeros}
    if args.strategy == "tensor":
        parts |= {"weight_scale": scale.reshape(1).to(torch.bfloat16), "weight_zero_point": zeros.reshape(1)}
    scheme = library.preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights = args
    compressor = library.BaseCompressor.get_value_from_registry(layout)
    written = compressor.compress(parts, scheme)
    return {f"a.{role}": tensor for role, tensor in written.items()}, compressor.decompress(written, scheme)["weight"]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_scheme_is_read_as_the_library_reads_it(tmp_path: Path, name: str) -> None:
    layout, arguments = ARGUMENTS[name]
    tensors, theirs = _compress(layout, arguments, random(32, 64))
    weight = one(made(tmp_path, _settings(layout, arguments), tensors))
    assert weight.shape == (32, 64)
    assert torch.equal(weight.read(), theirs.float())
    assert {part.name for part in weight.parts.values()} == tensors.keys()


@pytest.mark.parametrize("scales", ["best", "fresh", "stored"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_scheme_is_written_back(tmp_path: Path, name: str, scales: str) -> None:
    layout, arguments = ARGUMENTS[name]
    tensors, _ = _compress(layout, arguments, random(32, 64))
    weight = one(made(tmp_path, _settings(layout, arguments), tensors))
    before = weight.read()
    assert_stored(weight, weight.packed(before, scales=scales))
    wanted = with_delta(before, 0.2)
    cost = rounding(before, wanted, weight.unpacked(weight.packed(wanted, scales=scales)))
    assert cost.of_weight < (0.2 if arguments["num_bits"] == 3 else 0.11 if arguments["num_bits"] == 4 else 0.05)


def test_blocks_may_be_ragged(tmp_path: Path) -> None:
    """The library guesses blocks of 20 rows from 2 scales for 40; the config says 32."""
    layout, arguments = "float-quantized", {**FP8, "strategy": "block", "block_structure": [32, 32]}
    codes = random(40, 80, scale=60.0).to(torch.float8_e4m3fn)
    scales = random(2, 3).abs()
    folder = made(tmp_path, _settings(layout, arguments), {"a.weight": codes, "a.weight_scale": scales})
    weight = one(folder)
    spread = scales.repeat_interleave(32, 0)[:40].repeat_interleave(32, 1)[:, :80]
    assert torch.equal(weight.read(), codes.float() * spread)
    assert_stored(weight, weight.packed(weight.read()))
    wanted = with_delta(weight.read(), 0.2)
    assert rounding(weight.read(), wanted, weight.unpacked(weight.packed(wanted))).of_weight < 0.03


@pytest.mark.parametrize("name", ["ct-w4a16", "ct-w4a16-asym", "ct-w8a8", "ct-fp8-dynamic"])
def test_fresh_scales_are_llm_compressors(name: str) -> None:
    """And no code is further off than one: it divides in bfloat16, and so rounds twice."""
    (weight,) = weights_in(DATA / name).values()
    original = source(name)[weight.name].float()
    packed = weight.packed(original, scales="fresh")
    stored = weight._stored({})
    if name == "ct-w4a16-asym":  # its range is rounded too
        assert torch.allclose(packed["weight_scale"], stored["weight_scale"], rtol=2**-7)
    else:
        assert torch.equal(packed["weight_scale"], stored["weight_scale"])
    mine, theirs = weight.unpacked(packed), weight.read()
    assert (mine - original).norm() <= 1.001 * (theirs - original).norm()
    assert ((mine - theirs).abs() <= original.abs() / 8 + 1.02 * stored["weight_scale"].float()).all()


def test_a_group_that_names_a_layer_goes_before_one_that_names_its_class() -> None:
    groups = {
        "all": {"targets": ["Linear"]},
        "down": {"targets": ["re:.*down_proj$"]},
        "one": {"targets": ["a.q_proj"]},
    }
    assert group_of("a.down_proj", groups) is groups["down"]
    assert group_of("a.q_proj", groups) is groups["one"]
    assert group_of("a.k_proj", groups) is groups["all"]
    assert group_of("a.k_proj", {"down": groups["down"]}) is None


@pytest.mark.parametrize(
    ("layout", "arguments", "more", "error", "said"),
    [
        ("nvfp4-pack-quantized", INT4, {}, Refused, "nvfp4-pack-quantized"),
        ("pack-quantized", {**INT4, "strategy": "tensor_group"}, {}, Refused, "tensor_group"),
        ("pack-quantized", INT4, {"sparsity_config": {"format": "sparse-24-bitmask"}}, Refused, "sparse-24-bitmask"),
        ("pack-quantized", {**INT4, "group_size": 16}, {}, InvalidFile, "needs"),
        ("pack-quantized", {**INT4, "num_bits": "many"}, {}, InvalidFile, "does not take"),
        ("pack-quantized", INT4, {"config_groups": None}, InvalidFile, "no config_groups"),
        ("pack-quantized", INT4, {"config_groups": {"x": {"targets": ["b"]}}}, InvalidFile, "meant for it"),
    ],
)
def test_what_is_not_understood_is_refused(
    tmp_path: Path, layout: str, arguments: dict[str, Any], more: dict[str, Any], error: type[Exception], said: str
) -> None:
    tensors, _ = _compress("pack-quantized", INT4, random(32, 64))
    with pytest.raises(error, match=said):
        weights_in(made(tmp_path, _settings(layout, arguments, **more), tensors))
