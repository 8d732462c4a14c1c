"""What goes from a run's folder, what never does, and what a crash or a writer in between leaves."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.checkpoints import pruning
from lorakit.checkpoints.finished import STALLED
from lorakit.checkpoints.pruning import ABANDONED, PrunePlan, execute_prune, plan_prune
from lorakit.checkpoints.retention import KeepBest, KeepEvery, KeepLast, Policy, Retention
from lorakit.errors import LorakitError, NotFound
from lorakit.store.catalog import Facts
from lorakit.store.store import Source, Store
from lorakit.store.trash_folders import HIDDEN
from tests.folders import factors, linear_modules, write_adapter, write_base

SMALL = factors(linear_modules(1))
START = time.time() - 100_000


def put(run: Path, step: int, eval_loss: float | None = None, *, done: bool = True) -> Path:
    """A checkpoint as the Trainer leaves it, or without its last file; written in the order of steps."""
    folder = write_adapter(run / f"checkpoint-{step}", SMALL)
    (folder / "optimizer.pt").write_bytes(b"o" * 100)
    if done:
        log = [] if eval_loss is None else [{"step": step, "eval_loss": eval_loss}]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
    for file in folder.iterdir():
        os.utime(file, (START + step, START + step))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Five checkpoints; the second is best."""
    for step, loss in ((100, 0.9), (200, 0.1), (300, 0.5), (400, 0.6), (500, 0.7)):
        put(tmp_path / "sql", step, loss)
    return tmp_path / "sql"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def plan(run: Path, *policies: Policy, home: Path | None = None, now: float | None = None) -> PrunePlan:
    return plan_prune(run, Retention(policies or (KeepLast(1),)), home=home or run.parent / "home", now=now)


def going(run: Path, *policies: Policy, later: float = 0) -> list[int]:
    return [verdict.sighted.checkpoint.step for verdict in plan(run, *policies, now=time.time() + later).going]


def reasons(run: Path, step: int, *, later: float = 0) -> str:
    found = {verdict.name: verdict for verdict in plan(run, now=time.time() + later).verdicts}
    return "; ".join(found[f"checkpoint-{step}"].reasons)


