"""What is written, bit for bit: copied where nothing changes, rounded once where the dtype does."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorakit.convert import writer
from lorakit.convert.placing import PartOf
from lorakit.convert.planning import ConvertPlan, PlannedTensor, in_shards
from lorakit.convert.source import ByteRun, PlainTensor
from lorakit.convert.writer import write_shards
from lorakit.errors import InvalidFile, NotFound, Refused
from lorakit.files.safetensors import read_header

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def plan_of(
    folder: Path, tensors: dict[str, torch.Tensor], dtype: str | None = None, most: int = 1 << 40
) -> ConvertPlan:
    save_file(tensors, folder / "source.safetensors")
    stored = read_header(folder / "source.safetensors").tensors
    planned = [
        PlannedTensor(name, kept, PlainTensor(one), ((name, kept, one.shape),))
        for name, one in stored.items()
        for kept in (dtype or one.dtype,)
    ]
    return ConvertPlan(in_shards(planned, most), {}, {}, {})


def written(plan: ConvertPlan, folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    write_shards(plan, folder)
    return {name: tensor for shard in plan.shards for name, tensor in load_file(folder / shard.name).items()}


@pytest.mark.parametrize("most", [1 << 40, 5000, 1])
def test_bytes_stay_as_they_are_however_the_files_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(writer, "COPY_BLOCK", 1000)
    tensors = {
        "odd": torch.randn(7, 33).bfloat16(), "bits": torch.randint(0, 2, (5,)).bool(), "none": torch.empty(0, 4),
        "nan": torch.tensor([float("nan"), -0.0]), "number": torch.tensor(3.0),
        "eight": torch.randn(9).to(torch.float8_e4m3fn),
    }  # fmt: skip
    plan = plan_of(tmp_path, tensors, most=most)
    assert len(plan.shards) == {1: 5, 5000: 1, 1 << 40: 1}[most] + (most == 1)
    found = written(plan, tmp_path / "out")
    for name, tensor in tensors.items():
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_change_of_dtype_is_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(writer, "BLOCK", 100)
    tensors = {"wide": torch.randn(33, 7), "half": torch.randn(33, 7).half(), "brain": torch.randn(150).bfloat16()}
    found = written(plan_of(tmp_path, tensors, dtype), tmp_path / "out")
    assert all(torch.equal(found[name], tensor.to(DTYPES[dtype])) for name, tensor in tensors.items())


@given(value=st.floats(allow_nan=False, width=64), dtype=st.sampled_from(["BF16", "F16"]))
def test_float64_is_rounded_once(value: float, dtype: str) -> None:
    """By way of float32, what lies just beside the middle between two 16-bit numbers may go to the wrong one."""
    kind = DTYPES[dtype]
    tensor = torch.tensor([value], dtype=torch.float64)
    planned = PlannedTensor("it", dtype, PartOf(None, 0, (1,)), (("it", dtype, (1,)),))  # type: ignore[arg-type]
    try:
        rounded = writer._rounded(planned, tensor)
    except Refused:
        assert dtype == "F16"
        assert abs(value) > 65000
        return
    if not rounded.isfinite().all():
        assert abs(value) > torch.finfo(kind).max
        return
    code = int(rounded.view(torch.int16))
    exact = Fraction(value)
    near = torch.tensor([max(-32768, code - 1), code, min(32767, code + 1)], dtype=torch.int16).view(kind)
    distances = [abs(Fraction(float(one)) - exact) for one in near if one.isfinite()]
    assert abs(Fraction(float(rounded)) - exact) == min(distances)


def test_the_middle_is_left_by_what_is_beyond_float32() -> None:
    beside = 1 + 2**-8 + 2**-40  # just above the middle of two bf16 numbers; float32 drops the last term
    planned = PlannedTensor("it", "BF16", PartOf(None, 0, (2,)), (("it", "BF16", (2,)),))  # type: ignore[arg-type]
    rounded = writer._rounded(planned, torch.tensor([beside, -beside], dtype=torch.float64))
    assert rounded.tolist() == [1 + 2**-7, -1 - 2**-7]


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"large": torch.tensor([1.0, 7e4])}, "F16")
    with pytest.raises(Refused, match=r"'large'.*--dtype bf16"):
        written(plan, tmp_path / "out")


def test_a_part_of_a_tensor_is_a_part_of_its_bytes(tmp_path: Path) -> None:
    save_file({"all": torch.arange(24.0)}, tmp_path / "source.safetensors")
    whole = PlainTensor(read_header(tmp_path / "source.safetensors").tensors["all"])
    part = PartOf(whole, 6, (2, 3))
    (run,) = part.byte_runs() or ()
    assert run == ByteRun(whole.stored.file, whole.stored.start + 24, 24)
    plan = ConvertPlan(in_shards([PlannedTensor("part", "F32", part, (("part", "F32", (2, 3)),))], 100), {}, {}, {})
    assert written(plan, tmp_path / "out")["part"].tolist() == [[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]


@pytest.mark.parametrize(("then", "error"), [("gone", NotFound), ("shorter", InvalidFile)])
@pytest.mark.parametrize("dtype", [None, "BF16"])
def test_a_source_that_changes_meanwhile_stops_the_work(
    tmp_path: Path, then: str, error: type[Exception], dtype: str | None
) -> None:
    plan = plan_of(tmp_path, {"it": torch.randn(100)}, dtype)
    if then == "gone":
        (tmp_path / "source.safetensors").unlink()
    else:
        (tmp_path / "source.safetensors").write_bytes(b"")
    with pytest.raises(error):
        written(plan, tmp_path / "out")


@pytest.mark.parametrize("kind", ["fp8", "int8", "w4a16"])
def test_a_matrix_that_is_quantised_in_blocks_of_rows_is_that_which_is_quantised_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The oracle is the library, given the whole matrix."""
    from lorakit.merge.quantised import Quantiser

    monkeypatch.setattr(writer, "BLOCK", 1000)
    torch.manual_seed(0)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = {name: torch.randn(37, 128).bfloat16()}
    plan = plan_of(tmp_path, tensors)
    (planned,) = plan.shards[0].tensors
    quantiser = Quantiser.of(kind, {}, planned.written)
    planned = replace(planned, written=tuple(quantiser.planned(name, "BF16", (37, 128)) or ()))
    found = written(ConvertPlan(in_shards([planned], 1 << 40), {}, {}, {}, quantiser), tmp_path / "out")
    whole = quantiser.quantise(name, "BF16", tensors[name])
    assert found.keys() == whole.keys()
    for part, tensor in whole.items():
        assert torch.equal(found[part].view(torch.uint8), tensor.view(torch.uint8)), part
