"""What real trainers wrote: whose it is, that it is finished, and that what is said of it is what the trainer measured.

The oracle is what each program printed while it trained, and what it was told to save; see tests/trainers.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorakit.checkpoints.finished import look_at
from lorakit.checkpoints.metadata import metadata_of
from lorakit.checkpoints.recognise import recognise
from lorakit.checkpoints.runs import checkpoints_of
from tests.cli.commands import lorakit
from tests.trainers import expected
from tests.trainers.by_hand import kept
from tests.trainers.expected import EVERYDAY, LOGGED, Run
from tests.trainers.written import PROGRAMS, Trainers, Written, environment

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.timeout(900)  # the first test waits for all the trainers


def each(*runs: Run) -> pytest.MarkDecorator:
    slow = [pytest.param(run, marks=pytest.mark.slow) for run in expected.SLOW if run in runs]
    return pytest.mark.parametrize("run", [*(run for run in runs if run not in expected.SLOW), *slow], ids=str)


def logged(written: Written, run: Run, name: str) -> dict[int, float]:
    """A value that the trainer logged, by its step."""
    lines = written.of(run.name.rpartition("/")[2], "log")
    return {line["step"]: line["values"][name] for line in lines if name in line["values"]}


def up_to(step: int, values: dict[int, float]) -> tuple[int | None, float | None]:
    """The newest of a step or before."""
    at = max((each for each in values if each <= step), default=None)
    return at, None if at is None else values[at]


def until_saved(written: Written, run: Run, step: int) -> list[dict[str, Any]]:
    """What was said before the checkpoint of a step was written: how training went is logged after the last."""
    lines = [line for line in written.said if line["run"] == run.name.rpartition("/")[2]]
    return lines[: [(line["what"], line["step"]) for line in lines].index(("save", step))]


def rows_of(capsys: Capture, written: Written, run: Run) -> dict[str, dict[str, Any]]:
    """By path: what `lorakit ls --json` says of a run's checkpoints."""
    ended = lorakit(capsys, "ls", written.folder / run.name, "--json")
    assert ended.code == 0, ended.err
    return {row["path"]: row for row in json.loads(ended.out)}


@each(*EVERYDAY, *expected.SLOW, *expected.BY_HAND)
def test_a_checkpoint_is_its_writers_and_holds_what_the_writer_was_told_to_save(trainers: Trainers, run: Run) -> None:
    written = trainers.wrote(run.program)
    for step in run.places:
        path = written.checkpoint(run, step)
        found = recognise(path)
        assert found is not None, path
        assert (found.writer, found.kind, found.holds) == (run.writer, run.kind, run.holds), path
        files = [path.name] if path.is_file() else [str(each.relative_to(path)) for each in path.rglob("*")]
        assert found.files
        assert set(found.files) <= set(files)


@each(*EVERYDAY, *expected.SLOW, *expected.BY_HAND)
def test_when_the_trainer_is_done_one_look_says_finished(trainers: Trainers, run: Run) -> None:
    written = trainers.wrote(run.program)
    for step in run.places:
        found = look_at(written.checkpoint(run, step))
        assert (found.state, found.kind, found.writer) == ("finished", run.kind, run.writer), found
        assert found.reason
        assert found.signature


@each(*EVERYDAY, *expected.SLOW)
def test_a_run_is_listed_with_every_checkpoint_at_its_step(trainers: Trainers, run: Run, capsys: Capture) -> None:
    written = trainers.wrote(run.program)
    rows = rows_of(capsys, written, run)
    for step in run.places:
        path = written.checkpoint(run, step)
        row = rows[str(path)]
        whole = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
        assert (row["step"], row["state"], row["kind"], row["size"]) == (step, "finished", run.kind, whole), row
        assert row["reason"] is None
        assert path.stat().st_ctime + 1 >= row["created"] > path.stat().st_ctime - 3600
    assert len({row["id"] for row in rows.values()}) == len(rows)


@each(*EVERYDAY, *expected.SLOW)
def test_latest_is_the_largest_step(trainers: Trainers, run: Run, capsys: Capture) -> None:
    written = trainers.wrote(run.program)
    ended = lorakit(capsys, "latest", written.folder / run.name)
    assert ended.code == 0, ended.err
    assert Path(ended.out.rstrip("\n")).samefile(written.checkpoint(run, max(run.places)))


