"""Where everything is, as `/metrics` says it at one moment."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from tests.server.fake_engine import FakeEngine, put_checkpoint, serving
from tests.server.test_metrics import VLLM, raw_scrape, read, scrape, value


@pytest.mark.anyio
async def test_each_revision_is_in_the_nearest_tier_that_holds_it(tmp_path: Path, numbers: Path) -> None:
    for run in ("a", "b", "c"):
        put_checkpoint(tmp_path / "runs" / run, 100, seed=ord(run))
    async with serving(tmp_path, numbers, slots=2) as served:
        for run in ("a", "b"):
            await served.ask(run)
        asked = asyncio.create_task(served.ask("a", hold="open"))
        await served.until(lambda: any(one.get("hold") for one in served.engine.asked))
        found = await scrape(served)
        tiers = {one.labels["tier"]: one.value for one in found["lorakit_resident_revisions"].samples}
        assert tiers["slot"] == 1
        assert sum(tiers.values()) == 3
        assert tiers["slot"] + tiers["memory"] == len(served.engine.inside)
        loaded = {one.labels["revision"]: one.labels["tier"] for one in found["lorakit_adapter_loaded"].samples}
        assert {name.partition("#")[0] for name in served.engine.inside} == loaded.keys()
        revision = served.reconciler.resolve("a").name
        assert loaded[revision] == "slot"
        assert value(found, "lorakit_requests_in_flight", revision=revision) == 1
        assert value(found, "lorakit_engine_slots") == 2
        served.engine.gate("open").set()
        assert (await asked).status_code == 200
        assert value(await scrape(served), "lorakit_requests_in_flight", revision=revision) == 0


@pytest.mark.anyio
async def test_vllms_own_metrics_pass_through_with_the_names_that_clients_know(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    engine = FakeEngine(numbers, slots=3)
    engine.told_metrics = VLLM
    async with serving(tmp_path, numbers, engine=engine) as served:
        await served.client.put("/v1/adapters/sql/aliases/prod", json={"revision": "step-100"})
        revision = await served.revision_of("sql")
        began = time.time()
        text = await raw_scrape(served)
        found = read(text)
        assert value(found, "vllm:num_requests_running") == 1
        assert value(found, "vllm:prompt_tokens", "_total") == 7
        (info,) = found["vllm:lora_requests_info"].samples
        assert info.labels["max_lora"] == "3"
        assert set(info.labels["running_lora_adapters"].split(",")) == {revision, "sql", "sql@latest", "sql@prod"}
        assert info.labels["waiting_lora_adapters"] == ""
        assert began <= info.value <= time.time()
        assert "#2" not in text


@pytest.mark.anyio
async def test_a_mix_is_one_name_among_those_in_the_engine_whatever_it_was_written_as(
    tmp_path: Path, numbers: Path
) -> None:
    for run in ("a", "b"):
        put_checkpoint(tmp_path / "runs" / run, 100, seed=ord(run))
    async with serving(tmp_path, numbers) as served:
        asked = "mix(a=0.5,b=0.5)"
        revision = (await served.ask(asked)).headers["x-lorakit-revision"]
        named = await served.client.post("/v1/mixes", json={"name": "assistant", "mix": asked})
        assert named.status_code == 201, named.text
        await served.ask("assistant")
        found = await scrape(served)
        assert value(found, "lorakit_requests", "_total", alias="mix") == 1
        assert value(found, "lorakit_requests", "_total", alias="assistant") == 1
        (info,) = found["vllm:lora_requests_info"].samples
        assert {"assistant", revision, "a", "b"} <= set(info.labels["running_lora_adapters"].split(","))
        tiers = {one.labels["tier"]: one.value for one in found["lorakit_resident_revisions"].samples}
        assert tiers == {"slot": 0, "memory": 3, "store": 0}
