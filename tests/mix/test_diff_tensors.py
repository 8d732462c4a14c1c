"""What changed from one checkpoint to the next, whatever wrote them."""

from __future__ import annotations

import json
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import lorakit
from lorakit.errors import Conflict, UsageError
from lorakit.mix import diff_tensors as diffing
from tests.folders import base_tensors, write_base

UP = "model.layers.0.mlp.up_proj.weight"


def tuned(folder: Path, by: float = 0.1, **others: Any) -> Path:
    return write_base(folder, {**base_tensors(), UP: base_tensors()[UP] * np.float32(1 + by), **others})


def training(file: Path, steps: int) -> Path:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    for _ in range(steps):
        model(torch.ones(1, 4)).square().sum().backward()
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": steps, "loss": nan}, file)
    return file


def test_models_are_compared_tensor_by_tensor(tmp_path: Path) -> None:
    report = lorakit.diff_tensors(write_base(tmp_path / "base", shards=3), tuned(tmp_path / "tuned"))
    stage = report.stages[1]
    assert (stage.count("equal"), stage.count("different"), stage.tensors) == (9, 1, 10)
    (most,) = stage.most_changed()
    assert (most.name, most.state) == (UP, "different")
    assert most.change is not None
    assert most.change.lost == pytest.approx(0.1)
    assert most.change.cosine == pytest.approx(1)
    (group,) = stage.groups()
    whole = np.concatenate([one.ravel() for one in base_tensors().values()])
    assert group.change is not None
    assert group.change.before == pytest.approx((whole.astype("float64") ** 2).sum())
    assert group.change.lost == pytest.approx(0.1 * np.linalg.norm(base_tensors()[UP]) / np.linalg.norm(whole))


def test_the_format_makes_no_difference(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", shards=2)
    state = {name: torch.from_numpy(one) for name, one in base_tensors().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    stage = lorakit.diff_tensors(folder, tmp_path / "pytorch_model.bin").stages[1]
    assert stage.count("equal") == len(stage.changes) == 10


def test_training_changes_weights_moments_and_numbers(tmp_path: Path) -> None:
    report = lorakit.diff_tensors(training(tmp_path / "1.pt", 1), training(tmp_path / "3.pt", 3))
    stage = report.stages[1]
    groups = {group.name: group for group in stage.groups()}
    assert groups.keys() == {"model", "optimizer"}
    assert [one.count("different") for one in groups.values()] == [2, 6]
    assert [(one.name, one.before, one.after) for one in stage.values] == [("step", 1, 3)]
    assert lorakit.diff_tensors(tmp_path / "3.pt", tmp_path / "3.pt").stages[1].values == ()


def test_what_came_went_or_changed_its_shape_stands_first(tmp_path: Path) -> None:
    before = tuned(tmp_path / "before", gone=np.ones(2, "float32"), turned=np.ones((2, 3), "float32"))
    after = tuned(tmp_path / "after", 0.2, new=np.ones(2, "float32"), turned=np.ones((3, 2), "float32"))
    stage = lorakit.diff_tensors(before, after).stages[1]
    assert [(one.name, one.state) for one in stage.most_changed()] == [
        ("gone", "only_before"), ("turned", "reshaped"), ("new", "only_after"), (UP, "different"),
    ]  # fmt: skip


def test_stages_are_each_compared_with_the_one_before(tmp_path: Path) -> None:
    stages = [tuned(tmp_path / name, by) for name, by in (("first", 0.0), ("second", 0.1), ("third", 0.1))]
    report = lorakit.diff_tensors(*stages)
    assert [stage.path for stage in report.stages] == list(map(str, stages))
    assert [stage.count("different") for stage in report.stages] == [0, 1, 0]


@pytest.mark.parametrize("pattern", ["*.up_proj.*", "up_proj", "up_proj.weight"])
def test_tensors_can_be_picked(tmp_path: Path, pattern: str) -> None:
    report = lorakit.diff_tensors(write_base(tmp_path / "base"), tuned(tmp_path / "tuned"), pattern=pattern)
    assert [one.name for one in report.stages[1].changes] == [UP, UP.replace("layers.0", "layers.1")]
    with pytest.raises(UsageError, match="no tensor matches"):
        lorakit.diff_tensors(tmp_path / "base", tmp_path / "tuned", pattern="nothing")


def test_strangers_are_said_to_be_some(tmp_path: Path) -> None:
    report = lorakit.diff_tensors(write_base(tmp_path / "base"), training(tmp_path / "it.pt", 1))
    (note,) = report.notes
    assert "no tensor of the same name" in note
    assert [group.change for group in report.stages[1].groups()] == [None, None, None]


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex32, torch.qint8, torch.bits8])
@pytest.mark.filterwarnings("ignore:ComplexHalf support", "ignore:torch.quantize_per_tensor")
@pytest.mark.usefixtures("plain_modules")
def test_a_tensor_of_any_dtype_is_looked_at(tmp_path: Path, dtype: torch.dtype) -> None:
    for number in (1, 2):
        if dtype == torch.qint8:
            tensor = torch.quantize_per_tensor(torch.full((4,), float(number)), 0.1, 0, dtype)
        elif dtype == torch.bits8:
            tensor = torch.full((4,), number, dtype=torch.uint8).view(dtype)
        else:
            tensor = torch.full((4,), number, dtype=dtype)
        torch.save({"w": torch.ones(2), "rope": tensor}, tmp_path / f"{number}.pt")
    for other, state in ((1, "equal"), (2, "different")):
        stage = lorakit.diff_tensors(tmp_path / "1.pt", tmp_path / f"{other}.pt").stages[1]
        assert [(one.name, one.state) for one in stage.changes] == [("w", "equal"), ("rope", state)]


