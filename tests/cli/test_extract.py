"""`lorakit extract`: the folder on stdout, the report on stderr, or all of it as data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.cli.commands import lorakit
from tests.folders import base_tensors, leftovers, stored, write_base

Capture = pytest.CaptureFixture[str]
MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture
def tuned(tmp_path: Path, base: Path) -> Path:
    """One matrix changed by a rank of 2, and one norm."""
    tensors, draw = base_tensors(), np.random.default_rng(9)
    change = draw.standard_normal((12, 2)) @ draw.standard_normal((2, 8))
    tensors[f"{MODULE}.weight"] = (tensors[f"{MODULE}.weight"] + change).astype("float32")
    tensors["model.layers.1.norm.weight"] = tensors["model.layers.1.norm.weight"] + np.float32(1)
    return write_base(tmp_path / "tuned", tensors)


def test_the_folder_is_printed_and_holds_the_difference(
    capsys: Capture, base: Path, tuned: Path, tmp_path: Path
) -> None:
    ended = lorakit(capsys, "extract", tuned, "--base", base, "--out", tmp_path / "out")
    assert (ended.code, ended.out) == (0, f"{tmp_path / 'out'}\n")
    assert f"{MODULE}  [12, 8]  rank 2 (noise)" in ended.err
    assert "model.layers.1.norm.weight  [8]  not carried: a vector" in ended.err
    assert "note: 1 changed tensors" in ended.err
    b, a = (stored(tmp_path / "out")[f"base_model.model.{MODULE}.lora_{part}.weight"] for part in "BA")
    expected = stored(tuned)[f"{MODULE}.weight"] - stored(base)[f"{MODULE}.weight"]
    np.testing.assert_allclose(b @ a, expected, atol=1e-5)


@pytest.mark.parametrize("dry", [True, False])
def test_json_is_the_report_alone(capsys: Capture, base: Path, tuned: Path, tmp_path: Path, dry: bool) -> None:
    flags = ["--dry-run"] if dry else ["--out", str(tmp_path / "out"), "--save-rest"]
    ended = lorakit(capsys, "extract", tuned, "--base", base, "--energy", "0.9", *flags, "--json")
    report = json.loads(ended.out)
    assert (report["dry_run"], report["energy"], report["equal"]) == (dry, 0.9, 8)
    assert [module["module"] for module in report["modules"]] == [MODULE]
    assert [change["saved"] for change in report["uncarried"]] == [not dry]
    assert (tmp_path / "out").exists() != dry


def test_a_dry_run_in_words(capsys: Capture, base: Path, tuned: Path, tmp_path: Path) -> None:
    ended = lorakit(capsys, "extract", tuned, "--base", base, "--budget", "1k", "--dry-run", "--include", "*.mlp.*")
    assert ended.code == 0
    assert "rank 2 at most on 1 modules, 40 parameters" in ended.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


@pytest.mark.parametrize(
    "flags", [["--rank", "4", "--energy", "0.9"], ["--rank", "0"], ["--budget", "lots"], ["--seed", "x"], []]
)
def test_wrong_usage_ends_with_2(capsys: Capture, base: Path, tuned: Path, tmp_path: Path, flags: list[str]) -> None:
    out = ["--out", str(tmp_path / "out")] if flags else []
    ended = lorakit(capsys, "extract", tuned, "--base", base, *out, *flags)
    assert (ended.code, ended.out) == (2, "")
    assert not (tmp_path / "out").exists()


def test_the_exit_codes_of_the_others(capsys: Capture, base: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = write_base(tmp_path / "other", base_tensors(1))
    assert lorakit(capsys, "extract", tuned, "--out", out).code == 2
    assert lorakit(capsys, "extract", tmp_path / "nowhere", "--base", base, "--out", out).code == 3
    assert lorakit(capsys, "extract", tuned, "--base", other, "--out", out).code == 4
    assert lorakit(capsys, "extract", base, "--base", base, "--out", out).code == 4
    assert lorakit(capsys, "extract", tuned, "--base", base, "--out", base).code == 5
    assert not out.exists()
    assert not leftovers(tmp_path)
