"""What rounding leaves of a change is measured and said; the remedies do what they promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lorakit.merge import blocks
from lorakit.merge.merge import merge
from tests.merge.small_deltas import WEIGHT, exact_delta, survival, tensor, write_delta, write_one_weight


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_one_weight(tmp_path_factory.mktemp("bf16") / "base", torch.bfloat16)


# facts/merge-mix-convert.md §5.3, where it was measured on other random numbers
@pytest.mark.parametrize(("ratio", "left"), [(0.0003, 0.18), (0.001, 0.53), (0.003, 0.93), (0.01, 1.0)])
def test_the_survival_of_a_bf16_merge_is_what_a_float64_formula_says(
    base: Path, tmp_path: Path, ratio: float, left: float
) -> None:
    adapter = write_delta(tmp_path / "adapter", base, ratio)
    report = merge(base, [adapter], out=tmp_path / "out", device="cpu")
    found = survival(base, adapter, tmp_path / "out")
    assert report.survival == pytest.approx(found, abs=1e-3)
    assert found == pytest.approx(left, abs=0.05)
    record = json.loads((tmp_path / "out" / "lorakit.json").read_text())["report"]
    assert record["merged"][0]["survival"] == record["survival"] == report.survival


@pytest.mark.parametrize("ratio", [0.0003, 0.003])
def test_a_low_survival_is_warned_of_with_its_remedies_and_a_high_one_is_not(
    base: Path, tmp_path: Path, ratio: float
) -> None:
    adapter = write_delta(tmp_path / "adapter", base, ratio)
    notes = " ".join(merge(base, [adapter], out=tmp_path / "out", device="cpu").notes)
    if ratio < 0.001:
        assert all(remedy in notes for remedy in ("--dtype fp16", "--rounding stochastic", "--residual DIR"))
        assert "18% of the change is left" in notes
        assert "0.030% of the weights" in notes
    else:
        assert not notes


def test_fp16_keeps_what_bf16_loses(base: Path, tmp_path: Path) -> None:
    adapter = write_delta(tmp_path / "adapter", base, 0.0003)
    report = merge(base, [adapter], out=tmp_path / "out", device="cpu", dtype="fp16")
    assert report.survival == pytest.approx(survival(base, adapter, tmp_path / "out"), abs=1e-3)
    assert report.survival > 0.75
    error = (tensor(tmp_path / "out").double() - tensor(base).double() - exact_delta(adapter)).norm()
    assert error / exact_delta(adapter).norm() == pytest.approx(0.55, abs=0.05)  # §5.3; 0.94 in bf16


def test_where_nothing_is_rounded_there_is_no_survival_to_speak_of(tmp_path: Path) -> None:
    base = write_one_weight(tmp_path / "base", torch.float32)
    report = merge(base, [write_delta(tmp_path / "adapter", base, 0.0003)], out=tmp_path / "out", device="cpu")
    assert report.survival is None
    assert not report.notes


def merged(base: Path, adapter: Path, out: Path, seed: int, workers: int | None = None) -> torch.Tensor:
    merge(base, [adapter], out=out, device="cpu", rounding="stochastic", seed=seed, workers=workers)
    return tensor(out)


@pytest.mark.parametrize("dtype", ["keep", "fp16"])
def test_stochastic_rounding_keeps_the_mean_and_goes_to_a_neighbour(base: Path, tmp_path: Path, dtype: str) -> None:
    adapter = write_delta(tmp_path / "adapter", base, 0.0003)
    exact = tensor(base).double() + exact_delta(adapter)
    found = []
    for seed in range(8):
        out = tmp_path / f"out-{seed}"
        report = merge(base, [adapter], out=out, device="cpu", rounding="stochastic", seed=seed, dtype=dtype)
        found.append(report.survival)
        rounded = tensor(out)
        nearest = exact.to(rounded.dtype)
        beyond = torch.where(exact > nearest.double(), torch.inf, -torch.inf).to(rounded.dtype)
        other = torch.nextafter(nearest, beyond)
        # the sum itself is made in float32: a tie there may be decided otherwise than in float64
        assert ((rounded == nearest) | (rounded == other)).double().mean() > 0.9999
        assert (rounded != nearest).any()
    assert torch.tensor(found).mean() == pytest.approx(1.0, abs=0.03)
    assert not report.notes


def test_a_seed_says_the_bits_whatever_the_number_of_workers(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "CPU_BLOCK", 40_000)
    adapter = write_delta(tmp_path / "adapter", base, 0.0003)
    first = merged(base, adapter, tmp_path / "first", seed=3, workers=1)
    assert torch.equal(first, merged(base, adapter, tmp_path / "again", seed=3, workers=4))
    assert not torch.equal(first, merged(base, adapter, tmp_path / "other", seed=4))


def test_each_weight_and_block_draws_its_own_numbers(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "CPU_BLOCK", 64 * 512)
    adapter = write_delta(tmp_path / "adapter", base, 0.0003)
    nearest = tensor(base).double() + exact_delta(adapter)
    up = (merged(base, adapter, tmp_path / "out", seed=0) != nearest.to(torch.bfloat16)).view(-1, 64, 512)
    assert len({bytes(block.numpy().tobytes()) for block in up}) == len(up)
    assert WEIGHT in json.loads((tmp_path / "out" / "lorakit.json").read_text())["report"]["merged"][0]["weight"]
