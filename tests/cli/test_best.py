"""`lorakit best`: one path on stdout, or the reason why there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lorakit.store.catalog import Facts
from lorakit.store.kept import Described, keep_checkpoint
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


def test_a_copy_of_it_is_not_the_best(capsys: Capture, run: Path) -> None:
    shutil.copytree(run / "checkpoint-100", run / "model_checkpoint-100")
    assert lorakit(capsys, "best", run).out == f"{run / 'checkpoint-100'}\n"


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


def test_a_run_that_only_the_store_knows(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    kept = []
    for step, loss in ((100, 1.0), (200, 2.0)):
        described = Described("adapter", "transformers", step, Facts(step=step, eval_loss=loss, eval_step=step))
        source = write_checkpoint(tmp_path / f"old-{step}", seed=step)
        kept.append(keep_checkpoint(tmp_path / "home", source, described, run="old", unchanged=lambda: True))
    ended = lorakit(capsys, "best", "old")
    assert (ended.code, ended.out, ended.err) == (0, f"{kept[0].folder}\n", "")
    assert json.loads(lorakit(capsys, "best", "old", "--json").out)["id"] == kept[0].id
    ended = lorakit(capsys, "best", "olt")
    assert (ended.code, ended.out, "did you mean 'old'?" in ended.err) == (3, "", True)
