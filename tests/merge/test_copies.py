"""PEFT's copy of the base's rows is nothing to do when it is equal, and stands below the deltas when it isn't."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.merge.merge import merge
from tests.models import assert_same_bits, bits, make_adapter, make_base, merged_by_peft

COPY = "base_model.model.lm_head.base_layer.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", dtype="bfloat16")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    made = make_adapter(tmp_path / "adapter", base, target_modules=["lm_head"])
    assert COPY in load_file(made / "adapter_model.safetensors")
    return made


def change(adapter: Path, copy: torch.Tensor) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {COPY: copy}, file)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_equal_copy_changes_nothing(base: Path, adapter: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    change(adapter, bits(base)["lm_head.weight"].to(dtype))
    report = merge(base, [adapter], out=tmp_path / "out", device="cpu")
    assert_same_bits(bits(tmp_path / "out"), merged_by_peft(base, [(adapter, 1.0)]))
    assert {placed.role for placed in report.plan.placements} == {"A", "B", "copy"}


def test_a_copy_with_other_values_takes_the_place_of_the_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    copy = bits(base)["lm_head.weight"].clone()
    copy[-1, -1] += 1
    change(adapter, copy)
    merge(base, [adapter], out=tmp_path / "out", device="cpu")
    merged = bits(tmp_path / "out")
    assert_same_bits(merged, merged_by_peft(base, [(adapter, 1.0)]))
    assert merged["lm_head.weight"][-1, -1] != merged_by_peft(base, [(adapter, 0.0)])["lm_head.weight"][-1, -1]
