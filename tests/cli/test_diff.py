"""`lorakit diff`: stages, tensors and modules in words, as data, as a picture."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.commands import lorakit
from tests.folders import base_tensors, factors, leftovers, linear_modules, stored, write_adapter, write_base

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


def test_adapters_inside_of_an_adapter_are_said_to_be_left_out(capsys: Capture, stages: list[Path]) -> None:
    shutil.copytree(stages[1], stages[0] / "ref\x1b[31m")
    shutil.copytree(stages[1], stages[0] / "checkpoint-5")
    ended = lorakit(capsys, "diff", stages[0], stages[1])
    assert ended.code == 0
    assert ended.err.splitlines()[-1].endswith(r"other adapters in it, which are not compared: 'ref\x1b[31m'")


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    tuned = {name: value * np.float32(1.5) if UP in name else value for name, value in base_tensors().items()}
    return [write_base(tmp_path / "base"), write_base(tmp_path / "tuned", tuned, shards=2)]


def test_models_are_compared_tensor_by_tensor(capsys: Capture, models: list[Path]) -> None:
    ended = lorakit(capsys, "diff", *models)
    assert (ended.code, ended.err) == (0, "")
    stages, groups, tensors = ended.out.split("\n\n")
    assert [line.split() for line in stages.splitlines()[1:]] == [
        ["1", str(models[0]), "10"],
        ["2", str(models[1]), "10"],
    ]
    assert groups.splitlines()[0] == "tensors of 1 and 2: 9 equal bit for bit, 1 different"
    assert groups.splitlines()[2].split()[:3] == ["weights", "10", "9"]
    (row,) = tensors.splitlines()[1:]
    assert row.split()[:2] == [f"{UP}.weight", "different"]
    assert "50.00%" in row


@pytest.mark.parametrize(
    ("flags", "state"),
    [([], "different"), (["--rtol", "0.51"], "close"), (["--atol", "100"], "close"), (["--op", "equal"], "different")],
)
def test_what_is_close_can_be_chosen(capsys: Capture, models: list[Path], flags: list[str], state: str) -> None:
    report = json.loads(lorakit(capsys, "diff", *models, "--module", "up_proj", "--json", *flags).out)
    states = {change["tensor"]: change["state"] for change in report["stages"][1]["changes"]}
    assert states == {f"{UP}.weight": state, f"{UP}.weight".replace("layers.0", "layers.1"): "equal"}
    assert report["plot"] is None


def test_what_is_close_can_be_chosen_for_adapters_too(capsys: Capture, stages: list[Path]) -> None:
    report = json.loads(lorakit(capsys, "diff", *stages[:2], "--rtol", "1", "--json").out)
    assert {tensor["state"] for tensor in report["stages"][1]["tensors"]} == {"equal", "close"}


def test_states_of_training_are_compared_with_their_numbers(capsys: Capture, tmp_path: Path) -> None:
    import torch

    for step in (1, 2):
        state = {i: {"exp_avg": torch.full((3,), float(step + i))} for i in range(12)}
        groups = [{"lr": 0.1 / step, "\x1b[31m": step, "params": list(range(12))}]
        torch.save({"state": state, "param_groups": groups}, tmp_path / f"{step}.pt")
    ended = lorakit(capsys, "diff", tmp_path / "1.pt", tmp_path / "2.pt")
    assert (ended.code, ended.err) == (0, "")
    assert "tensors of 1 and 2: 12 different" in ended.out
    assert "and 2 more: --json has every one" in ended.out
    assert ["param_groups.0.lr", "0.1", "0.05"] in [line.split() for line in ended.out.splitlines()]
    assert "\x1b" not in ended.out


def test_a_run_is_its_newest_finished_checkpoint(capsys: Capture, stages: list[Path], tmp_path: Path) -> None:
    for number, stage in enumerate(stages[:2], 1):
        shutil.copytree(stage, tmp_path / "run" / f"checkpoint-{number}")
        (tmp_path / "run" / f"checkpoint-{number}" / "trainer_state.json").write_text(
            json.dumps({"global_step": number})
        )
    ended = lorakit(capsys, "diff", stages[0], tmp_path / "run", "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["stages"][1]["path"] == str(tmp_path / "run" / "checkpoint-2")


def test_no_program_in_a_file_runs(capsys: Capture, tmp_path: Path) -> None:
    import torch

    canary = tmp_path / "canary"
    torch.save({"w": torch.ones(2), "evil": Evil(canary)}, tmp_path / "it.pt")
    ended = lorakit(capsys, "diff", tmp_path / "it.pt", tmp_path / "it.pt")
    assert (ended.code, canary.exists()) == (0, False)


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.canary}",)


def test_the_exit_codes_of_what_can_not_be_compared(capsys: Capture, stages: list[Path], tmp_path: Path) -> None:
    assert lorakit(capsys, "diff", stages[0]).code == 2
    assert lorakit(capsys, "diff", *stages, "--plot", tmp_path / "stages").code == 2
    assert lorakit(capsys, "diff", stages[0], tmp_path / "nowhere").code == 3
    ended = lorakit(capsys, "diff", stages[0], write_base(tmp_path / "base"))
    assert lorakit(capsys, "diff", stages[0], stages[1], "--op", "equal", "--rtol", "1").code == 2
    for wrong in ("-1", "nan", "inf"):
        assert lorakit(capsys, "diff", stages[0], stages[1], "--rtol", wrong).code == 2
    base = tmp_path / "base"
    assert lorakit(capsys, "diff", base, base, "--plot", tmp_path / "it.png").code == 2
    assert lorakit(capsys, "diff", base, base, "--module", "nothing").code == 2
    (base / "model.safetensors").write_bytes(b"short")
    assert lorakit(capsys, "diff", base, base).code == 4
    assert (ended.code, "is an adapter, and" in ended.err, "lorakit merge" in ended.err) == (4, True, True)
