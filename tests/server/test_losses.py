"""A run's losses over HTTP: as its trainer logged them, few enough to draw, with all that stands out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.checkpoints.curves import Curve
from lorakit.server.losses import thinned
from tests.server.fake_engine import put_adapter, put_checkpoint, serving

VALUES = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=300)


@given(VALUES, st.integers(10, 60))
def test_a_curve_is_thinned_to_what_can_be_drawn_with_its_ends_and_its_extremes(
    values: list[float], points: int
) -> None:
    curve = Curve(tuple(float(step) for step in range(len(values))), tuple(values))
    found = thinned(curve, points)
    assert len(found.steps) <= 1.5 * points + 2
    assert list(found.steps) == sorted(set(found.steps))
    for step, value in zip(found.steps, found.values, strict=True):
        assert value == values[int(step)] or math.isnan(values[int(step)])
    finite = [value for value in values if not math.isnan(value)]
    if finite:
        kept = [value for value in found.values if not math.isnan(value)]
        assert (min(kept), max(kept)) == (min(finite), max(finite))
        assert (found.steps[0], found.steps[-1]) == (0, len(values) - 1)
    if len(values) > len(finite):
        assert any(math.isnan(value) for value in found.values), "a gap stays one"


pytestmark = pytest.mark.anyio


def put_logged(run: Path, step: int, seed: int = 0) -> Path:
    folder = put_adapter(run / f"checkpoint-{step}", seed or step)
    log = [{"step": at, "loss": 3 - at / 100} for at in range(10, step + 1, 10)]
    log += [{"step": at, "eval_loss": 4 - at / 100} for at in range(100, step + 1, 100)]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
    return folder


async def test_a_runs_whole_log_is_told_and_its_checkpoints(tmp_path: Path, numbers: Path) -> None:
    for step in (100, 200):
        put_logged(tmp_path / "runs" / "sql", step)
    async with serving(tmp_path, numbers) as served:
        told = (await served.client.get("/v1/adapters/sql/losses")).json()
        assert told["train"] == [[at, pytest.approx(3 - at / 100)] for at in range(10, 201, 10)]
        assert told["eval"] == [[100, 3.0], [200, 2.0]]
        assert [(one["step"], one["eval_loss"]) for one in told["checkpoints"]] == [(100, 3.0), (200, 2.0)]
        assert all(one["revision"].startswith(f"sql@step-{one['step']}-") for one in told["checkpoints"])
        put_logged(tmp_path / "runs" / "sql", 300)

        async def grown() -> bool:
            return len((await served.client.get("/v1/adapters/sql/losses")).json()["train"]) == 30

        await served.until(grown)


async def test_where_the_folders_are_gone_the_checkpoints_say_what_they_know(tmp_path: Path, numbers: Path) -> None:
    folders = [put_logged(tmp_path / "runs" / "sql", step) for step in (100, 200)]
    async with serving(tmp_path, numbers) as served:
        for folder in folders:
            (folder / "trainer_state.json").unlink()
        told = (await served.client.get("/v1/adapters/sql/losses")).json()
        assert told["train"] == [[100, 2.0], [200, 1.0]]
        assert told["eval"] == [[100, 3.0], [200, 2.0]]


async def test_what_is_no_log_is_no_error(tmp_path: Path, numbers: Path) -> None:
    folder = put_checkpoint(tmp_path / "runs" / "sql", 100)
    async with serving(tmp_path, numbers) as served:
        for text in ("[", "[]", '{"log_history": 3}', '{"log_history": [1, {"step": "x", "loss": 1}]}'):
            (folder / "trainer_state.json").write_text(text)
            assert (await served.client.get("/v1/adapters/sql/losses")).status_code == 200
        assert (await served.client.get("/v1/adapters/nobody/losses")).status_code == 404
        assert (await served.client.get("/v1/adapters/sql/losses?points=1")).status_code == 400


async def test_of_many_revisions_the_newest_are_told_a_page_at_a_time(tmp_path: Path, numbers: Path) -> None:
    for step in range(100, 600, 100):
        put_checkpoint(tmp_path / "runs" / "sql", step)
    async with serving(tmp_path, numbers) as served:

        async def steps(query: str) -> list[int]:
            view = (await served.client.get(f"/v1/adapters/sql{query}")).json()
            assert view["count"] == 5
            return [one["step"] for one in view["revisions"]]

        assert await steps("") == [100, 200, 300, 400, 500]
        assert await steps("?revisions=2") == [400, 500]
        assert await steps("?revisions=2&skip=2") == [200, 300]
        assert await steps("?revisions=2&skip=4") == [100]
        assert await steps("?revisions=2&skip=9") == []
        (listed,) = (await served.client.get("/v1/adapters?revisions=1")).json()["data"]
        assert [one["step"] for one in listed["revisions"]] == [500]
        assert (await served.client.get("/v1/adapters?revisions=-1")).status_code == 400
