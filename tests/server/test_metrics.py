"""What `/metrics` says, read as Prometheus reads it."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from lorakit.server.requests.answered import Answered
from lorakit.server.sight.events import Events
from lorakit.server.sight.metrics import MOST_ALIASES, Metrics, without_families
from lorakit.store.catalog import Facts, Revision
from tests.readme import ROOT
from tests.server.fake_engine import FakeEngine, Served, fingerprint_of, put_adapter, put_checkpoint, serving

VLLM = b"""# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="base"} 1.0
# HELP vllm:lora_requests_info Running stats on lora requests.
# TYPE vllm:lora_requests_info gauge
vllm:lora_requests_info{max_lora="3",running_lora_adapters="sql@step-100-x#2",waiting_lora_adapters=""} 1.0
vllm:lora_requests_info{max_lora="3",running_lora_adapters="",waiting_lora_adapters=""} 2.0
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="base"} 7.0
"""

Read = dict[str, Metric]


def read(text: str) -> Read:
    """The families by name, held to what `promtool check metrics` asks of names and of help."""
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names)), "a family stands twice"
    series = [(sample.name, *sorted(sample.labels.items())) for family in families for sample in family.samples]
    assert len(series) == len(set(series)), "a series stands twice"
    for family in families:
        if family.name.startswith("lorakit_"):
            assert family.documentation.endswith("."), family.name
            assert re.fullmatch(r"[a-z][a-z_]*[a-z]", family.name)
            assert not family.name.endswith(("_total", "_count", "_sum", "_bucket", "_milliseconds", "_ms"))
            assert family.type in ("counter", "gauge", "histogram")
            assert (family.type == "histogram") == family.name.endswith("_seconds")
            assert all(sample.name.endswith("_total") for sample in family.samples if family.type == "counter")
    return {family.name: family for family in families}


def value(found: Read, family: str, sample: str = "", **labels: str) -> float:
    """Of one series; 0 where there is none."""
    values = [
        one.value
        for one in found[family].samples
        if one.name == f"{family}{sample}" and all(one.labels[name] == of for name, of in labels.items())
    ]
    return sum(values)


async def scrape(served: Served) -> Read:
    answer = await served.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return read(answer.text)


async def raw_scrape(served: Served) -> str:
    return (await served.client.get("/metrics")).text


# through a gateway


@pytest.mark.anyio
async def test_answers_are_counted_by_the_alias_that_was_asked_for_and_errors_with_them(
    tmp_path: Path, numbers: Path
) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100, eval_loss=0.5)
    put_checkpoint(tmp_path / "runs" / "sql", 200)
    async with serving(tmp_path, numbers) as served:
        for model in ("sql", "sql", "sql@best", "sql@step-100", "sql@step-200", "numbers", "nobody", "sql@nothing"):
            await served.ask(model)
        await served.ask("sql", boom=True)
        found = await scrape(served)
        counted = {
            (one.labels["alias"], one.labels["code"]): one.value for one in found["lorakit_requests"].samples
        }  # fmt: skip
        assert counted == {
            ("sql", "200"): 2, ("sql", "400"): 1, ("sql@best", "200"): 1, ("sql@*", "200"): 2, ("numbers", "200"): 1,
            ("other", "404"): 2,
        }  # fmt: skip
        for family in ("lorakit_request_seconds", "lorakit_first_byte_seconds"):
            assert value(found, family, "_count", alias="sql") == 3
            assert value(found, family, "_sum", alias="sql") > 0
        assert value(found, "lorakit_load_wait_seconds", "_count") == 6


@pytest.mark.anyio
async def test_counters_only_grow_from_one_look_to_the_next(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    async with serving(tmp_path, numbers) as served:
        looks = []
        for step in range(3):
            await served.ask("sql")
            put_checkpoint(tmp_path / "runs" / "sql", 200 + step)
            looks.append(await scrape(served))
        for before, after in pairwise(looks):
            for family in before.values():
                if family.type in ("counter", "histogram"):
                    later = {(one.name, *sorted(one.labels.items())): one.value for one in after[family.name].samples}
                    for one in family.samples:
                        assert later[one.name, *sorted(one.labels.items())] >= one.value
        assert value(looks[2], "lorakit_requests", "_total", alias="sql") == 3


@pytest.mark.anyio
async def test_a_checkpoint_that_comes_in_is_seen_as_a_load_a_switch_and_the_alias_it_moves(
    tmp_path: Path, numbers: Path
) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    async with serving(tmp_path, numbers) as served:
        first = await served.revision_of("sql")
        put_checkpoint(tmp_path / "runs" / "sql", 200)
        await served.until(lambda: served.reconciler.resolve("sql").facts.step == 200)
        second = await served.revision_of("sql")
        found = await scrape(served)
        assert value(found, "lorakit_alias_switches", "_total", alias="sql", why="follow") == 2
        assert value(found, "lorakit_events", "_total", type="loaded") == 2
        assert value(found, "lorakit_alias_step", alias="sql") == 200
        assert value(found, "lorakit_alias_info", alias="sql", revision=second) == 1
        for phase in ("copy", "check", "engine"):
            assert value(found, "lorakit_load_seconds", "_count", phase=phase) == 2
        assert value(found, "lorakit_load_seconds", "_count", phase="detect") == 1, "the first was there before"
        await served.client.post("/v1/adapters/sql/rollback")
        found = await scrape(served)
        assert value(found, "lorakit_rollbacks", "_total", alias="sql") == 1
        assert value(found, "lorakit_alias_info", alias="sql", revision=second) == 0
        assert value(found, "lorakit_alias_info", alias="sql", revision=first) == 1


@pytest.mark.anyio
async def test_what_is_refused_is_counted_by_a_word_and_never_by_its_text(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100, rank=32)
    put_checkpoint(tmp_path / "runs" / "sql", 200, use_dora=True)
    bad = put_checkpoint(tmp_path / "runs" / "sql", 300)
    (tmp_path / "runs" / "regular" / "checkpoint-1").mkdir(parents=True)
    put_checkpoint(tmp_path / "runs" / "latest", 1)
    engine = FakeEngine(numbers)
    engine.refuses.add(fingerprint_of(bad))
    async with serving(tmp_path, numbers, engine=engine) as served:
        await served.until(
            lambda: len([one for one in served.reconciler.waiting.values() if one.state == "refused"]) == 3
        )
        found = await scrape(served)
        counted = {one.labels["reason"]: one.value for one in found["lorakit_refused_revisions"].samples}
        assert counted == {"rank": 1, "features": 1, "engine": 1, "name": 1}
        assert value(found, "lorakit_unserved", state="refused") == 3
        assert value(found, "lorakit_unserved", state="incomplete") == 1


@pytest.mark.anyio
async def test_the_key_guards_the_metrics(tmp_path: Path, numbers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_API_KEY", "secret")
    async with serving(tmp_path, numbers, headers={"authorization": "Bearer secret"}) as served:
        assert (await served.client.get("/metrics")).status_code == 200
        async with httpx.AsyncClient(transport=httpx.ASGITransport(served.gateway), base_url="http://x") as other:
            assert (await other.get("/metrics")).status_code == 401


@pytest.mark.anyio
async def test_a_name_that_is_gone_leaves_no_series(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    folder = put_adapter(tmp_path / "roots" / "chat", 2)
    async with serving(tmp_path, numbers, roots=(str(tmp_path / "roots"),)) as served:
        before = {line.partition(" ")[0] for line in (await raw_scrape(served)).splitlines()}
        for _ in range(2):
            await served.client.post("/v1/adapters", json={"name": "chat", "source": str(folder)})
            await served.ask("chat")
            await served.client.delete("/v1/adapters/chat")
            await served.until(lambda: len(served.engine.inside) == 1)
        text = await raw_scrape(served)
        assert "chat" not in text
        after = {line.partition(" ")[0] for line in text.splitlines() if not line.startswith("vllm:")}
        assert len(after) < len(before) + 40, "but for the first load wait, and one more type of event"


# by itself


class Nothing:
    """A server that only tells."""

    def __init__(self) -> None:
        self.events = Events()
        self.observers: list[Any] = []
        self.shadow_observers: list[Any] = []
        self.engine = type("Engine", (), {"limits": type("Limits", (), {"base": "llama"})})


def revision(run: str, step: int = 1) -> Revision:
    return Revision(1, run, "step", "3fa9c1d2", Path(), Facts(step=step), 8, 1, "", 0.0)


def test_labels_stay_few_whatever_is_asked_for() -> None:
    known: Any = Nothing()
    metrics = Metrics(known)
    for number in range(5 * MOST_ALIASES):
        metrics.answered(Answered(f"run{number}", "/v1/completions", 200, 0.1, revision(f"run{number}")))
        metrics.answered(Answered(f"nobody{number}", "/v1/completions", 404, 0.1))
        metrics.answered(Answered(f"run0@step-{number}", "/v1/completions", 200, 0.1, revision("run0", number)))
        known.events.tell("alias", "moved", alias=f"run{number}@prod", why="set")
    aliases = {alias for alias, _ in metrics.requests.values} | {alias for alias, _ in metrics.switches.values}
    assert len(aliases) == MOST_ALIASES + 1
    assert metrics.requests.values["other", "404"] == 5 * MOST_ALIASES
    assert sum(metrics.requests.values.values()) == 15 * MOST_ALIASES
    known.events.tell("gone", "gone", adapter="run0")
    metrics.answered(Answered("late", "/v1/completions", 200, 0.1, revision("late")))
    assert metrics.requests.values["late", "200"] == 1, "what is gone makes place"


def test_tokens_are_counted_as_an_answer_says_them_or_by_the_events_of_a_stream() -> None:
    known: Any = Nothing()
    metrics = Metrics(known)
    metrics.answered(
        Answered("sql", "/v1/completions", 200, 0.1, revision("sql"), prompt_tokens=3, completion_tokens=9)
    )
    metrics.answered(Answered("sql", "/v1/completions", 200, 0.1, revision("sql")))
    metrics.answered(Answered("llama", "/v1/completions", 200, 0.1, prompt_tokens=2))
    metrics.answered(Answered("sql@best", "/v1/completions", 200, 0.1, revision("sql"), pieces=5))
    metrics.answered(Answered("sql@best", "/v1/completions", 200, 0.1, revision("sql"), completion_tokens=4, pieces=5))
    assert metrics.prompt_tokens.values == {("sql",): 3, ("llama",): 2}
    assert metrics.generated.values == {("sql",): 9, ("sql@best",): 9}


def test_each_phase_of_a_load_is_timed_by_itself() -> None:
    known: Any = Nothing()
    metrics = Metrics(known)
    known.events.tell("loaded", "in", seconds={"detect": 0.5, "copy": 0.01, "check": 0.02, "engine": 0.005})
    known.events.tell("loaded", "in", seconds={"engine": 0.005})
    assert {phase: sum(spread.counts) for (phase,), spread in metrics.loading.values.items()} == {
        "detect": 1, "copy": 1, "check": 1, "engine": 2,
    }  # fmt: skip


def test_families_are_left_out_whole() -> None:
    kept = without_families(VLLM, ("vllm:lora_requests_info", "lorakit_"))
    assert b"lora_requests_info" not in kept
    assert kept.count(b"\n") == VLLM.count(b"\n") - 4
    assert without_families(b"", ("x",)) == b""


@pytest.mark.anyio
async def test_the_page_names_every_metric_and_its_labels(tmp_path: Path, numbers: Path) -> None:
    page = (ROOT / "docs" / "observing.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith(("| `lorakit_", "| `vllm:"))]
    named = {
        name: set(re.findall(r"`(\w+)`", labels)) for names, labels in rows for name in re.findall("`(.+?)`", names)
    }
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    put_checkpoint(tmp_path / "runs" / "sql", 200, rank=32)
    put_checkpoint(tmp_path / "runs" / "sql", 300)
    async with serving(tmp_path, numbers) as served:
        await served.ask("sql", usage=True)
        await served.client.put("/v1/adapters/sql/aliases/sql", json={"revision": "step-100"})
        await served.client.post("/v1/adapters/sql/rollback")
        found = await scrape(served)
    shown = {
        f"{name}_total" if family.type == "counter" else name: {
            label for one in family.samples for label in one.labels if label != "le"
        }
        for name, family in found.items()
    }
    assert shown.keys() == named.keys()
    for name, labels in named.items():
        assert shown[name] <= labels, name
        assert shown[name] == labels or not found[name.removesuffix("_total")].samples