@each(*LOGGED, *expected.SLOW, *expected.BY_HAND)
def test_step_epoch_and_losses_are_what_the_trainer_logged(trainers: Trainers, run: Run, capsys: Capture) -> None:
    written = trainers.wrote(run.program)
    losses, evaluations = logged(written, run, "loss"), logged(written, run, "eval_loss")
    epochs = {line["step"]: line["epoch"] for line in written.of(run.name.rpartition("/")[2], "save")}
    rows = rows_of(capsys, written, run)
    for step in run.places:
        row = rows[str(written.checkpoint(run, step))]
        assert row["train_loss"] == up_to(step, losses)[1]
        assert (row["eval_step"], row["eval_loss"]) == up_to(step, evaluations)
        assert row["epoch"] == epochs[step]
    known = [rows[str(written.checkpoint(run, step))] for step in run.places]
    assert {row["eval_loss"] for row in known} - {None}, "nothing was evaluated, and the test shows nothing"


@each(*LOGGED, *expected.BY_HAND)
def test_metrics_are_those_of_the_checkpoints_own_step(trainers: Trainers, run: Run, capsys: Capture) -> None:
    written = trainers.wrote(run.program)
    rows = rows_of(capsys, written, run)
    for step in run.places:
        mine = {}
        for line in until_saved(written, run, step):
            if (line["what"], line["step"]) == ("log", step):
                mine |= line["values"]
        metrics = rows[str(written.checkpoint(run, step))]["metrics"]
        assert metrics == {name: mine[name] for name in mine.keys() - {"loss", "eval_loss", "epoch"}}


@each(*LOGGED, *expected.BY_HAND)
def test_best_has_the_lowest_evaluation_of_its_own_step(trainers: Trainers, run: Run, capsys: Capture) -> None:
    written = trainers.wrote(run.program)
    own = {step: loss for step, loss in logged(written, run, "eval_loss").items() if step in run.places}
    ended = lorakit(capsys, "best", written.folder / run.name)
    assert ended.code == 0, ended.err
    assert Path(ended.out.rstrip("\n")) == written.checkpoint(run, min(own, key=lambda step: own[step]))


def test_of_the_whole_models_the_best_is_not_the_latest(trainers: Trainers, capsys: Capture) -> None:
    (run,) = (run for run in LOGGED if run.name == "whole")
    folder = trainers.wrote(run.program).folder / run.name
    assert lorakit(capsys, "best", folder).out != lorakit(capsys, "latest", folder).out


@each(*(run for run in EVERYDAY if run.name == "best"))
def test_lightnings_losses_are_what_it_measured(trainers: Trainers, run: Run, capsys: Capture) -> None:
    written = trainers.wrote(run.program)
    measured = {line["step"]: line["values"]["val_loss"] for line in written.of(run.name, "save")}
    rows = rows_of(capsys, written, run)
    for step in run.places:
        row = rows[str(written.checkpoint(run, step))]
        assert math.isclose(row["eval_loss"], measured[step], abs_tol=5e-4)  # as its name has it, or the file itself
        assert row["eval_step"] == step
    best = lorakit(capsys, "best", written.folder / run.name).out.rstrip("\n")
    assert Path(best).read_bytes() == written.checkpoint(run, min(measured, key=lambda at: measured[at])).read_bytes()


@each(*(run for run in LOGGED if run.kind == "adapter"))
def test_an_adapters_base_and_rank_and_digest(trainers: Trainers, run: Run, tmp_path: Path) -> None:
    written = trainers.wrote(run.program)
    digests = set()
    for candidate in checkpoints_of(written.folder / run.name):
        if candidate.kind != "step":
            continue
        row = metadata_of(candidate, with_digest=True)
        assert (row.base, row.rank) == (str(trainers.base), 4)
        assert row.digest == metadata_of(candidate, with_digest=True).digest
        copy = Path(shutil.copytree(candidate.folder, tmp_path / "copy" / candidate.folder.name))
        (copied,) = checkpoints_of(copy)
        assert metadata_of(copied, with_digest=True).digest == row.digest
        digests.add(row.digest)
    assert len(digests) == len(run.places)


def test_what_is_in_the_runs_own_folder_is_the_last_adapter_and_needs_quiet_time(trainers: Trainers) -> None:
    """`save_model` at the end writes no last file, so one look can't tell."""
    for program, name in (("hf_trainer", "lora"), ("trl_sft", "sft"), ("two_ranks", "ranks/lora")):
        folder = trainers.wrote(program).folder / name
        found, look = recognise(folder), look_at(folder)
        assert found is not None
        assert (found.kind, found.holds, look.state) == ("adapter", ("model",), "whole")


