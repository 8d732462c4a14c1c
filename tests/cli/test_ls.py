"""`lorakit ls`: checkpoints as a table and as data."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.store.catalog import Facts
from lorakit.store.kept import Described, Kept, keep_checkpoint
from lorakit.store.store import Store
from tests.checkpoints.written import evaluated, write_checkpoint, write_model_checkpoint
from tests.cli.commands import lorakit
from tests.folders import write_adapter

Capture = pytest.CaptureFixture[str]
KEYS = [
    "id", "path", "run", "step", "epoch", "train_loss", "eval_loss", "eval_step", "metrics", "kind", "base", "rank",
    "size", "digest", "created", "state", "reason", "aliases",
]  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """sql at three steps, the last of which was evaluated before; a whole model; an adapter that may still change."""
    runs = tmp_path / "runs"
    log = [{"step": 100, "loss": 2.5}, evaluated(100, 1.5), evaluated(200, 1.25)]
    write_checkpoint(runs / "sql" / "checkpoint-100", log[:2], base_model_name_or_path="org/llama")
    write_checkpoint(runs / "sql" / "checkpoint-200", log, base_model_name_or_path="/models/llama")
    write_checkpoint(runs / "sql" / "checkpoint-300", [*log, {"step": 300, "loss": 0.5}])
    write_model_checkpoint(runs / "full" / "checkpoint-5")
    write_adapter(runs / "chat")
    return runs


def test_a_table_with_the_evaluations_own_step(capsys: Capture, runs: Path) -> None:
    ended = lorakit(capsys, "ls", runs / "sql")
    assert (ended.code, ended.err) == (0, "")
    columns = [line.split() for line in ended.out.splitlines()]
    assert " ".join(columns[0]) == "ID STEP TRAIN LOSS EVAL LOSS KIND BASE SIZE STATE ALIASES"
    assert columns[1][:6] == ["sql@step-100", "100", "2.5", "1.5", "adapter", "org/llama"]
    assert columns[2][:6] == ["sql@step-200", "200", "2.5", "1.25", "adapter", "llama"]
    assert columns[3][:8] == ["sql@step-300", "300", "0.5", "1.25", "(step", "200)", "adapter", "-"]
    assert [line[-2:] for line in columns[1:]] == [["finished", "-"]] * 3


def test_what_is_not_finished_is_listed_and_the_reason_said_beside_the_data(capsys: Capture, runs: Path) -> None:
    ended = lorakit(capsys, "ls", runs)
    assert [line.split()[0] for line in ended.out.splitlines()[1:]] == [
        "chat", "full@step-5", "sql@step-100", "sql@step-200", "sql@step-300",
    ]  # fmt: skip
    assert ended.err.startswith("chat is incomplete: nothing says yet that its writer is done; `lorakit check` waits")


def test_json_has_every_key_and_null_for_what_is_not_known(capsys: Capture, runs: Path) -> None:
    ended = lorakit(capsys, "ls", runs, "--json")
    rows = {row["id"]: row for row in json.loads(ended.out)}
    assert (ended.code, ended.err, len(rows)) == (0, "", 5)
    assert all(list(row) == KEYS for row in rows.values())
    last = rows["sql@step-300"]
    assert (last["step"], last["epoch"], last["train_loss"]) == (300, 3.0, 0.5)
    assert (last["eval_loss"], last["eval_step"], last["metrics"]) == (1.25, 200, {})
    assert (last["kind"], last["base"], last["rank"], last["aliases"]) == ("adapter", None, 2, [])
    assert last["path"] == str(runs / "sql" / "checkpoint-300")
    assert len(last["digest"]) == 64
    assert rows["full@step-5"]["kind"] == "regular"
    chat = rows["chat"]
    assert (chat["state"], chat["step"], chat["digest"], chat["eval_loss"]) == ("incomplete", None, None, None)


def test_filters_and_order(capsys: Capture, runs: Path) -> None:
    def ids(*arguments: str) -> list[str]:
        return [row["id"] for row in json.loads(lorakit(capsys, "ls", runs, *arguments, "--json").out)]

    assert ids("--filter", "eval_loss<1.3", "--filter", "step<300") == ["sql@step-200"]
    assert ids("--filter", "kind=adapter", "--sort", "step:desc") == [
        "sql@step-300", "sql@step-200", "sql@step-100", "chat",
    ]  # fmt: skip
    ended = lorakit(capsys, "ls", runs, "--filter", "eval_loss<0")
    assert (ended.code, ended.out, ended.err) == (0, "", "no checkpoint of these meets the filters\n")


def test_a_folder_named_twice_is_listed_once(capsys: Capture, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    twice = lorakit(capsys, "ls", "sql", ".", runs / "sql").out
    assert sorted(twice.split()) == sorted(lorakit(capsys, "ls").out.split())


def test_an_empty_folder_is_an_empty_list(capsys: Capture, tmp_path: Path) -> None:
    assert lorakit(capsys, "ls", tmp_path, "--json").out == "[]\n"
    ended = lorakit(capsys, "ls", tmp_path)
    assert (ended.code, ended.out, ended.err) == (0, "", "no checkpoints are there\n")


def test_the_exit_codes(capsys: Capture, tmp_path: Path, runs: Path) -> None:
    assert lorakit(capsys, "ls", tmp_path / "nowhere").code == 3
    assert lorakit(capsys, "ls", runs, "--filter", "eval_loss").code == 2
    assert lorakit(capsys, "ls", runs, "--filter", "nothing<1").code == 2
    assert lorakit(capsys, "ls", runs, "--sort", "step:up").code == 2


def test_many_reasons_are_cut_short(capsys: Capture, tmp_path: Path) -> None:
    for step in range(12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    errors = lorakit(capsys, "ls", tmp_path).err.splitlines()
    assert len(errors) == 11
    assert errors[-1] == "and 2 more: --json has every reason"


def test_names_in_files_give_a_terminal_no_orders(capsys: Capture, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a\x1b[2J" / "checkpoint-5", base_model_name_or_path="org/\x1b[31m")
    write_adapter(tmp_path / "b\x1b[2J")
    ended = lorakit(capsys, "ls", tmp_path)
    assert ended.code == 0
    assert "\x1b" not in ended.out + ended.err


def test_aliases_come_from_the_store(
    capsys: Capture, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.checkpoints.finished import look_at
    from lorakit.merge.base import read_base
    from lorakit.server.following.intake import take_in
    from tests.folders import write_base

    folder = runs / "sql" / "checkpoint-200"
    store = Store(tmp_path / "home", "llama")
    base = read_base(write_base(tmp_path / "base"))
    taken = take_in(store, base, look_at(folder), run="sql", kind="step", step=200, max_rank=8).revision
    store.move_alias("sql", "prod", taken.id, "test")
    store.close()
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    before = sorted(os.listdir(runs / "sql"))
    (row,) = json.loads(lorakit(capsys, "ls", runs, "--filter", "aliases=prod", "--json").out)
    assert (row["id"], row["digest"], set(row["aliases"])) == (taken.name, taken.digest, {"latest", "best", "prod"})
    assert sorted(os.listdir(runs / "sql")) == before


@pytest.fixture
def kept(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Kept]:
    """What was kept of a run that is no longer on disk, and one of another."""
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    found = []
    for run, step, loss in (("old", 100, 1.5), ("old", 200, 1.0), ("other", 5, 3.0)):
        facts = Facts(step=step, eval_loss=loss, eval_step=step)
        described = Described("adapter", "transformers", step, facts, "org/llama", 2)
        source = write_checkpoint(tmp_path / f"{run}-{step}", seed=step)
        found.append(keep_checkpoint(tmp_path / "home", source, described, run=run, unchanged=lambda: True))
    return found


def test_a_run_that_only_the_store_knows(capsys: Capture, kept: list[Kept]) -> None:
    rows = json.loads(lorakit(capsys, "ls", "old", "--json").out)
    assert all(list(row) == KEYS for row in rows)
    assert [row["id"] for row in rows] == [kept[0].id, kept[1].id]
    assert (rows[1]["path"], rows[1]["aliases"]) == (str(kept[1].folder), ["latest", "best"])
    assert (rows[1]["eval_loss"], rows[1]["state"], rows[1]["digest"]) == (1.0, "finished", kept[1].digest)


def test_all_that_the_store_keeps(capsys: Capture, kept: list[Kept], runs: Path) -> None:
    ended = lorakit(capsys, "ls", "--store")
    assert [line.split()[0] for line in ended.out.splitlines()[1:]] == [one.id for one in kept]
    ended = lorakit(capsys, "ls", "--store", "other")
    assert [line.split()[0] for line in ended.out.splitlines()[1:]] == [kept[2].id]
    ids = [row["id"] for row in json.loads(lorakit(capsys, "ls", runs / "sql", "other", "--json").out)]
    assert ids == ["sql@step-100", "sql@step-200", "sql@step-300", kept[2].id]


def test_one_that_lost_its_content_is_listed_with_the_reason_among_the_others(
    capsys: Capture, kept: list[Kept]
) -> None:
    kept[1].folder.chmod(0o755)
    for file in kept[1].folder.iterdir():
        file.unlink()
    ended = lorakit(capsys, "ls", "--store")
    assert ended.code == 0
    states = [word for word in ended.out.split() if word in ("finished", "refused")]
    assert states == ["finished", "refused", "finished"]
    assert f"{kept[1].id} is refused: '{kept[1].folder}' is empty: `lorakit store verify`" in ended.err
    for verb in ("show", "latest"):
        assert (lorakit(capsys, verb, "old").code, lorakit(capsys, verb, "other").code) == (4, 0)
    assert lorakit(capsys, "best", "old").out == f"{kept[0].folder}\n"


def test_a_name_that_was_given_in_the_run_is_an_alias(capsys: Capture, runs: Path) -> None:
    (runs / "sql" / "before-lr-drop").symlink_to("checkpoint-200")
    (row,) = json.loads(lorakit(capsys, "ls", runs / "sql", "--filter", "aliases=before-lr-drop", "--json").out)
    assert (row["id"], row["aliases"]) == ("sql@step-200", ["before-lr-drop"])
    shown = lorakit(capsys, "show", runs / "sql" / "checkpoint-200").out
    assert "aliases          before-lr-drop\n" in shown


def test_what_neither_disk_nor_store_knows_is_answered_with_the_nearest(capsys: Capture, kept: list[Kept]) -> None:
    ended = lorakit(capsys, "ls", "othr")
    assert (ended.code, ended.out) == (3, "")
    assert "did you mean 'other'?" in ended.err


def test_a_filter_by_a_field_that_there_is_not_names_the_nearest(capsys: Capture, runs: Path) -> None:
    ended = lorakit(capsys, "ls", runs, "--filter", "eval_los<1")
    assert (ended.code, "did you mean 'eval_loss'?" in ended.err) == (2, True)


def test_a_single_file_is_listed(capsys: Capture, tmp_path: Path) -> None:
    import torch

    torch.save({"state_dict": {"w": torch.ones(2)}, "global_step": 7}, tmp_path / "model.ckpt")
    (row,) = json.loads(lorakit(capsys, "ls", tmp_path / "model.ckpt", "--json").out)
    assert (row["step"], row["kind"], row["path"]) == (7, "regular", str(tmp_path / "model.ckpt"))


def test_on_a_narrow_terminal_numbers_and_ids_stay_whole(runs: Path) -> None:
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "lorakit", "ls", str(runs / "sql")]
    subprocess.run(command, stdout=slave, stderr=slave, check=True, env=environment, timeout=60)
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert all(id in shown for id in ("sql@step-100", "sql@step-200", "sql@step-300", "finished"))