def steps_in(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


# the plan


def test_what_no_policy_keeps_goes(run: Path) -> None:
    assert going(run, KeepLast(2), KeepBest(1)) == [100, 300]
    assert going(run, KeepEvery(200)) == [100, 300]
    assert reasons(run, 100) == "nothing keeps it"
    assert reasons(run, 500) == "the newest; of the last 1"


def test_a_plan_writes_nothing_and_counts_every_byte(run: Path, home: Path) -> None:
    (run / "checkpoint-100" / "global_step100").mkdir()
    (run / "checkpoint-100" / "global_step100" / "rank_0.pt").write_bytes(b"r" * 1000)
    before = {path: path.lstat().st_mtime_ns for path in run.rglob("*")}
    sizes = {verdict.name: verdict.size for verdict in plan(run).verdicts}
    assert sizes["checkpoint-100"] == sum(f.stat().st_size for f in (run / "checkpoint-100").rglob("*") if f.is_file())
    assert {path: path.lstat().st_mtime_ns for path in run.rglob("*")} == before
    assert not home.exists()


def test_the_best_are_judged_by_their_own_steps_loss(run: Path) -> None:
    state = {"global_step": 600, "log_history": [{"step": 200, "eval_loss": 0.01}, {"step": 600, "eval_loss": 0.8}]}
    (put(run, 600) / "trainer_state.json").write_text(json.dumps(state))
    assert going(run, KeepBest(1)) == [100, 300, 400, 500]


def test_a_metric_that_none_has_stops_before_anything_goes(run: Path) -> None:
    with pytest.raises(NotFound, match=r"no checkpoint .* has the metric 'eval_los'.*there are eval_loss"):
        plan(run, KeepBest(1, "eval_los"))


def test_with_nothing_to_remove_a_metric_that_none_has_is_no_matter(tmp_path: Path) -> None:
    put(tmp_path / "sql", 100)
    assert going(tmp_path / "sql", KeepBest(1)) == []


def test_a_folder_without_checkpoints_and_none_at_all_are_told(tmp_path: Path) -> None:
    for name in ("nowhere", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(NotFound, match=name):
            plan(tmp_path / name)


def test_what_is_no_checkpoint_of_the_run_is_not_even_looked_at(run: Path) -> None:
    for name in ("logs", "checkpoint-best", "tmp-checkpoint-5", "nested/checkpoint-5", ".checkpoint-5"):
        (run / name).mkdir(parents=True)
    write_adapter(run.parent / "other")
    shutil.copytree(run.parent / "other", run, dirs_exist_ok=True)  # the run's own root
    (run / "checkpoint-7").write_text("a file")
    assert len(plan(run).verdicts) == 5


# what never goes


def test_an_unfinished_one_stays_while_it_is_young(run: Path) -> None:
    put(run, 50, done=False)
    (put(run, 60, done=False) / "adapter_model.safetensors").write_bytes(b"")
    assert going(run, later=STALLED - 60) == [100, 200, 300, 400]
    assert reasons(run, 60).startswith("unfinished: ")
    assert going(run, later=ABANDONED - 60) == [50, 100, 200, 300, 400], "what is whole counts after an hour"


def test_a_cut_short_one_goes_after_a_quiet_day_and_a_whole_one_counts_as_finished(run: Path) -> None:
    put(run, 550, done=False)
    (put(run, 600, done=False) / "adapter_model.safetensors").write_bytes(b"short")
    (run / "checkpoint-650").mkdir()
    (put(run, 700) / "checkpoint-is-incomplete.txt").touch()
    later = ABANDONED + 60
    assert going(run, later=later) == [100, 200, 300, 400, 500, 600, 650, 700]
    assert reasons(run, 550, later=later) == "the newest; of the last 1"
    assert reasons(run, 600, later=later).startswith("unfinished, and unchanged for 1 d: ")


def test_what_keeps_its_old_times_while_it_is_copied_is_young(run: Path) -> None:
    old = put(run, 600, done=False)
    (old / "adapter_model.safetensors").unlink()
    for file in (*old.iterdir(), old):
        os.utime(file, (1, 1))
    assert going(run) == [100, 200, 300, 400]


@pytest.mark.parametrize("file", ["weights.pt", "trainer_state.json"])
def test_what_is_of_no_known_kind_stays_however_old(run: Path, file: str) -> None:
    (run / "checkpoint-50").mkdir()
    (run / "checkpoint-50" / file).write_text("{}")
    assert 50 not in going(run, later=10 * ABANDONED)


def test_an_adapter_that_cant_be_read_stays_however_old(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(run, 50, done=False)

    def fails(place: object, name: str) -> None:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr("lorakit.checkpoints.finished.what_is_cut_short", fails)
    assert 50 not in going(run, later=10 * ABANDONED)


def test_a_regular_checkpoint_goes_when_its_writers_last_file_or_an_hour_says_that_it_was_done(run: Path) -> None:
    for step in (10, 20):
        folder = write_base(run / f"checkpoint-{step}")
        for file in folder.iterdir():
            os.utime(file, (START, START))
    (run / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 10}')
    os.utime(run / "checkpoint-10" / "trainer_state.json", (START + 1, START + 1))
    assert going(run, later=STALLED - 60) == [10, 100, 200, 300, 400]
    assert "can't be called finished" in reasons(run, 20)
    assert going(run, later=STALLED + 60) == [10, 20, 100, 200, 300, 400]
    (run / "checkpoint-10" / "model.safetensors").write_bytes(b"again")
    assert going(run) == [100, 200, 300, 400]


def test_the_newest_finished_one_stays_and_so_does_what_was_written_last(run: Path) -> None:
    put(run, 9000, done=False)
    assert going(run, KeepBest(1)) == [100, 300, 400]
    os.utime(run / "checkpoint-300" / "trainer_state.json")
    assert going(run, KeepBest(1)) == [100, 400]
    assert reasons(run, 300) == "written last"


def test_links_stay_and_so_does_what_they_lead_to(run: Path) -> None:
    elsewhere = put(run.parent / "elsewhere", 1)
    (run / "checkpoint-1").symlink_to(elsewhere)
    (run / "best").symlink_to("checkpoint-200")
    (run / "checkpoint-5").symlink_to("nowhere")
    assert going(run) == [100, 300, 400]
    assert reasons(run, 1) == reasons(run, 5) == "it is a link"
    assert reasons(run, 200) == "the link 'best' leads to it"


def aliased(home: Path, source: Path, *, alias: str = "prod", step: int = 100, base: str = "/models/llama") -> None:
    store = Store(home, base)
    with store.staging() as staged:
        (staged / "adapter_config.json").write_text(str(source))
        digest = store.keep(staged)[0]
    revision, _ = store.add(
        "sql", "step", digest, Facts(step=step), rank=2, size=1, path=str(source), source=Source("", ""),
        repaired=None, finished=True,
    )  # fmt: skip
    if alias != "latest":
        store.move_alias("sql", alias, revision.id, "set")
    store.close()


@pytest.mark.parametrize(("alias", "name"), [("prod", "sql@prod"), ("", "sql"), ("latest", "sql@latest")])
def test_what_an_alias_of_the_store_points_at_stays(run: Path, home: Path, alias: str, name: str) -> None:
    aliased(home, run / "checkpoint-100", alias=alias)
    assert going(run) == [200, 300, 400]
    assert f"the store's '{name}' points at it" in reasons(run, 100)


def test_aliases_count_for_every_base_and_by_whatever_way_the_folder_was_named(run: Path, home: Path) -> None:
    (run.parent / "by-link").symlink_to(run)
    aliased(home, run.parent / "by-link" / "checkpoint-100")
    aliased(home, run / "checkpoint-300", base="/models/other")
    assert going(run) == going(run.parent / "by-link") == [200, 400]


def test_a_revision_without_an_alias_holds_nothing(run: Path, home: Path) -> None:
    aliased(home, run / "checkpoint-100", alias="latest")
    aliased(home, run / "checkpoint-500", alias="latest", step=500)
    assert going(run) == [100, 200, 300, 400]


def test_a_store_that_cant_be_read_stops_it(run: Path, home: Path) -> None:
    home.mkdir()
    (home / "store.sqlite3").write_text("no database")
    with pytest.raises(LorakitError, match="store"):
        plan(run)


# removing


def test_what_goes_is_gone_and_nothing_else_is_touched(run: Path) -> None:
    kept = {path: path.read_bytes() for step in (200, 500) for path in (run / f"checkpoint-{step}").iterdir()}
    done = execute_prune(plan(run, KeepBest(1)))
    assert done.removed == ("checkpoint-100", "checkpoint-300", "checkpoint-400")
    assert (dict(done.spared), done.left) == ({}, ())
    assert steps_in(run) == ["checkpoint-200", "checkpoint-500"]
    assert {path: path.read_bytes() for path in kept} == kept
    assert execute_prune(plan(run, KeepBest(1))).removed == ()


@pytest.mark.parametrize(
    ("meanwhile", "why"),
    [
        (lambda run: (run / "checkpoint-100" / "optimizer.pt").write_bytes(b"x"), "optimizer.pt is newer"),
        (lambda run: (run / "checkpoint-100" / "README.md").write_bytes(b"x"), "written to"),
        (lambda run: (run / "checkpoint-100" / "note").touch(), "written to"),
        (lambda run: (run / "checkpoint-100" / "checkpoint-is-incomplete.txt").touch(), "still writing"),
        (lambda run: shutil.rmtree(run / "checkpoint-100"), "gone already"),
        (lambda run: (run / "best").symlink_to("checkpoint-100"), "the link 'best'"),
        (lambda run: aliased(run.parent / "home", run / "checkpoint-100"), "sql@prod"),
        (lambda run: [shutil.rmtree(run / f"checkpoint-{step}") for step in (200, 300, 400, 500)], "the newest"),
    ],
)  # fmt: skip
def test_what_changed_since_the_plan_is_spared(run: Path, meanwhile: Callable[[Path], object], why: str) -> None:
    planned = plan(run)
    meanwhile(run)
    done = execute_prune(planned)
    assert why in done.spared["checkpoint-100"]
    assert (run / "checkpoint-100").is_dir() == (why != "gone already")
    assert "checkpoint-100" not in done.removed


def test_what_came_since_the_plan_does_not_go(run: Path) -> None:
    planned = plan(run)
    put(run, 50)
    assert "checkpoint-50" not in execute_prune(planned).removed
    assert (run / "checkpoint-50").is_dir()


def test_a_write_between_the_last_look_and_the_rename_puts_it_back(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def writes_first(self: Path, target: Path) -> Path:
        if self.name == "checkpoint-100":
            (self / "note").write_text("a trainer was here")
        return rename(self, target)

    planned = plan(run)
    monkeypatch.setattr(Path, "rename", writes_first)
    done = execute_prune(planned)
    assert "written to" in done.spared["checkpoint-100"]
    assert (run / "checkpoint-100" / "note").read_text() == "a trainer was here"
    assert steps_in(run) == ["checkpoint-100", "checkpoint-500"]


def dies_at(patch: pytest.MonkeyPatch, moment: int) -> None:
    """Interrupt the process at one of its calls that change folders, or open one."""
    count = iter(range(10_000))

    def deadly(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            if next(count) == moment:
                raise KeyboardInterrupt
            return real(*arguments, **named)

        return call

    for name in ("open", "rename", "unlink", "rmdir"):
        patch.setattr(os, name, deadly(getattr(os, name)))


def test_killed_at_any_moment_no_checkpoint_is_half_there_and_the_next_call_clears(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = {path.name: len(list(path.iterdir())) for path in run.iterdir()}
    for moment in range(100):
        place = tmp_path / f"run-{moment}"
        shutil.copytree(run, place)
        planned = plan(place)
        ended = False
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            dies_at(patch, moment)
            execute_prune(planned)
            ended = True
        seen = {path.name: len(list(path.iterdir())) for path in place.iterdir() if not path.name.startswith(HIDDEN)}
        assert seen.items() <= whole.items()
        assert "checkpoint-500" in seen
        execute_prune(plan(place))
        assert steps_in(place) == ["checkpoint-500"]
        if ended:
            break
    assert ended
    assert moment > 20


def test_two_prunes_at_once_take_nothing_from_each_other(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = plan(run), plan(run)
    unchanged = pruning._is_unchanged
    others: list[tuple[str, ...]] = []

    def other_comes_in(folder: Path, before: pruning.Contents) -> bool:
        if folder.name.startswith(HIDDEN) and not others:
            others.append(())
            others[0] = execute_prune(second).removed
        return unchanged(folder, before)

    monkeypatch.setattr(pruning, "_is_unchanged", other_comes_in)
    done = execute_prune(first)
    assert done.removed == ("checkpoint-100",)
    assert others[0] == ("checkpoint-200", "checkpoint-300", "checkpoint-400")
    assert steps_in(run) == ["checkpoint-500"]


def test_what_cant_be_removed_wholly_is_out_of_the_run_and_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(run, KeepLast(4))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    (left,) = execute_prune(planned).left
    assert left.name.startswith(f"{HIDDEN}checkpoint-100-")
    assert not (run / "checkpoint-100").exists()
