"""Weights that the real tools quantised, read and written again."""

from __future__ import annotations

import pytest
import torch

from lorakit.errors import Refused
from lorakit.merge.quantised import rounding
from tests.merge.quantised.folders import DATA, FOLDERS, assert_stored, expected, weights_in, with_delta

# The least of a change of 10% that is left, and the most that the weight is off: what was measured, rounded outward.
KEPT = {"2bit": 0.0, "3bit": 0.0, "4bit": 0.6, "awq": 0.6, "4": 0.6, "int8": 0.99, "8": 0.98}
OFF = {"2bit": 0.12, "3bit": 0.12, "4": 0.1, "awq": 0.1, "fp8": 0.03, "8": 0.02}


def _of(table: dict[str, float], name: str) -> float:
    return next((value for mark, value in table.items() if mark in name), 1.0)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_weight_is_read_as_the_tool_dequantises_it(name: str) -> None:
    weights = weights_in(DATA / name)
    theirs = expected(name)
    assert weights.keys() == theirs.keys()
    for weight in weights.values():
        assert weight.read().dtype == torch.float32
        assert weight.shape == tuple(theirs[weight.name].shape)
        assert torch.equal(weight.read(), theirs[weight.name].float())


@pytest.mark.parametrize("scales", ["best", "fresh", "stored"])
@pytest.mark.parametrize("name", FOLDERS)
def test_an_unchanged_weight_gives_its_very_bytes_back(name: str, scales: str) -> None:
    for weight in weights_in(DATA / name).values():
        assert_stored(weight, weight.packed(weight.read(), scales=scales))


@pytest.mark.parametrize("name", FOLDERS)
def test_where_rows_are_unchanged_their_values_are(name: str) -> None:
    for weight in weights_in(DATA / name).values():
        before = weight.read()
        wanted = before.clone()
        half = len(before) // 2
        wanted[:half] = with_delta(before, 0.2)[:half]
        after = weight.unpacked(weight.packed(wanted))
        assert torch.equal(after[half:], before[half:])
        assert not torch.equal(after[:half], before[:half]) or "2bit" in name


@pytest.mark.parametrize("name", FOLDERS)
def test_a_changed_weight_is_as_near_as_its_bits_allow(name: str) -> None:
    for weight in weights_in(DATA / name).values():
        before = weight.read()
        wanted = with_delta(before, 0.1)
        cost = rounding(before, wanted, weight.unpacked(weight.packed(wanted)))
        assert cost.of_weight < _of(OFF, name)
        assert cost.kept >= _of(KEPT, name) - 0.01
        assert cost.of_change == pytest.approx(cost.of_weight * float(wanted.norm() / (wanted - before).norm()))


@pytest.mark.parametrize("ratio", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("name", FOLDERS)
def test_the_best_scales_are_no_worse_than_fresh_or_stored_ones(name: str, ratio: float) -> None:
    for weight in weights_in(DATA / name).values():
        before = weight.read()
        wanted = with_delta(before, ratio)
        errors = {
            scales: rounding(before, wanted, weight.unpacked(weight.packed(wanted, scales=scales))).of_weight
            for scales in ("best", "fresh", "stored")
        }
        # within 3%: bitsandbytes' scales are themselves rounded, and its values too
        assert errors["best"] <= 1.03 * min(errors["fresh"], errors["stored"])


@pytest.mark.parametrize("name", FOLDERS)
def test_values_that_are_not_finite_are_refused(name: str) -> None:
    weight = next(iter(weights_in(DATA / name).values()))
    broken = weight.read()
    broken[0, 0] = torch.nan
    with pytest.raises(Refused, match="not finite"):
        weight.packed(broken)


def test_rounding_of_nothing_costs_nothing() -> None:
    weight = torch.ones(2, 2)
    assert rounding(weight, weight, weight).of_change == 0.0
    assert rounding(weight, weight, weight).kept == 1.0
