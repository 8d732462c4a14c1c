"""Wherever a checkpoint is asked for, a run stands for its newest finished one, and that is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.store.catalog import Facts
from lorakit.store.kept import Described, keep_checkpoint
from tests.checkpoints.written import write_checkpoint
from tests.cli.commands import lorakit
from tests.folders import factors, linear_modules, write_adapter

Capture = pytest.CaptureFixture[str]
VERBS = {
    "merge": ("--out", "merged"),
    "mix": ("--out", "mixed"),
    "shrink": ("--rank", "1", "--out", "small"),
    "extract": ("--rank", "1", "--out", "extracted"),
    "compare": ("other",),
    "diff": ("other",),
    "check": (),
}


@pytest.fixture
def run(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two finished checkpoints, of which the second is the newest, and one that is still being written."""
    monkeypatch.chdir(tmp_path)
    for step in (900, 1500):
        write_checkpoint(tmp_path / "runs" / "sql" / f"checkpoint-{step}", seed=step, base_model_name_or_path=str(base))
    (tmp_path / "runs" / "sql" / "checkpoint-2000").mkdir()
    write_adapter(tmp_path / "other", factors(linear_modules(1)), base_model_name_or_path=str(base))
    return tmp_path / "runs" / "sql"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_a_run_and_says_which_checkpoint_that_is(capsys: Capture, run: Path, verb: str) -> None:
    ended = lorakit(capsys, verb, "runs/sql", *VERBS[verb], "--json")
    assert ended.code == 0, ended
    assert ended.err.count("note: 'runs/sql' is a run: its newest finished checkpoint is checkpoint-1500\n") == 1
    json.loads(ended.out)


@pytest.mark.parametrize("verb", VERBS)
def test_a_checkpoint_that_is_named_is_that_one_and_nothing_is_said_of_runs(
    capsys: Capture, run: Path, verb: str
) -> None:
    ended = lorakit(capsys, verb, "runs/sql/checkpoint-900", *VERBS[verb])
    assert (ended.code, "is a run" in ended.err) == (0, False), ended


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./runs/sqk", "did you mean 'runs/sql'?"),
        ("runs/begun", "none of the 1 checkpoints in"),
        ("runs", "name one of"),
        ("https://host/sql?Signature=5ec4e7", "'https://host/sql' is an address, and this is done here: fetch"),
    ],
)
def test_what_names_no_checkpoint_is_not_found_and_nothing_is_written(
    capsys: Capture, run: Path, verb: str, name: str, said: str
) -> None:
    (run.parent / "begun" / "checkpoint-5").mkdir(parents=True)
    (run.parent / "begun" / "checkpoint-5" / "adapter_config.json").write_text("{")
    before = sorted(Path().iterdir())
    ended = lorakit(capsys, verb, name, *VERBS[verb], "--json")
    assert ended.code == 3, ended
    assert said in json.loads(ended.out)["error"]["message"]
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("verb", VERBS)
def test_a_name_in_the_store_is_taken_as_well(
    capsys: Capture, run: Path, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    described = Described("adapter", "transformers", 1500, Facts(step=1500))
    keep_checkpoint(tmp_path / "home", run / "checkpoint-1500", described, run="kept", unchanged=lambda: True)
    assert lorakit(capsys, verb, "kept@step-1500", *VERBS[verb]).code == 0


@pytest.mark.parametrize("verb", ["merge", "mix", "shrink", "compare", "diff"])
def test_a_mistyped_path_that_could_be_on_the_hub_is_answered_with_the_nearest_one_here(
    capsys: Capture, run: Path, verb: str
) -> None:
    ended = lorakit(capsys, verb, "runs/sqk", *VERBS[verb])
    assert (ended.code, ended.err.endswith("; did you mean 'runs/sql'?\n")) == (3, True)
