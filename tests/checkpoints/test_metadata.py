"""What is known of checkpoints, those of a real Trainer first."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import run as run_program
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.checkpoints import finished
from lorakit.checkpoints.finished import STALLED, Look, look_at
from lorakit.checkpoints.metadata import (
    Metadata,
    checkpoints_in,
    checkpoints_of,
    metadata_of,
    newest_finished,
    stored_by_path,
)
from lorakit.checkpoints.places import LocalPlace
from lorakit.errors import NotFound
from lorakit.merge.base import read_base
from lorakit.server.following.intake import take_in
from lorakit.store.store import Store
from tests.checkpoints.writings import distributed_metadata
from tests.checkpoints.written import evaluated, finish, write_checkpoint, write_model_checkpoint
from tests.folders import write_adapter, write_base

STATE = "trainer_state.json"
WAIT = "`lorakit check` waits and sees, and after 1 h it counts"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of transformers' Trainer: every second step is saved, every third evaluated, each logged."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    from tests.models import load, make_base

    runs = tmp_path_factory.mktemp("runs")
    base = make_base(runs.parent / f"{runs.name}-base", "gpt2")
    rows = [{"input_ids": list(range(k, k + 6)), "labels": list(range(k, k + 6))} for k in range(8)]
    torch.manual_seed(0)
    lora = LoraConfig(r=3, rank_pattern={"c_proj": 5}, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    for name in ("sql", "full"):
        model = load(base)
        if name == "sql":
            model = get_peft_model(model, lora)
        arguments = TrainingArguments(
            output_dir=str(runs / name), max_steps=6, per_device_train_batch_size=2, logging_steps=1, save_steps=2,
            eval_strategy="steps", eval_steps=3, report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2]).train()
    return runs


def listed(folder: Path, **more: Any) -> list[Metadata]:
    return [metadata_of(candidate, **more) for candidate in checkpoints_in(folder)]


def only(folder: Path, **more: Any) -> Metadata:
    (one,) = listed(folder, **more)
    return one


@pytest.mark.parametrize("name", ["sql", "full"])
def test_losses_are_those_that_the_trainer_logged_at_each_step(trained: Path, name: str) -> None:
    log = json.loads((trained / name / "checkpoint-6" / STATE).read_text())["log_history"]
    train = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    evaluation = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    rows = listed(trained / name)
    assert [row.step for row in rows] == [2, 4, 6]
    assert [row.train_loss for row in rows] == [train[2], train[4], train[6]]
    assert [row.eval_loss for row in rows] == [None, evaluation[3], evaluation[6]]
    assert [row.eval_step for row in rows] == [None, 3, 6]
    assert [row.metric("eval_loss") for row in rows] == [None, None, evaluation[6]]
    assert all("grad_norm" in (row.metrics or {}) for row in rows)
    assert [row.state for row in rows] == ["finished"] * 3


def test_a_trainers_adapters_and_whole_models_are_told_apart(trained: Path) -> None:
    rows = listed(trained)
    assert [(row.id, row.kind, row.rank) for row in rows] == [
        *((f"full@step-{step}", "regular", None) for step in (2, 4, 6)),
        *((f"sql@step-{step}", "adapter", 5) for step in (2, 4, 6)),
    ]
    assert rows[-1].base == f"{trained.parent / trained.name}-base"
    for row in rows:
        files = [file for file in Path(row.path).rglob("*") if file.is_file()]
        assert row.size == sum(file.stat().st_size for file in files)
        weights = "adapter_model.safetensors" if row.kind == "adapter" else "model.safetensors"
        assert row.created == (Path(row.path) / weights).stat().st_mtime


@given(part=st.floats(0, 0.99), name=st.sampled_from(["model.safetensors", "config.json", STATE]))
def test_a_whole_model_is_incomplete_while_any_of_its_files_is(trained: Path, part: float, name: str) -> None:
    folder = trained / "full" / "checkpoint-6"
    file = folder / name
    content, written = file.read_bytes(), file.stat().st_mtime_ns
    try:
        file.write_bytes(content[: int(len(content) * part)])
        row = only(folder)
        assert row.state == "incomplete"
        assert row.reason
    finally:
        file.write_bytes(content)
        os.utime(file, ns=(written, written))
    assert only(folder).state == "finished"


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = write_model_checkpoint(tmp_path / "full" / "checkpoint-5", shards=3)
    assert only(folder).state == "finished"
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert (only(folder).state, only(folder).reason) == (
        "incomplete",
        "model-00002-of-00003.safetensors is not there yet",
    )


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": [1]}', "{"])
def test_an_index_that_is_none_is_incomplete(tmp_path: Path, index: str) -> None:
    folder = write_model_checkpoint(tmp_path / "checkpoint-5", shards=2)
    (folder / "model.safetensors.index.json").write_text(index)
    assert only(folder).state == "incomplete"


def test_a_whole_model_needs_its_writers_last_file(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "checkpoint-5")
    assert only(folder).reason == f"nothing says yet that its writer is done; {WAIT}"
    finish(folder)
    assert only(folder).state == "finished"
    os.utime(folder / "model.safetensors", ns=(5 * 10**18, 5 * 10**18))
    older = "model.safetensors is newer than trainer_state.json, its writer's last file"
    assert only(folder).reason == f"{older}; if it is a copy, `touch {folder / STATE}`"
    (folder / "checkpoint-is-incomplete.txt").touch()
    assert "still writing" in (only(folder).reason or "")


def test_a_state_of_another_step_does_not_finish_a_whole_model(tmp_path: Path) -> None:
    folder = write_model_checkpoint(tmp_path / "checkpoint-5").rename(tmp_path / "checkpoint-6")
    assert (only(folder).state, only(folder).reason) == ("incomplete", f"trainer_state.json is of step 5; {WAIT}")


def test_a_distributed_checkpoint_is_finished_by_its_metadata_alone(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    for rank in (0, 1):
        (folder / f"__{rank}_0.distcp").write_bytes(bytes(64))
    assert (only(folder).kind, only(folder).state) == ("regular", "incomplete")
    (folder / ".metadata").write_bytes(distributed_metadata(0))
    assert (only(folder).kind, only(folder).state) == ("regular", "finished")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", STATE])
@pytest.mark.parametrize("content", [None, b"", b"{", b"\0" * 50, b"[]"])
def test_whatever_is_broken_is_listed_with_the_reason(tmp_path: Path, name: str, content: bytes | None) -> None:
    folder = write_checkpoint(tmp_path / "sql" / "checkpoint-5")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    row = only(folder, with_digest=True)
    assert (row.state, row.kind, row.step, row.digest) == ("incomplete", "adapter", 5, None)
    assert row.reason


def test_a_folder_of_someone_else_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (5, 6):
        write_checkpoint(tmp_path / "sql" / f"checkpoint-{step}")

    judged = finished._judged

    def denied(place: LocalPlace, path: Path) -> Look:
        if path.name == "checkpoint-6":
            raise PermissionError(13, "Permission denied", str(path))
        return judged(place, path)

    monkeypatch.setattr(finished, "_judged", denied)
    one, other = listed(tmp_path)
    assert (one.state, other.state, other.step) == ("finished", "incomplete", 6)
    assert "permission denied" in (other.reason or "")
    assert newest_finished(tmp_path / "sql").step == 5


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint-5")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert (only(folder).state, only(folder).kind) == ("refused", "adapter")


def test_what_only_time_could_call_finished_is_incomplete(tmp_path: Path) -> None:
    assert only(write_adapter(tmp_path / "chat")).reason == f"nothing says yet that its writer is done; {WAIT}"


@pytest.fixture
def an_hour_later(monkeypatch: pytest.MonkeyPatch) -> None:
    later = time.time() + 2.3 * STALLED
    monkeypatch.setattr("time.time", lambda: later)


def test_what_stays_unfinished_for_an_hour_is_stalled(tmp_path: Path, an_hour_later: None) -> None:
    folder = write_checkpoint(tmp_path / "sql" / "checkpoint-5")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    os.utime(weights, (1, 1))  # as a copy that keeps its source's times: it was put there just now
    row = only(folder)
    assert row.state == "stalled"
    assert (row.reason or "").endswith(" bytes; nothing was written for 2.3 h")
    (tmp_path / "sql" / "checkpoint-6").mkdir()
    assert [row.state for row in listed(tmp_path / "sql")] == ["stalled", "stalled"]


def test_what_is_whole_or_finished_or_still_written_to_is_not_stalled(tmp_path: Path, an_hour_later: None) -> None:
    whole, done = write_adapter(tmp_path / "whole"), write_checkpoint(tmp_path / "done")
    growing = write_checkpoint(tmp_path / "growing" / "checkpoint-5")
    (growing / "adapter_config.json").unlink()
    (growing / "global_step5").mkdir()
    (growing / "global_step5" / "rank_0.pt").touch()
    os.utime(growing / "global_step5" / "rank_0.pt", (time.time(), time.time()))
    assert [only(folder).state for folder in (whole, done, growing)] == ["finished", "finished", "incomplete"]


def test_a_plain_copy_is_finished_when_it_was_left_alone_for_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_checkpoint(tmp_path / "old" / "checkpoint-5")
    copy = tmp_path / "run" / "checkpoint-5"
    copy.mkdir(parents=True)
    for name in (STATE, "adapter_config.json", "adapter_model.safetensors"):  # in an order of its own
        shutil.copyfile(checkpoint / name, copy / name)
        os.utime(copy / name, ns=(10**18 + len(list(copy.iterdir())),) * 2)
    with pytest.raises(NotFound, match="if it is a copy, `touch"):
        newest_finished(copy)
    later = time.time() + 2.3 * STALLED
    monkeypatch.setattr("time.time", lambda: later)
    assert (only(copy).state, newest_finished(copy).folder) == ("finished", copy)
    linked = tmp_path / "linked" / "checkpoint-5"
    linked.parent.mkdir()
    linked.symlink_to(copy)
    os.utime(copy / "adapter_model.safetensors", (later, later))
    assert only(linked).state == "incomplete"


def test_what_lorakit_wrote_appeared_whole(tmp_path: Path) -> None:
    for folder in (write_adapter(tmp_path / "mixed"), write_base(tmp_path / "merged")):
        (folder / "lorakit.json").write_text("{}")
        assert only(folder).state == "finished"


def test_a_folder_of_runs_a_run_an_adapter_and_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (90, 1000):
        write_checkpoint(tmp_path / "sql" / f"checkpoint-{step}")
    write_adapter(tmp_path / "chat")
    write_base(tmp_path / "model")
    shutil.copytree(tmp_path / "sql" / "checkpoint-90", tmp_path / "sql", dirs_exist_ok=True)
    write_model_checkpoint(tmp_path / "full" / "checkpoint-5")
    shutil.copytree(tmp_path / "model", tmp_path / "full", dirs_exist_ok=True)
    (tmp_path / "nothing").mkdir()
    sql = ["sql@step-90", "sql@step-1000", "sql@final"]
    assert [row.id for row in listed(tmp_path)] == ["chat", "full@step-5", "full@final", "model", *sql]
    assert [row.id for row in listed(tmp_path / "sql")] == sql
    assert [row.id for row in listed(tmp_path / "sql" / "checkpoint-90")] == sql[:1]
    assert listed(tmp_path / "nothing") == []
    monkeypatch.chdir(tmp_path / "sql")
    assert [row.id for row in listed(Path())] == sql
    monkeypatch.chdir(tmp_path / "sql" / "checkpoint-90")
    assert [(row.id, row.path) for row in listed(Path())] == [(sql[0], str(tmp_path / "sql" / "checkpoint-90"))]
    with pytest.raises(NotFound, match="nowhere"):
        listed(tmp_path / "nowhere")


def test_the_last_save_into_the_run_itself_is_not_as_large_as_the_run(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "sql" / "checkpoint-90")
    shutil.copytree(tmp_path / "sql" / "checkpoint-90", tmp_path / "sql", dirs_exist_ok=True)
    step, final = listed(tmp_path / "sql")
    assert step.size == final.size


def test_latest_is_the_largest_finished_step_and_the_runs_own_root_is_newer(tmp_path: Path) -> None:
    for step in (90, 1000, 1100):
        write_checkpoint(tmp_path / "sql" / f"checkpoint-{step}")
    (tmp_path / "sql" / "checkpoint-1100" / STATE).unlink()
    assert newest_finished(tmp_path / "sql").step == 1000
    shutil.copytree(tmp_path / "sql" / "checkpoint-90", tmp_path / "sql", dirs_exist_ok=True)
    assert newest_finished(tmp_path / "sql").folder == tmp_path / "sql"
    (tmp_path / "sql" / STATE).unlink()
    assert newest_finished(tmp_path / "sql").step == 1000


def test_latest_of_what_has_none_says_why(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "sql" / "checkpoint-90")
    (folder / STATE).unlink()
    with pytest.raises(NotFound, match=r"none of the 1 checkpoints in .* the newest is incomplete: nothing says yet"):
        newest_finished(tmp_path / "sql")
    with pytest.raises(NotFound, match="is no run but holds some: name one of sql"):
        checkpoints_of(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match="there is no checkpoint in"):
        newest_finished(tmp_path / "empty")


def test_losses_that_are_no_numbers_are_null_in_json(tmp_path: Path) -> None:
    log = [evaluated(5, float("nan"), eval_accuracy=float("inf"))]
    row = only(write_checkpoint(tmp_path / "checkpoint-5", log)).as_dict()
    assert (row["eval_loss"], row["eval_step"], row["metrics"]) == (None, 5, {"eval_accuracy": None})
    assert json.dumps(row, allow_nan=False)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "home", "base")
    yield store
    store.close()


def test_what_the_store_took_in_has_its_name_digest_and_aliases(store: Store, tmp_path: Path) -> None:
    base = read_base(write_base(tmp_path / "base"))
    taken = {}
    for step, loss in ((5, 1.0), (6, 2.0)):
        folder = write_checkpoint(
            tmp_path / "runs" / "sql" / f"checkpoint-{step}", [evaluated(step, loss)], seed=step,
            target_modules=["q_proj", "down_proj", "up_proj"], base_model_name_or_path="org/base",
        )  # fmt: skip
        computed = only(folder, with_digest=True).digest
        taken[step] = take_in(store, base, look_at(folder), run="sql", kind="step", step=step, max_rank=8).revision
        assert computed == taken[step].digest
    store.move_alias("sql", "", taken[6].id, "test")
    store.move_alias("sql", "prod", taken[5].id, "test")
    known = stored_by_path(store.home)
    rows = listed(tmp_path / "runs", stored=known)
    assert [row.id for row in rows] == [taken[5].name, taken[6].name]
    assert [row.digest for row in rows] == [taken[5].digest, taken[6].digest]
    assert [set(row.aliases) for row in rows] == [{"best", "prod"}, {"sql", "latest"}]
    write_again = tmp_path / "runs" / "sql" / "checkpoint-6" / "adapter_config.json"
    write_again.write_text(write_again.read_text() + " ")
    changed = listed(tmp_path / "runs", stored=known)[1]
    assert (changed.id, changed.digest, changed.aliases) == ("sql@step-6", None, ())


def test_without_a_store_none_is_made(tmp_path: Path) -> None:
    assert stored_by_path(tmp_path / "home") == {}
    assert not (tmp_path / "home").exists()


def test_no_torch_is_needed() -> None:
    program = "import sys, lorakit.checkpoints.listing; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert run_program([sys.executable, "-c", program]).returncode == 0
