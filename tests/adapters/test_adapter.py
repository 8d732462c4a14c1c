"""An adapter is opened whole or refused; sums of adapters are values."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.adapters.reading import load_adapter
from lorakit.errors import Conflict, Incomplete, InvalidFile, NotFound, UnsupportedAdapter
from tests.folders import factors, linear_modules, write_adapter

MODULE = "model.layers.0.self_attn.q_proj"
ONE = {MODULE: (8, 8)}
COPY = "base_model.model.model.embed_tokens.base_layer.weight"


def test_opening_reads_headers_and_no_tensor(tmp_path: Path) -> None:
    adapter = load_adapter(write_adapter(tmp_path / "a", rank=3, base_model_name_or_path="org/base"))
    assert (adapter.rank, adapter.base, adapter.modules) == (3, "org/base", tuple(sorted(linear_modules())))
    assert adapter.delta(f"base_model.model.{MODULE}.weight") == adapter.delta(MODULE)
    assert "rank=3" in repr(adapter)


def test_a_module_that_it_leaves_alone(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no delta for 'model\.layers\.0\.self_attn\.q_prok'; nearest: .*q_proj"):
        load_adapter(write_adapter(tmp_path / "a")).delta(MODULE[:-1] + "k")


def test_no_folder_and_an_unfinished_one(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no adapter folder"):
        load_adapter(tmp_path / "a")
    (write_adapter(tmp_path / "a") / "checkpoint-is-incomplete.txt").touch()
    with pytest.raises(Incomplete, match="still being written"):
        load_adapter(tmp_path / "a")


def test_missing_and_pickled_weights(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InvalidFile, match="it is incomplete"):
        load_adapter(folder)
    (folder / "adapter_model.bin").touch()
    with pytest.raises(InvalidFile, match=r"adapter_model\.bin, a pickle"):
        load_adapter(folder)


def test_truncated_weights(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    for size in (file.stat().st_size - 1, 100, 3, 0):
        os.truncate(file, size)
        with pytest.raises(InvalidFile, match="cut short"):
            load_adapter(folder)


@pytest.mark.parametrize(
    ("tensors", "config", "reason"),
    [
        ({}, {}, "holds no tensor"),
        ({f"base_model.model.{MODULE}.lora_A.weight": np.ones((2, 8))}, {}, "has no lora_B"),
        ({f"base_model.model.{MODULE}.lora_B.weight": np.ones((8, 2))}, {}, "has no lora_A"),
        (factors(ONE, rank=3), {}, "has rank 3, but its config says 2"),
        (factors(ONE, rank=2), {"rank_pattern": {"q_proj": 4}}, "has rank 2, but its config says 4"),
        (factors(ONE) | {f"base_model.model.{MODULE}.lora_B.weight": np.ones((8, 3))}, {}, "don't fit"),
        (factors(ONE) | {f"{MODULE}.lora_A.default.weight": np.ones((2, 8))}, {}, "name the same factor"),
        (
            {f"{MODULE}.lora_A.one.weight": np.ones((2, 8)), f"{MODULE}.lora_B.two.weight": np.ones((8, 2))}, {},
            "several adapters in one file",
        ),
    ],
)  # fmt: skip
def test_contradictions_are_refused(
    tmp_path: Path, tensors: dict[str, Any], config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InvalidFile, match=reason):
        load_adapter(write_adapter(tmp_path / "a", tensors, rank=2, **config))


def test_raw_names_are_read_as_todays(tmp_path: Path) -> None:
    today = factors(ONE)
    raw = {name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): t for name, t in today.items()}
    one, two = (load_adapter(write_adapter(tmp_path / str(i), tensors)) for i, tensors in enumerate([today, raw]))
    assert (one.delta(MODULE).dense() == two.delta(MODULE).dense()).all()


def test_what_is_no_factor_is_kept_and_named(tmp_path: Path) -> None:
    odd = {f"base_model.model.{MODULE}.lora_magnitude_vector": np.ones(8)}
    adapter = load_adapter(write_adapter(tmp_path / "a", factors(ONE) | odd, use_dora=True))
    assert [stored.name for stored in adapter.others] == list(odd)
    for refused in (lambda: adapter * 2, lambda: adapter + adapter, lambda: adapter.save(tmp_path / "out")):
        with pytest.raises(UnsupportedAdapter, match=r"use_dora; the tensors .*lora_magnitude_vector"):
            refused()


def test_the_algebra_is_that_of_vectors(tmp_path: Path) -> None:
    a = load_adapter(write_adapter(tmp_path / "a", factors(ONE, seed=1)))
    b = load_adapter(write_adapter(tmp_path / "b", factors(ONE | {"lm_head": (16, 8)}, rank=3, seed=2), rank=3))
    da, db = a.delta(MODULE).dense(), b.delta(MODULE).dense()
    for value, dense in (
        (0.7 * a + 0.3 * b, 0.7 * da + 0.3 * db),
        (a - b, da - db),
        (-a, -da),
        (a / 4, da / 4),
        (sum([a, b, a]), 2 * da + db),
        ((a + b) * 2 - a, da + 2 * db),
    ):
        np.testing.assert_allclose(value.delta(MODULE).dense(), dense, atol=1e-12)
    assert (a + b).rank == 5
    assert sorted((a + b).modules) == ["lm_head", MODULE]
    assert [source.weight for source in (0.7 * a + 0.3 * b + a).sources] == [1.7, 0.3]


def test_parts_of_an_adapter_and_weights_by_module(tmp_path: Path) -> None:
    a = load_adapter(write_adapter(tmp_path / "a", factors(linear_modules())))
    up, query = "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"
    assert set(a.only("*.mlp.*").modules) | set(a.without("*.mlp.*").modules) == set(a.modules)
    assert set(a.only("up_proj", "q_proj").modules) == {m for m in a.modules if m.endswith(("up_proj", "q_proj"))}
    value = a.scaled({"*.self_attn.*": 0.8, "*": 0.4}) - 0.4 * a.only("*.mlp.*")
    np.testing.assert_allclose(value.delta(query).dense(), 0.8 * a.delta(query).dense(), atol=1e-12)
    np.testing.assert_allclose(value.delta(up).dense(), 0, atol=1e-12)
    record = json.loads((value.save(tmp_path / "out") / "lorakit.json").read_text())
    assert [(parent["weight"], parent["parts"]) for parent in record["parents"]] == [
        (1.0, ["*.self_attn.*=0.8, *=0.4"]), (-0.4, ["only *.mlp.*"]),
    ]  # fmt: skip


def test_the_algebra_of_single_deltas(tmp_path: Path) -> None:
    a = load_adapter(write_adapter(tmp_path / "a", factors(ONE, seed=1))).delta(MODULE)
    b = load_adapter(write_adapter(tmp_path / "b", factors(ONE, rank=3, seed=2), rank=3)).delta(MODULE)
    expected = 0.7 * a.dense() - b.dense() / 2
    np.testing.assert_allclose((0.7 * a - b / 2).dense(), expected, atol=1e-12)
    np.testing.assert_allclose((-a * -0.7 + -b / 2).dense(), expected, atol=1e-12)
    with pytest.raises(TypeError):
        a + 1


@pytest.mark.parametrize("other", ["x", None, 3])
def test_only_adapters_are_added_to_adapters(tmp_path: Path, other: Any) -> None:
    adapter = load_adapter(write_adapter(tmp_path / "a"))
    with pytest.raises(TypeError):
        adapter + other
    with pytest.raises(TypeError):
        adapter * "x"


def test_copies_of_the_base_are_kept_when_they_agree(tmp_path: Path) -> None:
    rows = np.arange(6.0).reshape(2, 3)
    a = load_adapter(write_adapter(tmp_path / "a", factors(ONE, seed=1) | {COPY: rows}))
    b = load_adapter(write_adapter(tmp_path / "b", factors(ONE, seed=2) | {COPY: rows}))
    c = load_adapter(write_adapter(tmp_path / "c", factors(ONE, seed=2) | {COPY: rows + 1}))
    assert [stored.name for stored in (2 * a + b).others] == [COPY]
    with pytest.raises(UnsupportedAdapter, match="hold different values"):
        a + c


def test_a_file_that_is_written_again_is_noticed(tmp_path: Path) -> None:
    adapter = load_adapter(write_adapter(tmp_path / "a"))
    os.utime(tmp_path / "a" / "adapter_model.safetensors", (1, 1))
    with pytest.raises(Conflict, match="written again"):
        adapter.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_that_is_no_json(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_config.json").write_text(json.dumps([1]))
    with pytest.raises(InvalidFile, match="no JSON object"):
        load_adapter(folder)
