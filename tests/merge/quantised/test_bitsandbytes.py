"""bitsandbytes: what it would have stored itself, and what can't be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lorakit.errors import InvalidFile, Refused
from lorakit.merge.quantised import rounding
from tests.merge.quantised.folders import DATA, assert_stored, made, random, source, weights_in, with_delta

SETTINGS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
       0.723, 1.0]  # fmt: skip


@pytest.mark.parametrize("name", ["bnb-nf4", "bnb-fp4", "bnb-nf4-stored-as-bf16"])
def test_fresh_scales_are_those_of_bitsandbytes(name: str) -> None:
    originals = source(name)
    for weight in weights_in(DATA / name).values():
        original = originals[weight.name].float()
        assert not torch.equal(original, weight.read())
        assert_stored(weight, weight.packed(original, scales="fresh"))


def test_fresh_int8_is_that_of_bitsandbytes() -> None:
    """bitsandbytes rounds to float16 before."""
    for weight in weights_in(DATA / "bnb-int8").values():
        assert_stored(weight, weight.packed(source("bnb-int8")[weight.name].half().float(), scales="fresh"))


def test_double_quantisation_costs_little_more_than_single() -> None:
    """Its offset is kept, which a change of the weight's size has little to do with."""
    (double,) = weights_in(DATA / "bnb-nf4-double").values()
    single = next(iter(weights_in(DATA / "bnb-nf4").values()))
    errors = [rounding(w.read(), x := with_delta(w.read(), 0.3), w.unpacked(w.packed(x))) for w in (double, single)]
    assert errors[0].of_weight < 1.05 * errors[1].of_weight


def _stored(folder: Path, state: dict[str, object], kind: str = "nf4", rows: int = 8) -> Path:
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors = {
        "a.weight": torch.zeros(rows * 8 // 2, 1, dtype=torch.uint8),
        "a.weight.absmax": torch.ones(1),
        "a.weight.quant_map": torch.tensor(NF4),
        f"a.weight.quant_state.bitsandbytes__{kind}": text,
    }
    return made(folder, SETTINGS, tensors)


STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 8]}


def test_zeros_stay_zeros(tmp_path: Path) -> None:
    (weight,) = weights_in(_stored(tmp_path, STATE)).values()
    assert torch.equal(weight.read(), torch.full((8, 8), -1.0))
    assert torch.equal(weight.unpacked(weight.packed(torch.zeros(8, 8))), torch.zeros(8, 8))


def test_the_last_block_may_be_ragged(tmp_path: Path) -> None:
    state = {**STATE, "blocksize": 48}
    folder = _stored(tmp_path, state)
    with pytest.raises(InvalidFile, match="contradict"):
        weights_in(folder)
    tensors = {
        "a.weight": torch.arange(32, dtype=torch.uint8).reshape(-1, 1),
        "a.weight.absmax": torch.tensor([1.0, 2.0]),
        "a.weight.quant_map": torch.tensor(NF4),
        "a.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    (weight,) = weights_in(made(tmp_path / "ragged", SETTINGS, tensors)).values()
    assert_stored(weight, weight.packed(weight.read()))
    wanted = random(8, 8)
    assert rounding(weight.read(), wanted, weight.unpacked(weight.packed(wanted))).of_weight < 0.15


@pytest.mark.parametrize(
    ("state", "kind", "error", "said"),
    [
        ({**STATE, "quant_type": "af4"}, "af4", Refused, "af4"),
        ({**STATE, "shape": [8]}, "nf4", InvalidFile, "no state"),
        ({**STATE, "dtype": "int8"}, "nf4", InvalidFile, "int8"),
        ({**STATE, "blocksize": 0}, "nf4", InvalidFile, "block"),
        ({"shape": [8, 8]}, "nf4", InvalidFile, "no state"),
    ],
)
def test_a_state_that_is_not_understood_is_refused(
    tmp_path: Path, state: dict[str, object], kind: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        weights_in(_stored(tmp_path, state, kind))


def test_int8_in_a_kernels_own_order_is_refused(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.zeros(4, 4, dtype=torch.int8),
        "a.SCB": torch.ones(4),
        "a.weight_format": torch.tensor(2, dtype=torch.uint8),
    }
    with pytest.raises(Refused, match="order of a GPU"):
        weights_in(made(tmp_path, {"load_in_8bit": True}, tensors))


def test_rows_of_zeros_in_int8_stay_zeros(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.zeros(4, 4, dtype=torch.int8), "a.SCB": torch.zeros(4)}
    (weight,) = weights_in(made(tmp_path, {"load_in_8bit": True}, tensors)).values()
    wanted = torch.zeros(4, 4)
    wanted[1] = 1.0
    assert torch.allclose(weight.unpacked(weight.packed(wanted)), wanted)