def test_tensors_that_are_in_no_sum_are_counted_and_named(tmp_path: Path) -> None:
    same = {"same": torch.ones(4), "shape": torch.ones(2)}
    save_file(
        {**same, "broken": torch.ones(3), "vast": torch.ones(1), "gone": torch.ones(1)}, tmp_path / "1.safetensors"
    )
    after = {"broken": torch.tensor([1.0, nan, 1.0]), "vast": torch.tensor([1e200], dtype=torch.float64)}
    save_file({**same, **after, "shape": torch.ones(3)}, tmp_path / "2.safetensors")
    report = lorakit.diff_tensors(tmp_path / "1.safetensors", tmp_path / "2.safetensors")
    (group,) = report.stages[1].groups()
    assert group.change is not None
    assert (group.change.before, group.as_dict()["not_counted"]) == (4.0, 4)
    assert set(group.not_counted) == {"broken", "vast", "gone", "shape"}
    (note,) = report.notes
    assert all(repr(name) in note for name in group.not_counted)


def test_a_file_that_changes_meanwhile_is_a_conflict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "it.safetensors"
    save_file({"w": torch.ones(3)}, file)

    def written_again(*args: Any) -> Any:
        save_file({"w": torch.zeros(4)}, file)
        return ()

    monkeypatch.setattr(diffing, "tensor_changes", written_again)
    with pytest.raises(Conflict, match="written again"):
        lorakit.diff_tensors(file, file)


def test_the_report_is_data(tmp_path: Path) -> None:
    first, second = training(tmp_path / "1.pt", 1), training(tmp_path / "3.pt", 3)
    torch.save({"other": torch.ones(2), "rate": nan, "z": 1j, "none": [nan]}, tmp_path / "other.pt")
    data = json.loads(json.dumps(lorakit.diff_tensors(first, second, tmp_path / "other.pt").as_dict(), allow_nan=False))
    assert data["stages"][0]["changes"] == []
    assert data["stages"][1]["values"] == [{"value": "step", "state": "different", "before": 1, "after": 3}]
    assert {"value": "step", "state": "only_before", "before": 3, "after": None} in data["stages"][2]["values"]
    assert {"value": "rate", "state": "only_after", "before": None, "after": "nan"} in data["stages"][2]["values"]
    assert data["stages"][1]["groups"][0].keys() == {
        "group", "tensors", "not_counted", "norms", "difference", "lost", "cosine", "largest",
    }  # fmt: skip
