"""Answers of /v1/responses that are asked for again, or made after their request has ended."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.server.fake_engine import put_checkpoint, serving

pytestmark = pytest.mark.anyio


async def test_an_answer_made_in_the_background_holds_its_revision_until_it_is_complete(
    tmp_path: Path, numbers: Path
) -> None:
    for run in ("a", "b"):
        put_checkpoint(tmp_path / "runs" / run, 500, seed=ord(run))
    async with serving(tmp_path, numbers, slots=1) as served:
        asked = {"model": "a", "background": True, "later": "x"}
        queued = await served.client.post("/v1/responses", json=asked)
        path, revision = f"/v1/responses/{queued.json()['id']}", queued.headers["x-lorakit-revision"]
        other = asyncio.create_task(served.ask("b"))
        await asyncio.sleep(0.05)
        assert not other.done()
        found = await served.client.get(path)
        assert (found.json()["status"], found.json()["model"]) == ("queued", revision)
        assert found.headers["x-lorakit-revision"] == revision
        served.engine.gate("x").set()
        assert (await other).json()["model"].startswith("b@")
        assert (await served.client.get(path)).json()["status"] == "completed"
        assert (await served.client.post(f"{path}x/cancel")).status_code == 404


async def test_the_earlier_answer_of_an_adapter_with_another_engine_name_says_its_own(
    tmp_path: Path, numbers: Path
) -> None:
    for run in ("a", "b"):
        put_checkpoint(tmp_path / "runs" / run, 500, seed=ord(run))
    async with serving(tmp_path, numbers, slots=1) as served:
        for run in ("a", "b", "a"):
            await served.ask(run)
        served.engine.gate("x").set()
        asked = {"model": "a", "background": True, "later": "x"}
        queued = await served.client.post("/v1/responses", json=asked)
        assert "#" not in queued.text
        found = await served.client.get(f"/v1/responses/{queued.json()['id']}")
        assert found.json()["model"] == queued.headers["x-lorakit-revision"]
