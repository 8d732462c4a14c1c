"""What is saved is what PEFT loads: the same deltas, one rank, one scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from lorakit.adapters.reading import load_adapter
from lorakit.adapters.writing import write_adapter_files
from lorakit.errors import Conflict
from tests.folders import factors, leftovers, write_adapter

MODULES = {"model.layers.0.self_attn.q_proj": (8, 8), "model.layers.1.self_attn.q_proj": (8, 8)}


def dense(folder: Path, module: str) -> Any:
    """The delta by the rules of the format alone: one alpha, one r."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"].astype("float64") for part in "AB")
    assert not config.get("rank_pattern")
    assert a.shape[0] == config["r"]
    return config["lora_alpha"] / config["r"] * (b @ a)


@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"lora_alpha": 3}, {"alpha_pattern": {"layers.1.self_attn.q_proj": 100}}]
)
def test_a_saved_adapter_has_the_same_deltas(tmp_path: Path, config: dict[str, Any]) -> None:
    adapter = load_adapter(write_adapter(tmp_path / "a", factors(MODULES), **config))
    adapter.save(tmp_path / "b")
    for module in MODULES:
        np.testing.assert_allclose(dense(tmp_path / "b", module), adapter.delta(module).dense(), rtol=1e-6, atol=1e-7)


def test_smaller_ranks_are_filled_with_zeros(tmp_path: Path) -> None:
    first, second = MODULES
    tensors = factors({first: (8, 8)}, rank=2) | factors({second: (8, 8)}, rank=5)
    folder = write_adapter(tmp_path / "a", tensors, rank=2, rank_pattern={"layers.1.self_attn.q_proj": 5})
    adapter = load_adapter(folder)
    adapter.save(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["r"] == 5
    for module in MODULES:
        np.testing.assert_allclose(dense(tmp_path / "b", module), adapter.delta(module).dense(), rtol=1e-6, atol=1e-7)


def test_the_config_keeps_task_and_base_and_names_each_module(tmp_path: Path) -> None:
    adapter = load_adapter(write_adapter(tmp_path / "a", factors(MODULES), base_model_name_or_path="org/base"))
    adapter.save(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "org/base")
    assert config["target_modules"] == sorted(MODULES)


def test_a_copy_of_the_base_is_written_as_it_is(tmp_path: Path) -> None:
    name = "base_model.model.lm_head.base_layer.weight"
    rows = np.arange(6, dtype="float16").reshape(2, 3)
    adapter = load_adapter(write_adapter(tmp_path / "a", factors(MODULES) | {name: rows}))
    (2 * adapter).save(tmp_path / "b")
    np.testing.assert_array_equal(load_file(tmp_path / "b" / "adapter_model.safetensors")[name], rows)


def test_modules_can_be_renamed(tmp_path: Path) -> None:
    adapter = load_adapter(write_adapter(tmp_path / "a", factors(MODULES)))
    first, second = MODULES
    (tmp_path / "b").mkdir()
    write_adapter_files(adapter, tmp_path / "b", rename={first: "moved.q_proj"})
    assert sorted(load_adapter(tmp_path / "b").modules) == [second, "moved.q_proj"]
    np.testing.assert_allclose(dense(tmp_path / "b", "moved.q_proj"), adapter.delta(first).dense(), rtol=1e-6)
    np.testing.assert_allclose(dense(tmp_path / "b", second), adapter.delta(second).dense(), rtol=1e-6)


def test_a_folder_that_exists_is_kept(tmp_path: Path) -> None:
    adapter = load_adapter(write_adapter(tmp_path / "a"))
    with pytest.raises(Conflict):
        adapter.save(tmp_path / "a")
    assert not leftovers(tmp_path)
