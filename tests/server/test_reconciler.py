"""What is served follows what is on disk and in the store, one step at a time; here the steps are taken by hand."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import Incomplete, LorakitError, NotFound, Refused
from lorakit.merge.base import read_base
from lorakit.server.engines.engine import LoadFailed
from lorakit.server.following.reconciler import Reconciler
from lorakit.store.store import Store
from tests.checkpoints.writings import lora_state
from tests.server.fake_engine import (
    FakeEngine,
    fingerprint_of,
    overwrite,
    put_adapter,
    put_checkpoint,
    settings_for,
)

pytestmark = pytest.mark.anyio


class Room:
    def __init__(self, folder: Path, base: Path, engine: FakeEngine, reconciler: Reconciler) -> None:
        self.folder, self.base, self.engine, self.reconciler = folder, base, engine, reconciler
        self.runs = folder / "runs"

    async def step(self) -> None:
        await self.reconciler.step()

    async def settle(self) -> None:
        """Until what has no marker has been quiet for long enough."""
        await self.step()
        await asyncio.sleep(0.06)
        await self.step()

    def meant(self, model: str) -> str | None:
        """The label behind a model's name, such as `step-500`; None when there is none."""
        try:
            revision = self.reconciler.resolve(model)
        except NotFound:
            return None
        assert revision is not None
        return revision.label or "plain"

    def text(self, model: str) -> str:
        """The fingerprint of what answers, through the engine."""
        revision = self.reconciler.resolve(model)
        assert revision is not None
        resident = self.reconciler.residency.find(revision.name)
        assert resident is not None
        return self.engine.inside[resident.engine_name]

    def why(self, run: str) -> str:
        return "; ".join(
            f"{waiting.state}: {waiting.reason}"
            for waiting in self.reconciler.waiting.values()
            if waiting.candidate.run == run
        )

    def told(self, kind: str) -> list[str]:
        return [event.data["message"] for event in self.reconciler.events._kept if event.kind == kind]


@asynccontextmanager
async def room(
    folder: Path, base: Path, *, slots: int = 4, max_rank: int = 16, engine: FakeEngine | None = None, **more: Any
) -> AsyncIterator[Room]:
    settings = settings_for(folder, **more)
    engine = engine or FakeEngine(base, slots=slots, max_rank=max_rank)
    store = Store(settings.store_home, str(base))
    reconciler = Reconciler(settings, engine, store, read_base(base))
    await reconciler.recall()
    try:
        yield Room(folder, base, engine, reconciler)
    finally:
        await reconciler.close()


# which revision a name means


async def test_latest_is_the_largest_step_in_whatever_order_checkpoints_were_there(
    tmp_path: Path, numbers: Path
) -> None:
    for step in (1000, 50, 500):
        put_checkpoint(tmp_path / "runs" / "sql", step)
    async with room(tmp_path, numbers) as r:
        await r.step()
        assert r.meant("sql") == r.meant("sql@latest") == "step-1000"
        assert r.meant("sql@step-50") == "step-50"


