"""`lorakit best`: one path on stdout, or the reason why there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoints.written import evaluated, write_checkpoint
from tests.cli.commands import lorakit

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Saved at 100, 200 and 300; evaluated at 100, 200 and 250, best at last."""
    log = [evaluated(100, 1.0, eval_accuracy=0.1), evaluated(200, 2.0, eval_accuracy=0.4), evaluated(250, 0.5)]
    for count, step in enumerate((100, 200, 300), 1):
        write_checkpoint(tmp_path / "sql" / f"checkpoint-{step}", log[:count])
    return tmp_path / "sql"


def test_an_evaluation_of_another_step_makes_none_the_best(capsys: Capture, run: Path) -> None:
    ended = lorakit(capsys, "best", run)
    assert (ended.code, ended.out, ended.err) == (0, f"{run / 'checkpoint-100'}\n", "")


def test_any_metric_either_way(capsys: Capture, run: Path) -> None:
    assert lorakit(capsys, "best", run, "--mode", "max").out == f"{run / 'checkpoint-200'}\n"
    ended = lorakit(capsys, "best", run, "--metric", "eval_accuracy", "--mode", "max")
    assert ended.out == f"{run / 'checkpoint-200'}\n"
    assert lorakit(capsys, "best", run, "--metric", "eval_accuracy").code == 2


def test_as_data_it_is_what_ls_says(capsys: Capture, run: Path) -> None:
    rows = json.loads(lorakit(capsys, "ls", run, "--json").out)
    assert json.loads(lorakit(capsys, "best", run, "--json").out) == rows[0]


def test_only_finished_ones(capsys: Capture, run: Path) -> None:
    (run / "checkpoint-100" / "adapter_config.json").unlink()
    assert lorakit(capsys, "best", run).out == f"{run / 'checkpoint-200'}\n"


def test_where_there_is_none_stdout_is_empty_and_the_reason_said(capsys: Capture, run: Path) -> None:
    ended = lorakit(capsys, "best", run / "checkpoint-300")
    assert (ended.code, ended.out) == (3, "")
    assert "the evaluations are of other steps" in ended.err
    assert lorakit(capsys, "best", run.parent).code == 3
    ended = lorakit(capsys, "best", run, "--metric", "bleu", "--mode", "max")
    assert (ended.code, "there are eval_accuracy" in ended.err) == (3, True)
