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
    "flags",
    [
        ["--method", "tie"], ["--rank", "many"], ["--rank", "0"], ["--rank", "2", "--energy", "0.9"],
        ["--energy", "2"], ["--budget", "some"], ["--budget", "0"], ["--density", "0.5"], ["--seed", "1"],
        ["--method", "ties", "--density", "2"], ["--method", "ties", "-o", "gamma=1"], ["-o", "gamma"],
        ["--trained", "sum"], ["--weights", "{folder}/weights.json"], ["--keep-stages", "{folder}/stages"], [],
    ],
)  # fmt: skip
def test_what_makes_no_sense_ends_with_2(
    capsys: Capture, pair: tuple[Path, Path], tmp_path: Path, flags: list[str]
) -> None:
    (tmp_path / "weights.json").write_text(json.dumps({"nobody": 1}))
    out = ["--out", str(tmp_path / "out")] if flags else []
    ended = lorakit(capsys, "mix", *pair, *out, *(flag.format(folder=tmp_path) for flag in flags))
    assert (ended.code, ended.out) == (2, "")
    assert ended.err
    assert not (tmp_path / "out").exists()


def test_a_smaller_rank_says_what_it_lost(capsys: Capture, pair: tuple[Path, Path], tmp_path: Path) -> None:
    ended = lorakit(capsys, "mix", *pair, "--rank", 2, "--out", tmp_path / "out")
    assert (ended.code, ended.out) == (0, f"{tmp_path / 'out'}\n")
    assert f"  {MODULE}: rank 2, truncation error " in ended.err
    whole = dense(pair[0]) + dense(pair[1])
    u, s, vh = np.linalg.svd(whole)
    np.testing.assert_allclose(dense(tmp_path / "out"), (u[:, :2] * s[:2]) @ vh[:2], atol=1e-5)


def test_methods_and_their_options(capsys: Capture, pair: tuple[Path, Path], tmp_path: Path) -> None:
    flags = ["--method", "breadcrumbs", "--density", "0.6", "-o", "gamma=0.2", "--rank", "4", "--json"]
    ended = lorakit(capsys, "mix", *pair, *flags, "--out", tmp_path / "out")
    assert ended.code == 0
    assert json.loads(ended.out)["settings"] == {"method": "breadcrumbs", "rank": 4, "density": 0.6, "gamma": 0.2}
    assert json.loads((tmp_path / "out" / "lorakit.json").read_text())["settings"]["gamma"] == 0.2


def test_weights_by_module_come_from_a_file(capsys: Capture, pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = pair
    (tmp_path / "weights.json").write_text(json.dumps({str(one): {"up_proj": 0.25, "*": 3}}))
    flags = ["--weights", tmp_path / "weights.json", "--out", tmp_path / "out"]
    assert lorakit(capsys, "mix", one, f"{two}=2", *flags).code == 0
    np.testing.assert_allclose(dense(tmp_path / "out"), 0.25 * dense(one) + 2 * dense(two), atol=1e-5)
    other = "model.layers.1.self_attn.q_proj"
    np.testing.assert_allclose(dense(tmp_path / "out", other), 3 * dense(one, other), atol=1e-5)


def test_stages_are_kept_as_adapters(capsys: Capture, pair: tuple[Path, Path], tmp_path: Path) -> None:
    flags = ["--rank", "1", "--keep-stages", tmp_path / "stages", "--out", tmp_path / "out"]
    assert lorakit(capsys, "mix", *pair, *flags).code == 0
    np.testing.assert_allclose(dense(tmp_path / "stages" / "1-linear"), dense(pair[0]) + dense(pair[1]), atol=1e-5)
    record = json.loads((tmp_path / "out" / "lorakit.json").read_text())
    assert (record["operation"], record["parents"][0]["path"]) == ("shrink", str(tmp_path / "stages" / "1-linear"))
    parents = json.loads((tmp_path / "stages" / "1-linear" / "lorakit.json").read_text())["parents"]
    assert [parent["path"] for parent in parents] == [str(folder) for folder in pair]


def test_the_exit_codes_of_the_others(capsys: Capture, pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, _ = pair
    wrong = write_adapter(tmp_path / "wrong", factors({MODULE: (5, 5)}))
    assert lorakit(capsys, "mix", one, tmp_path / "nowhere", "--out", tmp_path / "out").code == 3
    assert lorakit(capsys, "mix", one, wrong, "--out", tmp_path / "out").code == 4
    assert lorakit(capsys, "mix", one, "--out", one).code == 5
    assert not leftovers(tmp_path)
