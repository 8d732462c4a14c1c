"""Adapters that were saved as pickles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorakit.convert.adapters import pickled as pickled_adapters
from lorakit.convert.adapters.pickled import as_safetensors
from lorakit.errors import InvalidFile, Refused


def pickled(folder: Path, value: Any, name: str = "adapter_model.bin", **how: Any) -> Path:
    folder.mkdir()
    torch.save(value, folder / name, **how)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_the_tensors_are_the_same_in_both_of_torchs_formats(tmp_path: Path, zipped: bool) -> None:
    whole = torch.randn(6, 4)
    tensors = {
        "a": torch.randn(3, 2), "b": torch.randn(2, 2).bfloat16(), "turned": whole.T, "part": whole[1:3],
        "empty": torch.empty(0, 2), "kept": torch.nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    folder = pickled(tmp_path / "a", tensors, _use_new_zipfile_serialization=zipped)
    as_safetensors(folder, tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == (folder / "adapter_config.json").read_bytes()


def test_a_large_table_is_copied_in_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled_adapters, "ELEMENTS", 7)
    tensors = {"table": torch.randn(11, 5).half(), "turned": torch.randn(5, 9).T, "one": torch.tensor(3.0)}
    as_safetensors(pickled(tmp_path / "a", tensors), tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("value", [[torch.ones(2)], {"a": 3}, {"state": {"a": torch.ones(2)}}, 5])
def test_what_is_more_than_tensors_by_their_names_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(InvalidFile, match="more than an adapter's tensors"):
        as_safetensors(pickled(tmp_path / "a", value), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_nothing_in_it_runs(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "a", {"w": torch.ones(2), "x": Attack(tmp_path / "ran")})
    with pytest.raises(Refused):
        as_safetensors(folder, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
