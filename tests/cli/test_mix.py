"""`lorakit mix`: the folder on stdout, the report as words or as data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.cli.commands import lorakit
from tests.folders import factors, leftovers, linear_modules, stored, write_adapter

Capture = pytest.CaptureFixture[str]
MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    one = write_adapter(tmp_path / "one", factors(linear_modules(), seed=1))
    return one, write_adapter(tmp_path / "two", factors({MODULE: (12, 8)}, rank=3, seed=2), rank=3)


def dense(folder: Path, module: str = MODULE) -> np.ndarray:  # type: ignore[type-arg]
    config = json.loads((folder / "adapter_config.json").read_text())
    a, b = (stored(folder)[f"base_model.model.{module}.lora_{part}.weight"].astype("float64") for part in "AB")
    product: np.ndarray = config["lora_alpha"] / config["r"] * (b @ a)  # type: ignore[type-arg]
    return product


def test_the_folder_is_printed_and_holds_the_sum(capsys: Capture, pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = pair
    ended = lorakit(capsys, "mix", f"{one}=0.7", f"{two}=-0.3", "--out", tmp_path / "out")
    assert (ended.code, ended.out) == (0, f"{tmp_path / 'out'}\n")
    assert ended.err.startswith("rank 5 on 6 modules")
    np.testing.assert_allclose(dense(tmp_path / "out"), 0.7 * dense(one) - 0.3 * dense(two), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dry", [True, False])
def test_json_is_the_report_alone(capsys: Capture, pair: tuple[Path, Path], tmp_path: Path, dry: bool) -> None:
    flags = ["--dry-run"] if dry else ["--out", str(tmp_path / "out")]
    ended = lorakit(capsys, "mix", *(f"{path}=1" for path in pair), "--json", *flags)
    report = json.loads(ended.out)
    assert (report["rank"], report["modules"], report["dry_run"]) == (5, 6, dry)
    assert (tmp_path / "out").exists() != dry


def test_a_dry_run_in_words(capsys: Capture, pair: tuple[Path, Path], tmp_path: Path) -> None:
    ended = lorakit(capsys, "mix", *pair, "--dry-run")
    assert (ended.code, ended.err) == (0, "")
    assert "cosine" in ended.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize(
    "flags", [["--method", "ties"], ["--rank", "8"], ["--density", "0.5"], ["--seed", "1"], ["--rank", "many"], []]
)
def test_what_is_not_there_yet_ends_with_2(
    capsys: Capture, pair: tuple[Path, Path], tmp_path: Path, flags: list[str]
) -> None:
    out = ["--out", str(tmp_path / "out")] if flags else []
    ended = lorakit(capsys, "mix", *pair, *out, *flags)
    assert (ended.code, ended.out) == (2, "")
    assert not (tmp_path / "out").exists()


def test_the_exit_codes_of_the_others(capsys: Capture, pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, _ = pair
    wrong = write_adapter(tmp_path / "wrong", factors({MODULE: (5, 5)}))
    assert lorakit(capsys, "mix", one, tmp_path / "nowhere", "--out", tmp_path / "out").code == 3
    assert lorakit(capsys, "mix", one, wrong, "--out", tmp_path / "out").code == 4
    assert lorakit(capsys, "mix", one, "--out", one).code == 5
    assert not leftovers(tmp_path)
