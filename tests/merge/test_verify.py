"""A merged folder is compared with what its sources give: every tensor, and what stands beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit
from lorakit.errors import NotFound, Refused
from lorakit.files.safetensors import read_header
from lorakit.merge import blocks, spot_check
from lorakit.merge.compare import Difference
from lorakit.merge.merge import merge
from lorakit.merge.verify import verify
from tests.models import LINEARS, make_adapter, make_base

CHANGED = "model.layers.1.self_attn.q_proj.weight"
COPIED = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", dtype="bfloat16", max_shard_size="200KB")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "adapter", base, target_modules=LINEARS["llama"])


@pytest.fixture
def out(base: Path, adapter: Path, tmp_path: Path) -> Path:
    merge(base, [(adapter, 0.7)], out=tmp_path / "out", device="cpu")
    return tmp_path / "out"


def rewrite(out: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Change one tensor on disk, or with None take it out, and keep the index right."""
    index = json.loads((out / "model.safetensors.index.json").read_text())
    file = out / index["weight_map"][name]
    tensors = load_file(file)
    changed = change(tensors[name])
    if changed is None:
        del tensors[name], index["weight_map"][name]
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        tensors[name] = changed
    save_file(tensors, file, metadata={"format": "pt"})


def with_one_bit(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(torch.int16).view(-1)[tensor.numel() // 2 + 7] ^= 1  # not in a row that is sampled
    return tensor


SETTINGS: list[dict[str, Any]] = [
    {}, {"dtype": "fp16"}, {"dtype": "fp32"}, {"rounding": "stochastic", "seed": 5}, {"max_shard_size": "300KB"},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_merge_verifies_from_what_it_says_of_itself(
    base: Path, adapter: Path, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(base, [(adapter, 0.7)], out=tmp_path / "out", device="cpu", **settings)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    report = verify(tmp_path / "out", workers=1)
    names = [name for file in base.glob("*.safetensors") for name in read_header(file).tensors]
    assert report.ok
    assert (report.equal, report.results, report.files, report.notes) == (len(names), (), (), ())
    assert report.spot_checked == 14 * 4
    assert report.adapters == {str(adapter): True}
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}


@pytest.mark.parametrize("family", ["gpt2", "tied-llama"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_other_layouts_and_dtypes_verify(tmp_path: Path, family: str, dtype: str) -> None:
    base = make_base(tmp_path / "base", family, dtype)
    fan = {"fan_in_fan_out": True} if family == "gpt2" else {}
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=LINEARS[family], **fan)
    merge(base, [adapter], out=tmp_path / "out", device="cpu")
    report = verify(tmp_path / "out")
    assert report.ok
    assert not report.results
    assert report.spot_checked > 0


def test_a_result_that_is_quantised_verifies_and_its_parts_are_compared(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    merge(base, [adapter], out=tmp_path / "out", device="cpu", quantize="int8")
    assert verify(tmp_path / "out").ok

    def other(tensor: torch.Tensor) -> torch.Tensor:
        tensor[0, 0] ^= 2
        return tensor

    rewrite(tmp_path / "out", CHANGED, other)
    (result,) = verify(tmp_path / "out").wrong
    assert (result.tensor, result.different, result.ulps) == (CHANGED, 1, 2)


@pytest.mark.parametrize("name", [CHANGED, COPIED])
def test_one_bit_is_found(out: Path, name: str) -> None:
    rewrite(out, name, with_one_bit)
    report = verify(out)
    assert not report.ok
    (result,) = report.wrong
    assert (result.tensor, result.state, result.different, result.ulps) == (name, "different", 1, 1)


def test_a_sign_and_a_nan_are_found(out: Path) -> None:
    rewrite(out, CHANGED, lambda tensor: tensor.neg())
    rewrite(out, "lm_head.weight", lambda tensor: torch.full_like(tensor, torch.nan))
    results = {result.tensor: result for result in verify(out).wrong}
    assert results[CHANGED].different == results[CHANGED].elements == 96 * 96
    assert results[CHANGED].ulps > 10_000
    assert results["lm_head.weight"].state == "different"


def test_what_is_missing_or_of_another_kind_is_found(out: Path) -> None:
    rewrite(out, CHANGED, lambda _: None)
    rewrite(out, COPIED, lambda tensor: tensor.float())
    report = verify(out)
    assert {result.tensor: result.state for result in report.wrong} == {CHANGED: "missing", COPIED: "another kind"}
    assert "model.safetensors.index.json is different" in report.files


def test_what_is_too_many_is_found(out: Path) -> None:
    index = json.loads((out / "model.safetensors.index.json").read_text())
    file = out / index["weight_map"][COPIED]
    save_file({**load_file(file), "more": torch.ones(3)}, file, metadata={"format": "pt"})
    index["weight_map"]["more"] = file.name
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [(result.tensor, result.state) for result in verify(out).wrong] == [("more", "extra")]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_what_stands_beside_the_weights_is_compared(out: Path, name: str) -> None:
    (out / name).write_text((out / name).read_text() + " ")
    assert verify(out).files == (f"{name} is different",)
    if name != "model.safetensors.index.json":
        (out / name).unlink()
        if name != "config.json":
            assert verify(out).files == (f"{name} is missing",)


def test_another_adapter_or_weight_is_different_and_said(out: Path, base: Path, adapter: Path, tmp_path: Path) -> None:
    other = make_adapter(tmp_path / "other", base, seed=9, target_modules=LINEARS["llama"])
    for given in ([(other, 0.7)], [(adapter, 0.6)]):
        report = verify(out, adapters=given)
        assert not report.ok
        assert len(report.wrong) == 14
        assert "is not one that was merged" in report.notes[0]
    assert verify(out, base, [(adapter, 0.7)]).ok


def test_another_base_is_different_and_said(out: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = tmp_path / "other"
    shutil.copytree(json.loads((out / "lorakit.json").read_text())["parents"][0]["path"], other)
    for file in other.glob("*.safetensors"):
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    report = verify(out, other)
    assert not report.ok
    assert "is not the one that was merged into" in report.notes[0]


def test_sources_that_are_gone_are_named_with_the_cure(out: Path, base: Path, adapter: Path, tmp_path: Path) -> None:
    record = json.loads((out / "lorakit.json").read_text())
    for kind, flag in (("base", "--base"), ("adapter", "--adapter")):
        spoilt = json.loads(json.dumps(record))
        for parent in spoilt["parents"]:
            if parent["kind"] == kind:
                parent |= {"path": "/no/where", "reference": "/no/where"}
        (out / "lorakit.json").write_text(json.dumps(spoilt))
        with pytest.raises(NotFound, match=f"/no/where.* is gone.*{flag}|is gone.*/no/where.*{flag}"):
            verify(out)
    assert verify(out, base, [(adapter, 0.7)]).ok


def test_a_folder_that_no_merge_wrote_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nothing says what was merged"):
        verify(base)
    lorakit.load_adapter(adapter).save(tmp_path / "saved")
    with pytest.raises(Refused, match="by `lorakit save`"):
        verify(tmp_path / "saved")


def elsewhere(out: Path) -> None:
    record = json.loads((out / "lorakit.json").read_text())
    record["settings"]["arithmetic"] = "torch 1.0, another processor"
    (out / "lorakit.json").write_text(json.dumps(record))


def test_a_tie_is_forgiven_only_where_the_machine_was_another_and_few_are(out: Path) -> None:
    rewrite(out, CHANGED, with_one_bit)
    elsewhere(out)
    report = verify(out)
    assert report.ok
    assert [(close.tensor, close.different, close.ulps) for close in report.close] == [(CHANGED, 1, 1)]
    assert "another processor" in report.notes[0]

    def many_bits(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.int16)[3, : tensor.numel() // 500] ^= 1
        return tensor

    rewrite(out, CHANGED, many_bits)
    assert [wrong.tensor for wrong in verify(out).wrong] == [CHANGED]


def test_a_copied_tensor_is_never_close(out: Path) -> None:
    rewrite(out, COPIED, with_one_bit)
    elsewhere(out)
    assert [wrong.tensor for wrong in verify(out).wrong] == [COPIED]


def test_the_float64_formula_finds_what_the_executor_repeats(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same mistake in the merge and in the verification: only the independent check sees it."""
    from lorakit.merge.apply import Stepper

    right = Stepper.applied
    monkeypatch.setattr(Stepper, "applied", lambda self, total, first: right(self, total, first).mul_(1.02))
    merge(base, [adapter], out=tmp_path / "out", device="cpu")
    report = verify(tmp_path / "out")
    assert len(report.wrong) == 14
    assert all("not what float64 says" in wrong.reason for wrong in report.wrong)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_ulps_are_steps_between_neighbours(dtype: str, torch_dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, -1.0, 0.0, 2.0, -3.0], dtype=torch_dtype)
    for towards, steps in ((torch.inf, 1), (-torch.inf, 1), (torch.inf, 3)):
        moved = values.clone()
        for _ in range(steps):
            moved = torch.nextafter(moved, torch.tensor(towards, dtype=torch_dtype))
        difference = Difference()
        difference.add(*(memoryview(bytes(one.view(torch.uint8).numpy())) for one in (values, moved)), dtype)
        assert (difference.elements, difference.different, difference.ulps) == (5, 5, steps + (towards < 0))


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_wide_numbers_are_compared_by_their_norm_too(dtype: str) -> None:
    one = np.linspace(1, 2, 100, dtype="f4" if dtype == "F32" else "f8")
    other = np.nextafter(one, np.inf, dtype=one.dtype)
    difference = Difference()
    difference.add(memoryview(one.tobytes()), memoryview(other.tobytes()), dtype)
    assert (difference.different, difference.ulps) == (100, 1)
    assert difference.relative == pytest.approx(float(np.linalg.norm(other - one) / np.linalg.norm(one)), rel=0.01)


def test_a_sampled_row_is_the_first_the_last_or_between() -> None:
    assert spot_check.sampled_rows(0) == []
    assert spot_check.sampled_rows(1) == [0]
    assert spot_check.sampled_rows(100) == [0, 33, 66, 99]


def test_only_blocks_are_held(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.merge import compare

    monkeypatch.setattr(compare, "BLOCK", 1000)
    monkeypatch.setattr(blocks, "CPU_BLOCK", 4000)
    seen: list[tuple[int, int]] = []
    assert verify(out, workers=1, progress=lambda done, total: seen.append((done, total))).ok
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)
    assert max(after[0] - before[0] for before, after in pairwise(seen)) < 60_000
