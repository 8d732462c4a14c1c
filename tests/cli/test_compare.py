"""`lorakit compare`: pairs and modules as a table, as data, as a picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from lorakit.cli.plots import by_layer_and_kind
from tests.cli.commands import lorakit
from tests.folders import factors, leftovers, linear_modules, write_adapter

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return [
        write_adapter(tmp_path / "one", factors(linear_modules(), seed=1)),
        write_adapter(tmp_path / "two", factors(linear_modules(), rank=3, seed=2), rank=3),
        write_adapter(tmp_path / "three", factors(linear_modules(1), seed=3)),
    ]


def test_pairs_first_then_the_modules_that_interfere_most(capsys: Capture, three: list[Path]) -> None:
    ended = lorakit(capsys, "compare", *three)
    assert (ended.code, ended.err) == (0, "")
    adapters, pairs, modules = ended.out.split("\n\n")
    assert [line.split()[1] for line in adapters.splitlines()[1:]] == [str(path) for path in three]
    assert [line[:7] for line in pairs.splitlines()[1:]] == ["1 and 2", "1 and 3", "2 and 3"]
    assert [line.split("  ")[-1] for line in pairs.splitlines()[1:]] == ["6 of 6", "3 of 6", "3 of 6"]
    assert modules.startswith("where they interfere most\n")
    numbers = [max(float(cell) for cell in line.split()[6:8]) for line in modules.splitlines()[2:]]
    assert len(numbers) == 10
    assert numbers == sorted(numbers, reverse=True)


def test_json_is_the_report_alone(capsys: Capture, three: list[Path]) -> None:
    ended = lorakit(capsys, "compare", *three[:2], "--modules", "up_proj", "--json")
    report = json.loads(ended.out)
    assert list(report["pairs"][0]["modules"]) == [f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1)]
    assert (ended.err, report["plot"]) == ("", None)


@pytest.mark.parametrize("count", [2, 3])
def test_a_picture_is_written(capsys: Capture, three: list[Path], tmp_path: Path, count: int) -> None:
    file = tmp_path / "plots" / "cosines.png"
    ended = lorakit(capsys, "compare", *three[:count], "--plot", file)
    assert (ended.code, ended.err) == (0, f"plotted to {file}\n")
    with Image.open(file) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert len(set(picture.convert("RGB").get_flattened_data())) > 50
    assert not leftovers(file.parent)
    assert lorakit(capsys, "compare", *three[:count], "--plot", file).code == 5


def test_a_picture_that_can_not_be_written_is_said_first(
    capsys: Capture, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lorakit(capsys, "compare", *three, "--plot", tmp_path / "cosines.pdf").code == 2
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ended = lorakit(capsys, "compare", *three, "--plot", tmp_path / "cosines.png")
    assert (ended.code, ended.out) == (1, "")
    assert "pip install 'lorakit[plot]'" in ended.err
    assert not list(tmp_path.glob("*.p*"))


def test_without_a_common_module_there_is_no_picture(capsys: Capture, three: list[Path], tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", factors({"lm_head": (16, 8)}))
    ended = lorakit(capsys, "compare", three[0], other, "--plot", tmp_path / "cosines.png")
    assert (ended.code, "nothing to plot" in ended.err) == (4, True)
    assert lorakit(capsys, "compare", three[0], other).code == 0


def test_modules_make_a_table_of_layers_and_kinds() -> None:
    values = {
        "model.layers.10.mlp.up_proj": 0.1, "model.layers.2.mlp.up_proj": 0.2, "model.layers.2.mlp.experts.7.w1": 0.3,
        "visual.blocks.0.up": None, "lm_head": 0.5,
    }  # fmt: skip
    rows, columns, cells = by_layer_and_kind(values)
    assert rows == ["model.layers.2", "model.layers.10", "visual.blocks.0", "–"]
    assert columns == ["mlp.up_proj", "mlp.experts.7.w1", "up", "lm_head"]
    assert cells == [
        [0.2, 0.3, None, None],
        [0.1, None, None, None],
        [None, None, None, None],
        [None, None, None, 0.5],
    ]


def test_names_in_files_give_a_terminal_no_orders(capsys: Capture, tmp_path: Path) -> None:
    pair = [
        write_adapter(tmp_path / name, factors({"m\x1b[2J\u009b.$x$": (4, 4)}, seed=seed))
        for seed, name in enumerate(("one", "日本"))
    ]
    ended = lorakit(capsys, "compare", *pair, "--plot", tmp_path / "cosines.png")
    assert ended.code == 0
    assert "m\\x1b[2J\\x9b.$x$" in ended.out
    assert not {"\x1b", "\u009b"} & {*ended.out, *ended.err}


def test_the_exit_codes_of_what_can_not_be_compared(capsys: Capture, three: list[Path], tmp_path: Path) -> None:
    wrong = write_adapter(tmp_path / "wrong", factors({"model.layers.0.mlp.up_proj": (5, 5)}))
    assert lorakit(capsys, "compare", three[0]).code == 2
    assert lorakit(capsys, "compare", *three, "--modules", "nothing").code == 2
    assert lorakit(capsys, "compare", three[0], tmp_path / "nowhere").code == 3
    assert lorakit(capsys, "compare", three[0], wrong).code == 4
