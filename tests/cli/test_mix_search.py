"""`lorakit mix --search`: a person's own file scores; the folder on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cli.commands import Ended, lorakit
from tests.folders import factors, leftovers, linear_modules, write_adapter

Capture = pytest.CaptureFixture[str]

PROGRAM = """\
from aims import AIM

def score(candidate):
    print("scored")
    return -sum((weight - aim) ** 2 for weight, aim in zip(candidate.weights, AIM))

def loss(candidate):
    return -score(candidate)

def picky(candidate):
    if candidate.weights[0] > 0.9:
        raise ValueError("too much")
    return 1.0

def broken(candidate):
    return candidate.nonsense
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "aims", raising=False)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "aims.py").write_text("AIM = (0.3, 0.8)\n")
    (tmp_path / "own" / "score.py").write_text(PROGRAM)
    return tmp_path / "own" / "score.py"


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    return [str(write_adapter(tmp_path / f"{seed}", factors(linear_modules(), seed=seed))) for seed in range(2)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def weights_in(folder: Path) -> list[float]:
    return [parent["weight"] for parent in json.loads((folder / "lorakit.json").read_text())["parents"]]


def test_the_folder_is_printed_and_each_improvement_beside_it(
    capsys: Capture, pair: list[str], program: Path, out: Path
) -> None:
    ended = lorakit(capsys, "mix", *pair, "--search", program, "--out", out)
    assert (ended.code, ended.out) == (0, f"{out}\n")
    assert weights_in(out) == pytest.approx([0.3, 0.8], abs=0.03)
    lines = [line for line in ended.err.splitlines() if line != "scored"]
    assert ended.err.splitlines().count("scored") == 40
    assert lines[0] == "-0.13  0.5 0.5"
    improvements = [float(line.split("  ")[0]) for line in lines[:-3]]
    assert improvements == sorted(improvements)
    assert lines[-3].endswith("the best of 40")
    assert lines[-2].endswith(f"× {pair[0]}")


def test_a_loss_by_its_name_and_the_report_as_data(capsys: Capture, pair: list[str], program: Path, out: Path) -> None:
    ended = lorakit(
        capsys, "mix", f"{pair[0]}=0.2", pair[1], "--search", f"{program}:loss", "--minimise", "--evaluations", "9",
        "--seed", "5", "--json", "--out", out,
    )  # fmt: skip
    report = json.loads(ended.out)
    assert (ended.code, report["out"], report["dry_run"]) == (0, str(out), False)
    assert [trial["weights"] for trial in report["trials"]][:2] == [[0.2, 1.0], [0.5, 0.5]]
    assert report["score"] == min(trial["score"] for trial in report["trials"])
    assert len(report["trials"]) == report["settings"]["evaluations"] == 9
    assert report["settings"]["seed"] == 5
    assert [adapter["weight"] for adapter in report["adapters"]] == weights_in(out)


def test_a_dry_run_searches_and_writes_nothing(capsys: Capture, pair: list[str], program: Path, out: Path) -> None:
    ended = lorakit(capsys, "mix", *pair, "--search", program, "--evaluations", "5", "--dry-run")
    assert ended.code == 0
    assert "the best of 5" in ended.out
    assert not out.exists()
    assert not leftovers(out.parent)


def test_a_trial_that_fails_is_told_with_the_line_of_the_file(
    capsys: Capture, pair: list[str], program: Path, out: Path
) -> None:
    ended = lorakit(capsys, "mix", *pair, "--search", f"{program}:picky", "--out", out)
    line = PROGRAM.splitlines().index('        raise ValueError("too much")') + 1
    assert f"failed  1 0  ValueError: too much ('{program}', line {line})" in ended.err
    assert (ended.code, "of them failed" in ended.err) == (0, True)


def failed(capsys: Capture, pair: list[str], search: object, out: Path) -> Ended:
    ended = lorakit(capsys, "mix", *pair, "--search", str(search), "--out", out)
    assert "Traceback" not in ended.err
    assert ended.out == ""
    assert not out.exists()
    return ended


def test_when_every_trial_fails_the_first_reason_ends_it(
    capsys: Capture, pair: list[str], program: Path, out: Path
) -> None:
    ended = failed(capsys, pair, f"{program}:broken", out)
    assert ended.code == 1
    assert "has no attribute 'nonsense'" in ended.err.splitlines()[-1]
    assert f"('{program}', line 16)" in ended.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\nscore = (\n", "line 2: '(' was never closed"),
        ("x = 1\ny = x / 0\n", "ZeroDivisionError: division by zero ('{file}', line 2)"),
        ("import not_there_at_all\n", "ModuleNotFoundError: No module named 'not_there_at_all' ('{file}', line 1)"),
    ],
)
def test_a_file_that_can_not_be_run_is_shown_with_its_line(
    capsys: Capture, pair: list[str], program: Path, out: Path, text: str, said: str
) -> None:
    program.write_text(text)
    ended = failed(capsys, pair, program, out)
    assert ended.code == 1
    assert said.format(file=program) in ended.err


def test_what_is_not_there_ends_with_3(capsys: Capture, pair: list[str], program: Path, out: Path) -> None:
    assert "no file 'nowhere.py'" in failed(capsys, pair, "nowhere.py", out).err
    ended = failed(capsys, pair, f"{program}:nothing", out)
    assert (ended.code, "has no function 'nothing'" in ended.err) == (3, True)


@pytest.mark.parametrize(
    "flags", [["--minimise"], ["--evaluations", "9"], ["--url", "http://127.0.0.1:9"], ["--share", "x"]], ids=str
)
def test_a_searchs_options_without_a_search_end_with_2(
    capsys: Capture, pair: list[str], out: Path, flags: list[str]
) -> None:
    ended = lorakit(capsys, "mix", *pair, "--out", out, *flags)
    assert (ended.code, out.exists()) == (2, False)
    assert f"{flags[0]} is for a search" in ended.err


def test_weights_by_module_are_not_searched(capsys: Capture, pair: list[str], program: Path, out: Path) -> None:
    weights = out.parent / "weights.json"
    weights.write_text(json.dumps({pair[0]: {"*": 0.5}}))
    ended = lorakit(capsys, "mix", *pair, "--search", program, "--weights", weights, "--out", out)
    assert (ended.code, "leave out --weights" in ended.err) == (2, True)


def test_a_place_that_is_taken_is_said_before_anything_is_scored(
    capsys: Capture, pair: list[str], program: Path
) -> None:
    ended = lorakit(capsys, "mix", *pair, "--search", program, "--out", pair[0])
    assert (ended.code, "scored" in ended.err) == (5, False)
