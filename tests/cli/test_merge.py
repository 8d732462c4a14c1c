"""`lorakit merge`: data on stdout, words on stderr, and the exit codes of its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints.written import finish
from tests.cli.commands import lorakit
from tests.folders import base_tensors, factors, leftovers, linear_modules, stored

Capture = pytest.CaptureFixture[str]


def expected(base: Path, adapter: Path, weight: float = 1.0) -> dict[str, Any]:
    tensors, factor = stored(base), stored(adapter)
    for module in linear_modules():
        a, b = (factor[f"base_model.model.{module}.lora_{part}.weight"].astype("float64") for part in "AB")
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + weight * 2 * (b @ a)
    return tensors


def test_the_folder_is_printed_and_holds_the_sum(capsys: Capture, base: Path, adapter: Path, tmp_path: Path) -> None:
    ended = lorakit(capsys, "merge", f"{adapter}=0.5", "--out", tmp_path / "out")
    assert (ended.code, ended.out) == (0, f"{tmp_path / 'out'}\n")
    assert ended.err.startswith("merged 6 of 10 tensors")
    found = stored(tmp_path / "out")
    for name, tensor in expected(base, adapter, 0.5).items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_json_is_the_report_alone(capsys: Capture, adapter: Path, base: Path, tmp_path: Path) -> None:
    ended = lorakit(capsys, "merge", adapter, "--base", base, "--out", tmp_path / "out", "--json")
    report = json.loads(ended.out)
    assert (ended.code, ended.err) == (0, "")
    assert len(report["merged"]) == 6
    assert len(report["placements"]) == 12
    assert report["merged"][0]["terms"] == [{"adapter": str(adapter), "rank": 2, "factor": 2.0}]


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_dry_run_prints_the_plan_and_writes_nothing(
    capsys: Capture, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "precious").touch()
    before = sorted(path.name for path in tmp_path.iterdir())
    ended = lorakit(capsys, "merge", adapter, "--dry-run", *flags)
    assert ended.code == 0
    assert "model.layers.0.self_attn.q_proj.weight" in ended.out
    assert "nothing was written" in ended.out or json.loads(ended.out)["dry_run"]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_argument_too_few(capsys: Capture, adapter: Path) -> None:
    ended = lorakit(capsys, "merge", adapter)
    assert (ended.code, "--out" in ended.err) == (2, True)


@pytest.mark.parametrize("flags", [["--device", "tpu"], ["--dtype", "int8"]])
def test_settings_that_are_none(capsys: Capture, adapter: Path, tmp_path: Path, flags: list[str]) -> None:
    assert lorakit(capsys, "merge", adapter, "--out", tmp_path / "out", *flags).code == 2


def truncate(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size - 5)


def garble(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0{...}")


def garble_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{")


def replace_tensors(adapter: Path, tensors: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, adapter / "adapter_model.safetensors")


BAD_ADAPTERS: dict[str, tuple[Any, str]] = {
    "truncated": (truncate, "is cut short"),
    "unparsable": (garble, "can't be parsed"),
    "unparsable config": (garble_config, "can't be read as JSON"),
    "for another base": (
        lambda adapter: replace_tensors(adapter, factors({"model.layers.0.self_attn.q_proj": (9, 9)})),
        "made for another base",
    ),
    "unknown keys": (
        lambda adapter: replace_tensors(adapter, factors(linear_modules()) | {"what.is.this": np.ones(3)}),
        "what.is.this",
    ),
    "not finite": (
        lambda adapter: replace_tensors(
            adapter, {name: tensor * np.float32("nan") for name, tensor in factors(linear_modules()).items()}
        ),
        "NaN or infinity",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_ADAPTERS)
def test_a_bad_adapter_is_refused_and_nothing_is_left(
    capsys: Capture, adapter: Path, tmp_path: Path, kind: str
) -> None:
    spoil, reason = BAD_ADAPTERS[kind]
    spoil(adapter)
    ended = lorakit(capsys, "merge", adapter, "--out", tmp_path / "results" / "out")
    assert (ended.code, ended.out) == (4, "")
    assert reason in ended.err
    assert ended.err.startswith("error: ")
    assert not (tmp_path / "results").exists()


def test_unknown_keys_can_be_left_out(capsys: Capture, adapter: Path, tmp_path: Path) -> None:
    replace_tensors(adapter, factors(linear_modules()) | {"what.is.this": np.ones(3)})
    ended = lorakit(capsys, "merge", adapter, "--out", tmp_path / "out", "--no-strict")
    assert ended.code == 0
    assert "left out: what.is.this" in ended.err
    record = json.loads((tmp_path / "out" / "lorakit.json").read_text())
    assert record["report"]["unplaced"] == ["what.is.this: no weight of the base takes it"]


@pytest.mark.parametrize("missing", ["adapter", "base"])
def test_what_is_not_there_ends_with_3(capsys: Capture, adapter: Path, tmp_path: Path, missing: str) -> None:
    named = {"adapter": str(adapter), "base": str(tmp_path / "base"), missing: str(tmp_path / "nowhere")}
    ended = lorakit(capsys, "merge", named["adapter"], "--base", named["base"], "--out", tmp_path / "out")
    assert ended.code == 3
    assert f"there is no {missing} folder '{tmp_path / 'nowhere'}'" in ended.err


def test_an_out_that_exists_ends_with_5_and_is_kept(capsys: Capture, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("1")
    ended = lorakit(capsys, "merge", adapter, "--out", tmp_path / "out")
    assert ended.code == 5
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
    assert not leftovers(tmp_path)


def test_a_run_is_merged_as_its_newest_finished_checkpoint(capsys: Capture, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    newest = finish(adapter.rename(tmp_path / "run" / "checkpoint-30"))
    ended = lorakit(capsys, "merge", tmp_path / "run", "--out", tmp_path / "out", "--json")
    assert ended.code == 0
    assert "note: " in ended.err
    assert "its newest finished checkpoint is checkpoint-30" in ended.err
    parents = json.loads((tmp_path / "out" / "lorakit.json").read_text())["parents"]
    assert str(newest) in [parent["path"] for parent in parents]


def test_a_merge_needs_neither_peft_nor_transformers(adapter: Path, tmp_path: Path) -> None:
    program = (
        "import sys, lorakit\n"
        "lorakit.merge(None, [sys.argv[1]], out=sys.argv[2])\n"
        "lorakit.load_adapter(sys.argv[1]).save(sys.argv[2] + '-saved')\n"
        "sys.exit(', '.join({'peft', 'transformers', 'huggingface_hub', 'click', 'rich'} & sys.modules.keys()) or 0)"
    )
    command = [sys.executable, "-c", program, str(adapter), str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert sorted(stored(tmp_path / "out")) == sorted(base_tensors())