async def test_a_smaller_step_under_a_running_server_begins_a_new_attempt(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    put_checkpoint(run, 500)
    put_checkpoint(run, 1000)
    async with room(tmp_path, numbers) as r:
        await r.step()
        put_checkpoint(run, 300)
        await r.step()
        assert r.meant("sql") == r.meant("sql@latest") == "step-300"
        put_checkpoint(run, 800)
        await r.step()
        assert r.meant("sql") == "step-800"
        assert r.meant("sql@step-1000") == "step-1000"


async def test_a_folder_written_over_is_a_new_attempt_and_the_newest_of_its_step(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    folder = put_checkpoint(run, 500)
    put_checkpoint(run, 1000)
    async with room(tmp_path, numbers) as r:
        await r.step()
        old = r.reconciler.resolve("sql@step-500")
        overwrite(folder, 77)
        await r.step()
        new = r.reconciler.resolve("sql@step-500")
        assert new is not None
        assert old is not None
        assert new.digest != old.digest
        assert r.meant("sql") == "step-500"
        assert r.text("sql") == fingerprint_of(folder)
        assert r.reconciler.resolve(old.name) == old


async def test_the_same_content_written_again_is_the_same_revision(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    folder = put_checkpoint(run, 500)
    put_checkpoint(run, 1000)
    async with room(tmp_path, numbers) as r:
        await r.step()
        before = r.reconciler.resolve("sql@step-500")
        shutil.rmtree(folder)
        await r.step()
        put_checkpoint(run, 500)
        await r.step()
        assert r.reconciler.resolve("sql@step-500") == before
        assert r.meant("sql@latest") == "step-500"
        assert len(r.reconciler.runs["sql"].revisions) == 2
        assert len(r.engine.loads) == len(set(r.engine.loads))


async def test_metrics_that_come_later_begin_no_attempt(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    folder = put_checkpoint(run, 500)
    put_checkpoint(run, 1000, eval_loss=0.5)
    async with room(tmp_path, numbers) as r:
        await r.step()
        assert r.meant("sql@best") == "step-1000"
        from tests.server.fake_engine import trainer_state

        (folder / "trainer_state.json").write_text(trainer_state(500, 0.1))
        await r.step()
        assert r.meant("sql@best") == "step-500"
        assert r.meant("sql") == "step-1000"


async def test_the_runs_own_root_is_final_and_newer_than_every_checkpoint(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    put_checkpoint(run, 1000)
    async with room(tmp_path, numbers) as r:
        await r.step()
        root = put_adapter(tmp_path / "root", 5)
        for file in root.iterdir():
            shutil.copy(file, run / file.name)
        await r.settle()
        assert r.meant("sql") == r.meant("sql@latest") == r.meant("sql@final") == "final"
        assert r.text("sql") == fingerprint_of(root)
        assert r.meant("sql@step-1000") == "step-1000"


async def test_best_is_the_lowest_loss_of_its_own_step_and_nan_is_worst(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    put_checkpoint(run, 100, eval_loss=float("nan"))
    async with room(tmp_path, numbers) as r:
        await r.step()
        put_checkpoint(run, 200, eval_loss=0.9)
        put_checkpoint(run, 300, eval_loss=0.1, eval_step=250)
        put_checkpoint(run, 400)
        await r.step()
        assert r.meant("sql@best") == "step-200"
        put_checkpoint(run, 500, eval_loss=0.8)
        await r.step()
        assert r.meant("sql@best") == "step-500"
        put_checkpoint(run, 150, eval_loss=0.3)  # another attempt: best looks at all of them
        put_checkpoint(run, 160, eval_loss=0.7)
        await r.step()
        assert (r.meant("sql@best"), r.meant("sql@latest")) == ("step-150", "step-160")


async def test_nothing_measured_is_best(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    async with room(tmp_path, numbers) as r:
        await r.step()
        assert r.meant("sql@best") is None
        assert r.meant("sql") == "step-100"


@pytest.mark.parametrize(("follow", "first", "second"), [("latest", "step-100", "step-200"),
                                                         ("best", "step-100", "step-100")])  # fmt: skip
async def test_a_name_follows_what_the_server_was_told(
    tmp_path: Path, numbers: Path, follow: str, first: str, second: str
) -> None:
    run = tmp_path / "runs" / "sql"
    async with room(tmp_path, numbers, follow=follow) as r:
        put_checkpoint(run, 100, eval_loss=0.1)
        await r.step()
        assert r.meant("sql") == first
        put_checkpoint(run, 200, eval_loss=0.2)
        await r.step()
        assert r.meant("sql") == second


async def test_followed_by_hand_a_name_stays_where_it_was_put(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    async with room(tmp_path, numbers, follow="manual") as r:
        put_checkpoint(run, 100)
        await r.step()
        assert r.meant("sql") == "step-100", "what has something ready answers"
        put_checkpoint(run, 200)
        await r.step()
        assert (r.meant("sql"), r.meant("sql@latest")) == ("step-100", "step-200")
        await r.reconciler.set_alias("sql", "sql", "step-200")
        put_checkpoint(run, 300)
        await r.step()
        assert (r.meant("sql"), r.meant("sql@latest")) == ("step-200", "step-300")


async def test_what_was_there_before_the_first_look_begins_no_attempt_however_late_it_is_ready(
    tmp_path: Path, numbers: Path
) -> None:
    run = tmp_path / "runs" / "sql"
    put_adapter(run / "checkpoint-100", 1)  # without a marker: it needs quiet time
    put_checkpoint(run, 200)
    async with room(tmp_path, numbers) as r:
        await r.step()
        assert r.meant("sql@step-100") is None
        await r.settle()
        assert r.meant("sql@step-100") == "step-100"
        assert r.meant("sql") == r.meant("sql@latest") == "step-200"


async def test_a_run_that_started_again_while_no_server_ran_is_followed(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    folder = put_checkpoint(run, 100)
    put_checkpoint(run, 200)
    async with room(tmp_path, numbers) as r:
        await r.step()
    overwrite(folder, 77)
    async with room(tmp_path, numbers) as r:
        await r.step()
        assert r.meant("sql") == "step-100"
        assert r.text("sql") == fingerprint_of(folder)


# moving by hand


async def test_rollback_stays_until_the_name_follows_again(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    async with room(tmp_path, numbers) as r:
        for step in (100, 200):
            put_checkpoint(run, step)
            await r.step()
        await r.reconciler.rollback("sql")
        assert r.meant("sql") == "step-100"
        put_checkpoint(run, 300)
        await r.step()
        assert (r.meant("sql"), r.meant("sql@latest")) == ("step-100", "step-300")
        await r.reconciler.set_alias("sql", "sql", "sql@latest")
        assert r.meant("sql") == "step-300"
        put_checkpoint(run, 400)
        await r.step()
        assert r.meant("sql") == "step-400"


async def test_a_rollback_outlives_a_restart(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    async with room(tmp_path, numbers) as r:
        for step in (100, 200):
            put_checkpoint(run, step)
            await r.step()
        await r.reconciler.rollback("sql")
    async with room(tmp_path, numbers) as r:
        await r.step()
        assert r.meant("sql") == "step-100"


async def test_there_is_nothing_to_roll_back_to_at_first(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    async with room(tmp_path, numbers) as r:
        await r.step()
        with pytest.raises(NotFound, match="nothing"):
            await r.reconciler.rollback("sql")
        with pytest.raises(NotFound):
            await r.reconciler.rollback("nobody")


@pytest.mark.parametrize("alias", ["latest", "best", "final", "mix", "step-100", "3fa9c1d2", "a b", "", "é", "a/b"])
async def test_an_alias_that_would_mean_something_else_is_refused(tmp_path: Path, numbers: Path, alias: str) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    async with room(tmp_path, numbers) as r:
        await r.step()
        if alias:
            with pytest.raises(Refused):
                await r.reconciler.set_alias("sql", alias, "step-100")
        with pytest.raises(NotFound):
            await r.reconciler.set_alias("sql", "prod", alias + "nothing")
        with pytest.raises(NotFound):
            await r.reconciler.set_alias("sql", "prod", "")


# refusals


async def test_a_failed_load_is_refused_and_what_was_served_goes_on(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    async with room(tmp_path, numbers) as r:
        put_checkpoint(run, 100, eval_loss=0.5)
        await r.step()
        bad = put_checkpoint(run, 200, eval_loss=0.1)
        r.engine.refuses.add(fingerprint_of(bad))
        await r.step()
        assert {r.meant(name) for name in ("sql", "sql@latest", "sql@best")} == {"step-100"}
        assert r.meant("sql@step-200") is None
        states = {r.reconciler.state_of(one) for one in r.reconciler.runs["sql"].revisions.values()}
        assert states == {("ready", None), ("refused", "these weights are not loaded here")}
        assert "not loaded here" in r.told("refused")[0]
        put_checkpoint(run, 300)
        await r.step()
        assert r.meant("sql") == "step-300"


async def test_a_new_attempt_that_the_engine_refuses_leaves_the_old_one_serving(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    async with room(tmp_path, numbers) as r:
        put_checkpoint(run, 500)
        put_checkpoint(run, 1000)
        await r.step()
        r.engine.broken.add(fingerprint_of(put_checkpoint(run, 100)))
        await r.step()
        assert r.meant("sql") == "step-1000"


@pytest.mark.parametrize(
    "name", ["latest", "best", "final", "mix", "numbers", "a b", "-x", "_x", "é", "x" * 129, "a@b"]
)
async def test_a_folder_whose_name_cant_be_one_is_reported_as_refused(tmp_path: Path, numbers: Path, name: str) -> None:
    put_checkpoint(tmp_path / "runs" / name, 100)
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    async with room(tmp_path, numbers) as r:
        await r.step()
        assert r.why(name).startswith("refused: the" if name in ("latest", "best", "final", "mix", "numbers")
                                      else "refused: '")  # fmt: skip
        assert "rename" in r.why(name)
        assert r.meant("sql") == "step-100"
        assert name not in r.reconciler.runs


async def test_a_folder_whose_name_is_no_text_is_reported_as_refused(tmp_path: Path, numbers: Path) -> None:
    folder = put_checkpoint(tmp_path / "runs" / "other", 100)
    os.rename(os.fsencode(folder.parent), os.fsencode(tmp_path / "runs") + b"/\xff\xfe")
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    async with room(tmp_path, numbers) as r:
        await r.step()
        assert r.meant("sql") == "step-100"
        assert [waiting.state for waiting in r.reconciler.waiting.values()] == ["refused"]


async def test_what_stays_unfinished_is_told_once_as_stalled_and_served_when_it_is_done(
    tmp_path: Path, numbers: Path
) -> None:
    folder = put_checkpoint(tmp_path / "runs" / "sql", 100)
    config = (folder / "adapter_config.json").read_bytes()
    (folder / "adapter_config.json").unlink()
    async with room(tmp_path, numbers) as r:
        now = [0.0]
        r.reconciler._arrivals.watcher._clock = lambda: now[0]
        for now[0] in (0.0, 3599.0, 3600.0, 9000.0):
            await r.step()
        (told,) = r.told("stalled")
        assert told == (
            "sql@step-100 is stalled: adapter_config.json is not there yet; nothing was written for more than 1 h"
        )
        assert r.why("sql").startswith("incomplete: adapter_config.json is not there yet; nothing was written")
        (folder / "adapter_config.json").write_bytes(config)
        os.utime(folder / "trainer_state.json")
        await r.step()
        assert r.meant("sql") == "step-100"


async def test_an_adapter_without_peft_files_is_refused_with_the_command_that_helps(
    tmp_path: Path, numbers: Path
) -> None:
    folder = tmp_path / "runs" / "sql" / "checkpoint-100"
    folder.mkdir(parents=True)
    (folder / "lit_model.pth.lora").write_bytes(lora_state(0))
    async with room(tmp_path, numbers) as r:
        await r.settle()
        assert r.why("sql").startswith("refused: it is an adapter as litgpt writes it")
        assert "lorakit convert" in r.why("sql")


async def test_a_regular_checkpoint_is_refused_with_the_command_that_helps(tmp_path: Path, numbers: Path) -> None:
    folder = tmp_path / "runs" / "full" / "checkpoint-100"
    folder.mkdir(parents=True)
    shutil.copy(numbers / "model.safetensors", folder)
    async with room(tmp_path, numbers) as r:
        await r.step()
        assert "lorakit extract" in r.why("full")
        assert "lorakit convert" in r.why("full")
        assert r.meant("full") is None
        assert r.reconciler.converged


@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.pt"])
async def test_a_pickled_adapter_is_refused_and_never_opened(tmp_path: Path, numbers: Path, file: str) -> None:
    folder = put_checkpoint(tmp_path / "runs" / "sql", 100)
    (folder / "adapter_model.safetensors").rename(folder / file)
    (folder / file).chmod(0)
    async with room(tmp_path, numbers) as r:
        await r.step()
        assert r.why("sql").startswith("refused:")
        assert "pickle" in r.why("sql")
        assert not r.engine.loads


async def test_an_adapter_for_another_base_never_reaches_the_engine(tmp_path: Path, numbers: Path) -> None:
    from tests.folders import factors, write_adapter

    write_adapter(tmp_path / "runs" / "a", factors({"model.layers.0.self_attn.q_proj": (16, 16)}))
    write_adapter(tmp_path / "runs" / "b", factors({"model.layers.7.self_attn.q_proj": (8, 8)}))
    put_adapter(tmp_path / "runs" / "c", rank=32)
    put_adapter(tmp_path / "runs" / "d", use_dora=True)
    async with room(tmp_path, numbers) as r:
        await r.settle()
        assert "another base" in r.why("a")
        assert "another base" in r.why("b")
        assert "--max-lora-rank 32" in r.why("c")
        assert "lorakit shrink" in r.why("c")
        assert "lorakit merge" in r.why("d")
        assert r.engine.loads == []
        assert not list((tmp_path / "home" / "tmp").iterdir())


async def test_nan_is_refused_before_the_engine_sees_it(tmp_path: Path, numbers: Path) -> None:
    from tests.folders import factors, linear_modules, write_adapter

    tensors = factors(linear_modules())
    next(iter(tensors.values()))[0, 0] = float("nan")
    write_adapter(tmp_path / "runs" / "sql", tensors)
    async with room(tmp_path, numbers) as r:
        await r.settle()
        assert "NaN" in r.why("sql")
        assert r.engine.loads == []


async def test_what_nobody_thought_of_in_one_folder_keeps_no_other_from_being_served(
    tmp_path: Path, numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_checkpoint(tmp_path / "runs" / "a", 100)
    put_checkpoint(tmp_path / "runs" / "b", 100)
    from lorakit.server.following import arrivals

    real = arrivals.take_in

    def take_in(*given: Any, run: str, **more: Any) -> Any:
        if run == "a":
            raise ZeroDivisionError("surprise")
        return real(*given, run=run, **more)

    monkeypatch.setattr(arrivals, "take_in", take_in)
    async with room(tmp_path, numbers) as r:
        await r.step()
        assert r.meant("b") == "step-100"
        assert "surprise" in r.why("a")
        monkeypatch.undo()
        await r.step()
        assert r.meant("a") == "step-100"


async def test_a_refused_folder_that_is_made_right_is_served(tmp_path: Path, numbers: Path) -> None:
    folder = put_checkpoint(tmp_path / "runs" / "sql", 100, rank=32)
    async with room(tmp_path, numbers) as r:
        await r.step()
        assert "rank 32" in r.why("sql")
        shutil.rmtree(folder)
        put_checkpoint(tmp_path / "runs" / "sql", 100)
        await r.step()
        assert (r.meant("sql"), r.why("sql")) == ("step-100", "")


async def test_after_a_restart_what_the_engine_refuses_takes_no_name_for_a_moment(
    tmp_path: Path, numbers: Path
) -> None:
    run = tmp_path / "runs" / "sql"
    put_checkpoint(run, 100)
    bad = put_checkpoint(run, 200)
    for _ in range(2):
        engine = FakeEngine(numbers)
        engine.refuses.add(fingerprint_of(bad))
        async with room(tmp_path, numbers, engine=engine) as r:
            await r.step()
            assert r.meant("sql") == "step-100"
            assert not any("step-200" in line for line in r.told("alias"))


# what is watched


async def test_a_watched_folder_that_is_the_run_itself_has_its_name(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs", 100)
    async with room(tmp_path, numbers) as r:
        await r.step()
        assert r.meant("runs@step-100") == "step-100"


async def test_an_adapter_in_a_watched_folder_needs_quiet_time(tmp_path: Path, numbers: Path) -> None:
    put_adapter(tmp_path / "runs" / "chat")
    async with room(tmp_path, numbers) as r:
        await r.step()
        assert r.meant("chat") is None
        assert r.why("chat").startswith("incomplete")
        assert not r.reconciler.converged
        await asyncio.sleep(0.06)
        await r.step()
        assert r.meant("chat") == "plain"
        assert r.reconciler.converged


async def test_one_folder_may_be_served_under_two_names(tmp_path: Path, numbers: Path) -> None:
    folder = put_checkpoint(tmp_path / "runs" / "sql", 100)
    async with room(tmp_path, numbers, adapters={"prod": str(folder), "other": str(folder.parent)}) as r:
        await r.step()
        assert [r.meant(f"{name}@step-100") for name in ("sql", "prod", "other")] == ["step-100"] * 3
        put_checkpoint(tmp_path / "runs" / "sql", 200)
        await r.step()
        assert [r.meant(name) for name in ("sql", "prod", "other")] == ["step-200", "step-100", "step-200"]


async def test_a_watched_folder_that_goes_away_takes_nothing_with_it(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    async with room(tmp_path, numbers) as r:
        await r.step()
        shutil.rmtree(tmp_path / "runs")
        await r.step()
        assert r.meant("sql") == "step-100"
        put_checkpoint(tmp_path / "runs" / "sql", 200)
        await r.step()
        assert r.meant("sql") == "step-200"


async def test_what_is_still_being_written_is_not_served_and_says_what_is_missing(
    tmp_path: Path, numbers: Path
) -> None:
    done = put_checkpoint(tmp_path / "there", 100)
    folder = tmp_path / "runs" / "sql" / "checkpoint-100"
    folder.mkdir(parents=True)
    weights = (done / "adapter_model.safetensors").read_bytes()
    async with room(tmp_path, numbers) as r:
        (folder / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
        await r.settle()
        assert "incomplete" in r.why("sql")
        (folder / "adapter_model.safetensors").write_bytes(weights)
        await r.settle()
        assert "adapter_config.json is not there" in r.why("sql")
        shutil.copy(done / "adapter_config.json", folder)
        await r.step()
        assert r.meant("sql") is None
        shutil.copy(done / "trainer_state.json", folder)
        await r.step()
        assert (r.meant("sql"), r.why("sql")) == ("step-100", "")


# ready


async def test_ready_waits_for_an_adapter_named_at_start(tmp_path: Path, numbers: Path) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    async with room(tmp_path, numbers, adapters={"chat": str(folder)}) as r:
        await r.step()
        assert not r.reconciler.converged
        folder.rmdir()
        put_adapter(folder)
        await r.settle()
        assert r.reconciler.converged
        assert r.meant("chat") == "plain"


async def test_an_unfinished_checkpoint_beside_one_that_is_served_holds_nothing_up(
    tmp_path: Path, numbers: Path
) -> None:
    run = tmp_path / "named"
    put_checkpoint(run, 100)
    (run / "checkpoint-200").mkdir()
    async with room(tmp_path, numbers, adapters={"sql": str(run)}) as r:
        await r.step()
        assert r.reconciler.converged
        assert r.meant("sql") == "step-100"


async def test_a_named_folder_that_is_not_there_is_reported_as_refused(tmp_path: Path, numbers: Path) -> None:
    async with room(tmp_path, numbers, adapters={"chat": str(tmp_path / "nowhere")}) as r:
        await r.step()
        assert r.reconciler.converged
        assert "there is no folder" in r.why("chat")
        put_checkpoint(tmp_path / "nowhere", 100)
        await r.step()
        assert (r.meant("chat"), r.why("chat")) == ("step-100", "")


# restart


async def test_a_new_process_on_the_same_store_serves_all_again_though_sources_are_gone(
    tmp_path: Path, numbers: Path
) -> None:
    run = tmp_path / "runs" / "sql"
    put_checkpoint(run, 100, eval_loss=0.1)
    put_checkpoint(run, 200)
    async with room(tmp_path, numbers) as r:
        await r.step()
        await r.reconciler.set_alias("sql", "prod", "step-100")
        names = ("sql", "sql@latest", "sql@best", "sql@prod", "sql@step-100")
        before = {name: r.meant(name) for name in names}
    shutil.rmtree(run)
    async with room(tmp_path, numbers) as r:
        await r.step()
        assert {name: r.meant(name) for name in names} == before
        assert len(r.engine.inside) == 2, "what aliases mean is in the engine again"
        assert r.reconciler.converged


async def test_what_was_written_while_no_server_ran_is_taken_in(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    put_checkpoint(run, 100)
    async with room(tmp_path, numbers) as r:
        await r.step()
    put_checkpoint(run, 200)
    async with room(tmp_path, numbers) as r:
        await r.step()
        assert r.meant("sql") == "step-200"


async def test_two_bases_share_a_store_and_see_nothing_of_one_another(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    other = tmp_path / "other"
    shutil.copytree(numbers, other)
    async with room(tmp_path, numbers) as r:
        await r.step()
    async with room(tmp_path, other, watch=()) as r:
        await r.step()
        assert r.meant("sql") is None
    async with room(tmp_path, numbers, watch=()) as r:
        assert r.meant("sql") == "step-100"


async def test_files_that_a_killed_server_could_not_delete_are_deleted_by_the_next(
    tmp_path: Path, numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.store.contents.YOUNG", 0.0)  # as if it had been killed long ago
    async with room(tmp_path, numbers) as r:
        gone = await r.reconciler.load("gone", put_adapter(tmp_path / "one", 1))
        kept = await r.reconciler.load("kept", put_adapter(tmp_path / "two", 2))
        r.reconciler.store.forget("gone")
    assert gone.folder.is_dir()
    async with room(tmp_path, numbers):
        assert kept.folder.is_dir()
        assert not gone.folder.exists()


# load and unload


async def test_loading_a_name_that_exists_moves_it_to_a_new_revision(tmp_path: Path, numbers: Path) -> None:
    async with room(tmp_path, numbers) as r:
        one = await r.reconciler.load("chat", put_adapter(tmp_path / "one", 1))
        two = await r.reconciler.load("chat", put_adapter(tmp_path / "two", 2))
        assert one.name != two.name
        assert r.reconciler.resolve("chat") == two
        assert r.reconciler.resolve(one.name) == one
        await r.reconciler.load("chat", tmp_path / "one")
        assert r.reconciler.resolve("chat") == one
        await r.step()
        assert r.reconciler.resolve("chat") == one
        assert r.text("chat") == fingerprint_of(tmp_path / "one")


async def test_what_was_loaded_by_hand_is_not_moved_away_by_the_next_look(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100, eval_loss=0.1)
    async with room(tmp_path, numbers, follow="best") as r:
        await r.step()
        loaded = await r.reconciler.load("sql", put_adapter(tmp_path / "mine", 5))
        await r.step()
        assert r.reconciler.resolve("sql") == loaded


async def test_unloaded_and_loaded_again_it_is_the_same_revision_and_answers(tmp_path: Path, numbers: Path) -> None:
    folder = put_adapter(tmp_path / "one", 1)
    async with room(tmp_path, numbers) as r:
        first = await r.reconciler.load("chat", folder)
        await r.reconciler.unload("chat")
        assert r.meant("chat") is None
        again = await r.reconciler.load("chat", folder)
        assert again.name == first.name
        await asyncio.sleep(0.05)  # what unloading leaves for later is done by now
        assert again.folder.is_dir()
        assert r.text("chat") == fingerprint_of(folder)


async def test_unloading_frees_the_engine_and_the_disk_after_the_last_request(tmp_path: Path, numbers: Path) -> None:
    async with room(tmp_path, numbers) as r:
        revision = await r.reconciler.load("chat", put_adapter(tmp_path / "one", 1))
        used = r.reconciler.residency.use(revision.name)
        assert used is not None
        await r.reconciler.unload("chat")
        await r.reconciler.load("other", put_adapter(tmp_path / "two", 2))  # not held up by it
        assert revision.name in r.engine.inside
        assert revision.folder.is_dir()
        r.reconciler.residency.done(used)
        for _ in range(200):
            await asyncio.sleep(0.005)
            if not revision.folder.exists():
                break
        assert not revision.folder.exists()
        assert revision.name not in r.engine.inside


async def test_a_watched_run_that_was_unloaded_comes_back_with_its_next_checkpoint_alone(
    tmp_path: Path, numbers: Path
) -> None:
    run = tmp_path / "runs" / "sql"
    put_checkpoint(run, 100)
    async with room(tmp_path, numbers) as r:
        await r.step()
        await r.reconciler.unload("sql")
        await r.step()
        assert r.meant("sql") is None
    async with room(tmp_path, numbers) as r:
        await r.step()
        assert r.meant("sql") is None
        put_checkpoint(run, 200)
        await r.step()
        assert (r.meant("sql"), r.meant("sql@step-100")) == ("step-200", None)


async def test_content_that_two_runs_share_stays_for_the_other(tmp_path: Path, numbers: Path) -> None:
    folder = put_adapter(tmp_path / "one", 1)
    async with room(tmp_path, numbers) as r:
        await r.reconciler.load("a", folder)
        kept = await r.reconciler.load("b", folder)
        await r.reconciler.unload("a")
        await asyncio.sleep(0.05)
        assert kept.folder.is_dir()
        assert r.text("b") == fingerprint_of(folder)


async def test_loading_says_what_is_wrong(tmp_path: Path, numbers: Path) -> None:
    async with room(tmp_path, numbers) as r:
        with pytest.raises(NotFound):
            await r.reconciler.load("chat", tmp_path / "nowhere")
        (tmp_path / "empty").mkdir()
        with pytest.raises(Incomplete):
            await r.reconciler.load("chat", tmp_path / "empty")
        with pytest.raises(Refused, match="reserved"):
            await r.reconciler.load("latest", put_adapter(tmp_path / "one"))
        with pytest.raises(Refused, match="reserved"):
            await r.reconciler.load("numbers", tmp_path / "one")
        with pytest.raises(NotFound):
            await r.reconciler.unload("chat")
        r.engine.refuses.add(fingerprint_of(tmp_path / "one"))
        with pytest.raises(LoadFailed):
            await r.reconciler.load("chat", tmp_path / "one")
        assert r.meant("chat") is None
        r.engine.refuses.clear()
        await r.reconciler.load("chat", tmp_path / "one")
        assert r.meant("chat") == "plain"


async def test_a_store_that_cant_be_written_breaks_nothing_that_is_served(
    tmp_path: Path, numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "sql"
    put_checkpoint(run, 100)
    async with room(tmp_path, numbers) as r:
        await r.step()

        def full(*_: Any, **__: Any) -> Any:
            raise LorakitError("no space left")

        monkeypatch.setattr(r.reconciler.store, "keep", full)
        put_checkpoint(run, 200)
        await r.step()
        assert r.meant("sql") == "step-100"
        assert "no space left" in r.why("sql")
        monkeypatch.undo()
        await r.step()
        assert r.meant("sql") == "step-200"


async def test_a_slot_that_stays_in_use_delays_a_new_checkpoint_but_breaks_nothing(
    tmp_path: Path, numbers: Path
) -> None:
    run = tmp_path / "runs" / "sql"
    async with room(tmp_path, numbers, slots=1, load_wait=0.05) as r:
        put_checkpoint(run, 100)
        await r.step()
        revision = r.reconciler.resolve("sql")
        assert revision is not None
        used = r.reconciler.residency.use(revision.name)
        assert used is not None
        put_checkpoint(run, 200)
        await r.step()
        assert r.meant("sql") == "step-100"
        r.reconciler.residency.done(used)
        await r.step()
        assert r.meant("sql") == "step-200"


# one step at a time, and no longer than it takes


async def test_the_same_content_as_final_and_as_a_step_takes_one_slot(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    folder = put_checkpoint(run, 1000)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(folder / name, run / name)
    async with room(tmp_path, numbers) as r:
        await r.settle()
        assert (r.meant("sql"), r.meant("sql@final"), r.meant("sql@step-1000")) == ("final", "final", "step-1000")
        assert len(r.engine.inside) == 1
        assert r.text("sql@final") == r.text("sql@step-1000") == fingerprint_of(folder)
        assert len(r.engine.loads) == 1


async def test_ten_checkpoints_in_a_moment_are_not_loaded_each(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    began = time.monotonic()
    async with room(tmp_path, numbers, debounce=0.5) as r:
        for step in range(1, 11):
            put_checkpoint(run, step)
            await r.reconciler._look()
            await asyncio.sleep(0)
        await r.step()
        assert r.meant("sql") == r.meant("sql@latest") == "step-10"
        assert [r.meant(f"sql@step-{step}") for step in range(1, 11)] == [f"step-{step}" for step in range(1, 11)]
        assert len(r.engine.loads) <= 2 + (time.monotonic() - began) / 0.5


async def test_what_waits_for_a_slot_holds_up_no_other_run_and_no_administration(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    async with room(tmp_path, numbers, slots=2) as r:
        for step in (100, 200):
            put_checkpoint(run, step)
            await r.step()
        revisions = [r.reconciler.resolve(f"sql@step-{step}") for step in (100, 200)]
        used = [r.reconciler.residency.use(one.name) for one in revisions if one is not None]
        put_checkpoint(run, 300)
        put_checkpoint(tmp_path / "runs" / "chat", 5)
        await r.reconciler._look()
        waiting = dict(r.reconciler._following)
        assert waiting.keys() == {"sql", "chat"}
        await asyncio.wait_for(r.reconciler.set_alias("sql", "prod", "step-100"), 5)
        await asyncio.wait_for(r.reconciler.rollback("sql"), 5)
        put_checkpoint(tmp_path / "runs" / "other", 7)
        await asyncio.wait_for(r.reconciler._look(), 5)
        assert {"sql", "chat", "other"} <= r.reconciler.runs.keys()
        assert (r.meant("sql"), r.meant("sql@prod")) == ("step-100", "step-100")
        await asyncio.wait_for(r.reconciler.unload("other"), 5)
        for resident in used:
            assert resident is not None
            r.reconciler.residency.done(resident)
        await r.step()
        assert (r.meant("sql"), r.meant("sql@latest"), r.meant("chat")) == ("step-100", "step-300", "step-5")


async def test_of_a_long_run_the_newest_is_served_before_the_others_are_there(
    tmp_path: Path, numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.server.following import arrivals

    monkeypatch.setattr(arrivals, "GLANCES", 3)
    for step in range(1, 9):
        put_checkpoint(tmp_path / "runs" / "sql", step)
    put_checkpoint(tmp_path / "runs" / "zz", 1)
    async with room(tmp_path, numbers) as r:
        await r.step()
        found = [event.data["revision"].partition("-")[2][0] for event in r.reconciler.events._kept
                 if event.kind == "found"]  # fmt: skip
        assert found == ["8", "1", "1", "2", "3", "4", "5", "6", "7"]
        assert (r.meant("sql"), r.meant("sql@latest")) == ("step-8", "step-8")
        overwrite(tmp_path / "runs" / "sql" / "checkpoint-4", 99)
        await r.step()
        assert r.meant("sql") == "step-4"


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_ten_thousand_folders_are_taken_in_and_the_newest_is_served_at_once(
    tmp_path: Path, numbers: Path
) -> None:
    from tests.server.fake_engine import trainer_state

    run, first = tmp_path / "runs" / "sql", put_checkpoint(tmp_path / "one", 1)
    for step in range(1, 10_001):
        folder = shutil.copytree(first, run / f"checkpoint-{step}")
        (folder / "trainer_state.json").write_text(trainer_state(step))
    async with room(tmp_path, numbers) as r:
        looking = asyncio.create_task(r.step())
        while r.meant("sql") is None:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
        assert r.meant("sql") == "step-10000"
        assert len(r.reconciler.runs["sql"].revisions) < 1000
        await looking
        assert len(r.reconciler.runs["sql"].revisions) == 10_000
        assert len(r.engine.loads) == 1, "all of them have the same content"
        assert r.reconciler.converged


async def test_a_clock_that_is_set_back_changes_nothing(
    tmp_path: Path, numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "sql"
    put_checkpoint(run, 100)
    async with room(tmp_path, numbers, keep_revisions=2) as r:
        await r.step()
        monkeypatch.setattr("time.time", lambda: 1e9)
        folder = put_checkpoint(run, 200)
        for file in folder.iterdir():
            os.utime(file, (1e9, 1e9))
        await r.step()
        assert r.meant("sql") == "step-200"
        put_adapter(tmp_path / "runs" / "chat")
        await r.settle()
        assert r.meant("chat") == "plain"
        await r.reconciler.rollback("sql")
        assert r.meant("sql") == "step-100"
        told = [event.data["seconds"] for event in r.reconciler.events._kept if event.kind == "loaded"]
        assert all(seconds >= 0 for one in told for seconds in one.values())
        assert told[1].keys() == {"detect", "copy", "check", "engine"}


async def test_an_engine_that_dies_while_it_loads_makes_no_adapter_refused(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    async with room(tmp_path, numbers) as r:
        put_checkpoint(run, 100)
        await r.step()
        put_checkpoint(run, 200)
        r.engine.dead = True
        await r.step()
        assert r.meant("sql") == "step-100"
        assert r.told("refused") == []
        r.engine.dead = False
        await r.step()
        assert r.meant("sql") == "step-200"


async def test_what_is_forgotten_while_it_waits_for_a_slot_is_refused_nowhere(tmp_path: Path, numbers: Path) -> None:
    async with room(tmp_path, numbers, slots=1) as r:
        first = await r.reconciler.load("a", put_adapter(tmp_path / "one", 1))
        used = r.reconciler.residency.use(first.name)
        assert used is not None
        loading = asyncio.create_task(r.reconciler.load("b", put_adapter(tmp_path / "two", 2)))
        await asyncio.sleep(0.1)
        await r.reconciler.unload("b")
        await asyncio.sleep(0.1)
        r.reconciler.residency.done(used)
        with pytest.raises((LoadFailed, NotFound)):
            await loading
        assert r.told("refused") == []
        assert r.reconciler.runs.keys() == {"a"}


# a store that does not grow for ever


async def test_of_each_run_so_many_revisions_stay_and_the_files_of_the_others_go(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    async with room(tmp_path, numbers, keep_revisions=2) as r:
        for step in range(100, 600, 100):
            put_checkpoint(run, step, eval_loss=1.0 if step == 200 else 2.0)
            await r.step()
        await asyncio.sleep(0.1)
        kept = {revision.facts.step for revision in r.reconciler.runs["sql"].revisions.values()}
        assert kept == {200, 400, 500}, "the last two, and what sql@best means"
        assert len(list((tmp_path / "home" / "revisions").iterdir())) == 3
        assert (r.meant("sql"), r.meant("sql@best"), r.meant("sql@step-100")) == ("step-500", "step-200", None)
        await r.reconciler.rollback("sql")
        assert r.meant("sql") == "step-400"
        assert len(r.engine.inside) <= 3
    async with room(tmp_path, numbers, keep_revisions=2) as r:
        await r.step()
        assert {revision.facts.step for revision in r.reconciler.runs["sql"].revisions.values()} == kept
        assert len(list((tmp_path / "home" / "revisions").iterdir())) == 3, (
            "what is still in the run is not taken again"
        )


async def test_what_is_aliased_or_in_flight_stays_however_many_follow(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    async with room(tmp_path, numbers, keep_revisions=1) as r:
        put_checkpoint(run, 100)
        await r.step()
        await r.reconciler.set_alias("sql", "prod", "step-100")
        put_checkpoint(run, 200)
        await r.step()
        busy = r.reconciler.resolve("sql")
        assert busy is not None
        used = r.reconciler.residency.use(busy.name)
        assert used is not None
        for step in (300, 400, 500):
            put_checkpoint(run, step)
            await r.step()
        assert {r.meant(f"sql@step-{step}") for step in (100, 200, 300, 400, 500)} == {
            "step-100", "step-200", None, "step-400", "step-500",
        }  # fmt: skip
        assert (r.meant("sql@prod"), busy.folder.is_dir()) == ("step-100", True)
        r.reconciler.residency.done(used)
        put_checkpoint(run, 600)
        await r.step()
        await asyncio.sleep(0.1)
        assert (r.meant("sql@step-200"), busy.folder.exists()) == (None, False)
        assert r.meant("sql@prod") == "step-100"


async def test_metrics_that_come_for_what_was_removed_bring_it_not_back(tmp_path: Path, numbers: Path) -> None:
    from tests.server.fake_engine import trainer_state

    run = tmp_path / "runs" / "sql"
    async with room(tmp_path, numbers, keep_revisions=1) as r:
        for step in (100, 200, 300):
            put_checkpoint(run, step)
            await r.step()
        (run / "checkpoint-100" / "trainer_state.json").write_text(trainer_state(100, 0.1))
        await r.step()
        assert (r.meant("sql"), r.meant("sql@step-100")) == ("step-300", None)


async def test_content_that_another_run_has_stays_on_the_disk(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "a", 100, seed=1)
    put_checkpoint(tmp_path / "runs" / "b", 100, seed=1)
    async with room(tmp_path, numbers, keep_revisions=1) as r:
        await r.step()
        for step in (200, 300):
            put_checkpoint(tmp_path / "runs" / "a", step)
            await r.step()
        await asyncio.sleep(0.1)
        assert (r.meant("a@step-100"), r.meant("b")) == (None, "step-100")
        assert r.text("b") == fingerprint_of(tmp_path / "runs" / "b" / "checkpoint-100")


async def test_a_store_that_cant_forget_keeps_serving_what_it_has(
    tmp_path: Path, numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "sql"
    async with room(tmp_path, numbers, keep_revisions=1) as r:
        for step in (100, 200):
            put_checkpoint(run, step)
            await r.step()

        def full(_: Any) -> Any:
            raise LorakitError("no space left")

        monkeypatch.setattr(r.reconciler.store, "remove", full)
        put_checkpoint(run, 300)
        await r.step()
        assert [r.meant(f"sql@step-{step}") for step in (100, 200, 300)] == ["step-100", "step-200", "step-300"]
        assert "no space left" in r.told("failed")[0]
        monkeypatch.undo()
        await r.step()
        assert r.meant("sql@step-100") is None
