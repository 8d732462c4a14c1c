"""What changed from one adapter to the next: bits of tensors, and what the deltas add to the base."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit
import lorakit.errors
from lorakit.mix import changes
from tests.folders import factors, linear_modules, stored, write_adapter, write_base
from tests.mix.test_compare import UP, dense

Array = np.ndarray[Any, Any]
NAME = f"base_model.model.{UP}.lora_B.weight"


def truncated(folder: Path, target: Path, rank: int) -> Path:
    """The best adapter of that rank, by full SVDs."""
    tensors = {}
    for module, delta in dense(folder).items():
        u, s, vh = np.linalg.svd(delta)
        tensors[f"base_model.model.{module}.lora_B.weight"] = (u[:, :rank] * s[:rank]).astype("float32")
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(vh[:rank]).astype("float32")
    return write_adapter(target, tensors, rank=rank, lora_alpha=rank)


def moved(folder: Path, target: Path, by: float) -> Path:
    tensors = stored(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    changed = {name: value * (1 + by) if "lora_B" in name else value for name, value in tensors.items()}
    return write_adapter(target, changed, rank=config["r"], lora_alpha=config["lora_alpha"])


@pytest.fixture
def exact(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "exact", factors(linear_modules(), rank=4, seed=1), rank=4)


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ranks=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 99),
)
def test_deltas_of_any_ranks_differ_as_dense_matrices_do(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int], ranks: tuple[int, int], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("diff")
    pair = [
        write_adapter(folder / f"{number}", factors({"m": shape}, rank, seed=seed + number), rank=rank)
        for number, rank in enumerate(ranks)
    ]
    report = lorakit.diff(*pair)
    one, two = (dense(path)["m"] for path in pair)
    module = report.modules["m"]
    change = module.since_previous[1]
    assert change is not None
    assert change.lost == pytest.approx(np.linalg.norm(one - two) / np.linalg.norm(one))
    assert change.cosine == pytest.approx((one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two))
    for stage, matrix in zip(module.stages, (one, two), strict=True):
        assert stage is not None
        assert (stage.shape, stage.rank) == (shape, np.linalg.matrix_rank(matrix, rtol=1e-6))
        assert stage.spectrum == pytest.approx(np.linalg.svd(matrix)[1][: len(stage.spectrum)].tolist(), abs=1e-9)
    assert report.stages[1].lost == pytest.approx(change.lost)


@pytest.mark.parametrize("by", [1e-3, 1e-7, 1e-12])
def test_a_small_difference_is_not_lost_among_large_norms(tmp_path: Path, by: float) -> None:
    doubles = {name: value.astype("float64") for name, value in factors(linear_modules(), seed=1).items()}
    one = write_adapter(tmp_path / "one", doubles)
    report = lorakit.diff(one, moved(one, tmp_path / "two", by))
    assert report.stages[1].lost == pytest.approx(by, rel=1e-3)


def test_the_same_adapter_lost_nothing(exact: Path) -> None:
    report = lorakit.diff(exact, exact)
    assert report.stages[1].lost == 0
    assert report.stages[1].count("equal") == len(report.stages[1].tensors) == 12


def test_other_factors_of_the_same_delta_are_the_same_delta(exact: Path, tmp_path: Path) -> None:
    report = lorakit.diff(exact, truncated(exact, tmp_path / "turned", 8))
    assert report.stages[1].count("reshaped") == 12
    assert report.stages[1].lost == pytest.approx(0, abs=1e-6)
    assert [(stage.factor_rank, stage.rank) for stage in report.modules[UP].stages if stage] == [(4, 4), (8, 4)]


def test_each_stage_says_what_was_lost_since_the_one_before_and_since_the_first(exact: Path, tmp_path: Path) -> None:
    stages = [exact, truncated(exact, tmp_path / "rank-2", 2)]
    stages.append(moved(stages[1], tmp_path / "tuned", 0.25))
    report = lorakit.diff(*stages)
    first, second, third = (
        np.concatenate([delta.ravel() for _, delta in sorted(dense(path).items())]) for path in stages
    )

    def lost(one: Array, two: Array) -> float:
        return float(np.linalg.norm(one - two) / np.linalg.norm(one))

    assert [stage.lost for stage in report.stages] == [None, pytest.approx(lost(first, second)), pytest.approx(0.25)]
    assert report.stages[2].lost_since_first == pytest.approx(lost(first, third))
    tail = [np.linalg.svd(delta)[1][2:4] for delta in dense(exact).values()]
    assert report.stages[1].lost == pytest.approx(np.linalg.norm(tail) / np.linalg.norm(first), rel=1e-5)
    assert [stage.norm for stage in report.stages] == pytest.approx([np.linalg.norm(x) for x in (first, second, third)])
    assert [stage.rank for stage in report.stages] == [4, 2, 2]
    everything = sorted((s for delta in dense(exact).values() for s in np.linalg.svd(delta)[1][:4]), reverse=True)
    assert report.spectrum(0) == pytest.approx(everything)
    assert len(report.spectrum(1)) == 12


def test_modules_that_come_and_go_are_lost_or_new(exact: Path, tmp_path: Path) -> None:
    up = write_adapter(tmp_path / "up", {name: value for name, value in stored(exact).items() if UP in name}, rank=4)
    report = lorakit.diff(up, exact, up)
    deltas = dense(exact)
    others = sqrt(sum((delta**2).sum() for module, delta in deltas.items() if module != UP))
    assert report.stages[1].lost == pytest.approx(others / np.linalg.norm(deltas[UP]))
    assert report.stages[2].lost == pytest.approx(others / sqrt(others**2 + (deltas[UP] ** 2).sum()))
    assert report.stages[2].lost_since_first == 0
    assert [stage.modules for stage in report.stages] == [1, 6, 1]
    name, module = report.most_changed()[0]
    assert name != UP
    assert (module.stages[0], module.stages[2]) == (None, None)
    assert [report.stages[1].count(state) for state in ("equal", "only_after", "only_before")] == [2, 10, 0]
    assert [report.stages[2].count(state) for state in ("equal", "only_after", "only_before")] == [2, 0, 10]


@pytest.mark.parametrize(
    ("change", "state", "largest"),
    [
        (lambda b: b, "equal", 0.0),
        (lambda b: b * np.float32(1 + 2**-20), "close", None),
        (lambda b: b.astype("float64"), "close", 0.0),
        (lambda b: b + np.float32(0.5), "different", 0.5),
    ],
    ids=["same", "a little", "another dtype", "a lot"],
)
def test_a_tensor_is_equal_close_or_different(
    exact: Path, tmp_path: Path, change: Any, state: str, largest: float | None
) -> None:
    tensors = stored(exact)
    before, tensors[NAME] = tensors[NAME], change(tensors[NAME])
    report = lorakit.diff(exact, write_adapter(tmp_path / "changed", tensors, rank=4))
    found = {tensor.name: tensor for tensor in report.stages[1].tensors}
    expected = float(np.abs(tensors[NAME].astype("float64") - before.astype("float64")).max())
    assert (found.pop(NAME).largest, {tensor.state for tensor in found.values()}) == (expected, {"equal"})
    assert largest is None or expected == pytest.approx(largest, rel=1e-5)
    assert report.stages[1].count(state) == (12 if state == "equal" else 1)  # type: ignore[arg-type]


def test_closeness_is_numpys_allclose_over_block_borders(
    exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "_BLOCK", 7)
    for last in (1e-7, 1.0):
        tensors = stored(exact)
        tensors[NAME][-1, -1] += last
        report = lorakit.diff(exact, write_adapter(tmp_path / f"{last}", tensors, rank=4))
        (found,) = [tensor for tensor in report.stages[1].tensors if tensor.name == NAME]
        close = np.allclose(tensors[NAME].astype("float64"), stored(exact)[NAME].astype("float64"))
        assert found.state == ("close" if close else "different")


def test_modules_of_other_shapes_stand_in_no_sum(exact: Path, tmp_path: Path) -> None:
    shapes = {**linear_modules(), UP: (13, 8)}
    other = write_adapter(tmp_path / "other", factors(shapes, rank=4, seed=1), rank=4)
    report = lorakit.diff(exact, other)
    assert report.modules[UP].since_previous == (None, None)
    assert report.notes == (f"the shapes differ at '{UP}': their change is in no sum",)
    change = report.stages[1].since_previous
    assert change is not None
    without = [(delta**2).sum() for module, delta in dense(exact).items() if module != UP]
    assert change.before == pytest.approx(sum(without))
    found = {tensor.name: (tensor.state, tensor.largest) for tensor in report.stages[1].tensors}
    assert found[NAME] == ("reshaped", None)


def test_modules_can_be_picked(exact: Path, tmp_path: Path) -> None:
    report = lorakit.diff(exact, truncated(exact, tmp_path / "low", 2), modules=UP)
    assert list(report.modules) == [UP]
    assert report.stages[0].norm == pytest.approx(np.linalg.norm(dense(exact)[UP]))
    assert len(report.stages[1].tensors) == 12


def test_what_is_more_than_factors_is_compared_as_tensors_and_said(exact: Path, tmp_path: Path) -> None:
    head = np.ones((3, 8), "float32")
    tuned = write_adapter(
        tmp_path / "tuned", {**stored(exact), "base_model.model.score.weight": head}, rank=4, modules_to_save=["score"]
    )
    report = lorakit.diff(exact, tuned)
    assert report.stages[1].lost == 0
    assert report.stages[1].count("only_after") == 1
    assert len(report.notes) == 1
    assert "score" in report.notes[0]
    assert "low-rank factors alone are compared" in report.notes[0]


def test_the_report_is_data(exact: Path, tmp_path: Path) -> None:
    up = write_adapter(tmp_path / "up", {name: value for name, value in stored(exact).items() if UP in name}, rank=4)
    data = json.loads(json.dumps(lorakit.diff(up, exact).as_dict(), allow_nan=False))
    assert [stage["modules"] for stage in data["stages"]] == [1, 6]
    assert [stage["lost"] for stage in data["modules"][UP]] == [None, 0.0]
    assert len(data["modules"][UP][0]["leading"]) == 4
    gone = next(stages for name, stages in data["modules"].items() if name != UP)
    assert gone[0] is None
    assert gone[1]["lost"] is None
    tensor = data["stages"][1]["tensors"][0]
    assert tensor["tensor"] in stored(exact)
    assert tensor.keys() == {
        "tensor", "state", "before", "after", "largest", "norms", "difference", "lost", "cosine",
    }  # fmt: skip


def test_only_adapters_are_taken(exact: Path, tmp_path: Path) -> None:
    with pytest.raises(lorakit.errors.Refused, match=r"lorakit\.diff_tensors takes those"):
        lorakit.diff(exact, write_base(tmp_path / "base"))
    with pytest.raises(lorakit.errors.NotFound):
        lorakit.diff(exact, tmp_path / "nowhere")
    with pytest.raises(lorakit.errors.UsageError, match="no module matches"):
        lorakit.diff(exact, exact, modules="nothing")