def test_deepspeeds_own_folder_is_its_newest_checkpoint(trainers: Trainers) -> None:
    written = trainers.wrote("deepspeed_zero")
    for stage in (1, 2, 3):
        folder = written.folder / f"zero{stage}"
        found = recognise(folder)
        assert found is not None
        assert (folder / "latest").read_text() == "global_step4"
        assert {name for name in found.files if name.endswith(".pt")} == {
            str(file.relative_to(folder)) for file in (folder / "global_step4").iterdir()
        }


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_what_deepspeed_makes_universal_holds_as_much(trainers: Trainers, stage: int, tmp_path: Path) -> None:
    run = shutil.copytree(trainers.wrote("deepspeed_zero").folder / f"zero{stage}", tmp_path / "run")
    tag, universal = run / "global_step4", run / "global_step4_universal"
    words = ["--input_folder", tag, "--output_folder", universal, "--inject_missing_state", "--num_extract_workers", 1]
    subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *map(str, words), "--num_merge_workers", "1"],
        env=environment(PROGRAMS["deepspeed_zero"]), check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    found, own = recognise(universal), recognise(tag)
    assert found is not None
    assert own is not None
    assert (found.writer, found.kind, found.holds) == (own.writer, own.kind, own.holds)
    assert set(found.files) == {str(file.relative_to(universal)) for file in universal.rglob("*") if file.is_file()}
    assert look_at(universal).state == "finished"
    (run / "latest_universal").unlink()
    assert look_at(universal).state == "whole"


def test_a_model_that_accelerate_saved_alone_lacks_its_config(trainers: Trainers) -> None:
    folder = trainers.wrote("two_ranks").folder / "accelerate-model"
    look = look_at(folder)
    assert (look.state, look.kind) == ("incomplete", "regular")
    assert "config.json" in look.reason


@each(*(run for run in EVERYDAY if "fsdp" not in run.name), *expected.BY_HAND)
def test_a_checkpoint_that_lost_any_file_that_counts_is_never_called_finished(
    trainers: Trainers, run: Run, tmp_path: Path
) -> None:
    """Of each the weights' files, cut by one byte, and gone."""
    written = trainers.wrote(run.program)
    path = written.checkpoint(run, max(run.places))
    weights = [path] if path.is_file() else [file for file in path.rglob("*") if holds_weights(file)]
    assert weights
    for number, file in enumerate(weights):
        for fault in (cut, Path.unlink):
            copy = tmp_path / f"{number}-{fault.__name__}" / path.parent.name
            shutil.copytree(path.parent, copy, symlinks=True)
            broken = copy / file.relative_to(path.parent)
            fault(broken)
            found = look_at(copy / path.name)
            assert found.state == "incomplete", (broken, found)


def holds_weights(file: Path) -> bool:
    named = (".safetensors", ".distcp", "_states.pt")
    return file.name.endswith(named) or file.name == "adapter_config.json"


def cut(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("torchtune", {"epoch_0": None, "epoch_1": None}),
        ("litgpt", {"step-000002": 2, "step-000004": 4, "final": None}),
    ],
)
def test_trainers_that_ran_elsewhere_are_known_by_what_they_left(
    name: str, steps: dict[str, int | None], tmp_path: Path, capsys: Capture
) -> None:
    """Each of these folders holds an adapter; torchtune's, and litgpt's last, hold the merged model beside it."""
    run = kept(name, tmp_path / name)
    for checkpoint in steps:
        found = recognise(run / checkpoint)
        assert found is not None
        assert (found.writer, found.kind, found.holds) == (name, "adapter", ("model",))
    rows = json.loads(lorakit(capsys, "ls", run, "--json").out)
    assert {Path(row["path"]).name: row["step"] for row in rows} == steps


@pytest.mark.parametrize(("name", "state", "step"), [("axolotl", "whole", None), ("llamafactory", "finished", 4)])
def test_at_the_end_of_a_run_its_own_folder_is_the_last_adapter(
    trainers: Trainers, name: str, state: str, step: int | None
) -> None:
    """LLaMA-Factory puts a `trainer_state.json` beside it; of axolotl's quiet time alone can tell."""
    folder = trainers.wrote(name).folder / name
    found, look = recognise(folder), look_at(folder)
    assert found is not None
    assert (found.kind, found.holds[0], look.state) == ("adapter", "model", state)
    (final,) = (one for one in checkpoints_of(folder) if one.folder == folder)
    row = metadata_of(final, with_digest=True)
    assert (row.step, row.base, row.rank) == (step, "/tmp/lorakit-by-hand/base", 2)


def test_looking_imports_neither_torch_nor_a_trainer(trainers: Trainers) -> None:
    folders = {trainers.wrote(run.program).folder / run.name for run in EVERYDAY if run.program != "deepspeed_zero"}
    code = (
        "import sys; from lorakit.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(*(name for name in sys.modules if '.' not in name), file=sys.stderr)"
    )
    words = [sys.executable, "-c", code, "ls", *map(str, sorted(folders))]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert len(ended.stdout.splitlines()) > sum(len(run.places) for run in EVERYDAY if run.program != "deepspeed_zero")
    imported = set(ended.stderr.splitlines()[-1].split())
    assert "lorakit" in imported
    assert not imported & {"torch", "transformers", "peft", "accelerate", "lightning", "trl", "datasets"}
