"""`lorakit diff`: stages, tensors and modules in words, as data, as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.commands import lorakit
from tests.folders import factors, leftovers, linear_modules, stored, write_adapter, write_base

Capture = pytest.CaptureFixture[str]
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def stages(tmp_path: Path) -> list[Path]:
    first = write_adapter(tmp_path / "first", factors(linear_modules(), seed=1))
    tensors = {name: value * 1.25 if "lora_B" in name else value for name, value in stored(first).items()}
    second = write_adapter(tmp_path / "second", tensors)
    return [first, second, write_adapter(tmp_path / "third", {n: v for n, v in tensors.items() if UP in n})]


def test_stages_tensors_and_modules_in_words(capsys: Capture, stages: list[Path]) -> None:
    ended = lorakit(capsys, "diff", *stages)
    assert (ended.code, ended.err) == (0, "")
    table, tensors, modules = ended.out.split("\n\n")
    rows = [line.split() for line in table.splitlines()[1:]]
    assert [row[:4] for row in rows] == [
        ["1", str(stages[0]), "6", "2"],
        ["2", str(stages[1]), "6", "2"],
        ["3", str(stages[2]), "1", "2"],
    ]
    assert [row[5] for row in rows[:2]] == ["-", "25.00%"]
    assert tensors.splitlines() == [
        "tensors of 1 and 2: 6 equal bit for bit, 6 different",
        "tensors of 2 and 3: 2 equal bit for bit, 10 only before",
    ]
    assert len(modules.splitlines()) == 1 + 6 * 3
    assert modules.splitlines()[3].split()[1:] == ["3", "-", "-", "-", "-"]


def test_nothing_lost_is_said_as_that(capsys: Capture, stages: list[Path]) -> None:
    ended = lorakit(capsys, "diff", stages[0], stages[0])
    assert "tensors of 1 and 2: 12 equal bit for bit\n" in ended.out
    assert ended.out.splitlines()[2].split()[5:7] == ["0.00%", "0.00%"]


@pytest.mark.parametrize("flag", ["--module", "--modules"])
def test_json_is_the_report_alone(capsys: Capture, stages: list[Path], flag: str) -> None:
    ended = lorakit(capsys, "diff", *stages, flag, UP, "--json")
    report = json.loads(ended.out)
    assert (ended.err, report["plot"], list(report["modules"])) == ("", None, [UP])
    assert [stage["lost"] for stage in report["stages"]] == [None, pytest.approx(0.25), 0]
    assert [stage["lost_since_first"] for stage in report["stages"]] == [None, pytest.approx(0.25), pytest.approx(0.25)]


@pytest.mark.parametrize("flags", [[], ["--module", UP]])
def test_a_picture_is_written(capsys: Capture, stages: list[Path], tmp_path: Path, flags: list[str]) -> None:
    file = tmp_path / "stages.png"
    ended = lorakit(capsys, "diff", *stages, "--plot", file, *flags)
    assert (ended.code, ended.err) == (0, f"plotted to {file}\n")
    with Image.open(file) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert len(set(picture.convert("RGB").get_flattened_data())) > 50
    assert not leftovers(tmp_path)
    assert lorakit(capsys, "diff", *stages, "--plot", file).code == 5


def test_deltas_of_nothing_can_be_plotted_too(capsys: Capture, tmp_path: Path) -> None:
    nothing = write_adapter(tmp_path / "nothing", {n: v * 0 for n, v in factors(linear_modules()).items()})
    ended = lorakit(capsys, "diff", nothing, nothing, "--plot", tmp_path / "nothing.png")
    assert ended.code == 0
    assert ended.out.splitlines()[2].split()[4:] == ["0", "-", "-", "-", "-"]


def test_notes_are_for_the_person(capsys: Capture, stages: list[Path], tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", factors({UP: (5, 5)}), base_model_name_or_path="org/other")
    ended = lorakit(capsys, "diff", stages[0], other)
    assert ended.code == 0
    assert [line[:34] for line in ended.err.splitlines()] == [
        "note: the adapters name different ",
        "note: the shapes differ at 'model.",
    ]


def test_the_exit_codes_of_what_can_not_be_compared(capsys: Capture, stages: list[Path], tmp_path: Path) -> None:
    assert lorakit(capsys, "diff", stages[0]).code == 2
    assert lorakit(capsys, "diff", *stages, "--plot", tmp_path / "stages").code == 2
    assert lorakit(capsys, "diff", stages[0], tmp_path / "nowhere").code == 3
    ended = lorakit(capsys, "diff", stages[0], write_base(tmp_path / "base"))
    assert (ended.code, "only adapters" in ended.err) == (4, True)
