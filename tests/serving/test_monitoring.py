"""Dashboard and alerts ask for what a server tells, by the names and labels that it has there."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.folders import write_base
from tests.readme import ROOT
from tests.server.fake_engine import put_checkpoint
from tests.server.real import free_port
from tests.server.running import Running, running
from tests.serving.programs import SERVING, run
from tests.world import World

Labels = dict[str, set[str]]  # of each series' name

DASHBOARD = json.loads((SERVING / "grafana" / "dashboards" / "lorakit.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = [
    rule
    for group in yaml.safe_load((SERVING / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
KEY = "secret"
HEADERS = {"authorization": f"Bearer {KEY}"}
OF_PROMETHEUS = {"instance", "job"}  # what it adds to every series that it reads


def filled(expression: str) -> str:
    """As Grafana asks it."""
    return expression.replace("$__rate_interval", "5m").replace('"$instance"', '".*"').replace('"$alias"', '".*"')


def variables() -> Iterator[tuple[str, str]]:
    """What is asked for the dashboard's variables, and of which label the values are."""
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert found is not None, variable["name"]
            yield filled(found[1]), found[2]


def asked() -> list[tuple[str, set[str]]]:
    """Every expression, and the labels that are shown of what it gives."""
    found = [(query, {label}) for query, label in variables()]
    for panel in PANELS:
        columns = [step["options"]["indexByName"] for step in panel.get("transformations", ())]
        for target in panel["targets"]:
            shown = re.findall(r"{{(\w+)}}", target.get("legendFormat", ""))
            found.append((filled(target["expr"]), {*shown, *(name for names in columns for name in names)}))
    for note in DASHBOARD["annotations"]["list"]:
        found.append((filled(note["expr"]), set(re.findall(r"{{(\w+)}}", note["titleFormat"] + note["textFormat"]))))
    for rule in RULES:
        found.append((rule["expr"], set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))))
    return found


def parts(expression: Any, kind: type) -> list[Any]:
    found: list[Any] = []
    promql_parser.walk(expression, lambda each: found.append(each) if isinstance(each, kind) else None)
    return found


def unknown(known: Labels, text: str, shown: Iterable[str]) -> Iterator[str]:
    """What an expression asks for and does not get."""
    expression = promql_parser.parse(text)
    selected = parts(expression, promql_parser.VectorSelector)
    kept = parts(expression, promql_parser.AggregateExpr)
    for each in selected:
        if each.name not in known:
            yield each.name
        for matcher in each.matchers.matchers:
            if matcher.name not in known.get(each.name, set()) | OF_PROMETHEUS:
                yield f"{each.name}: {matcher.name}"
    for each in kept:
        of_all = [known.get(one.name, set()) for one in parts(each.expr, promql_parser.VectorSelector)]
        labels = set(each.modifier.labels) if each.modifier else set()
        yield from (f"by {label} of {text}" for label in labels - OF_PROMETHEUS - set.intersection(*of_all))
    there = [set(each.modifier.labels) if each.modifier else set() for each in kept]
    there = there or [known.get(each.name, set()) | OF_PROMETHEUS for each in selected]
    yield from (f"shown {label} of {text}" for label in set(shown) - set.union(*there))


def labels_of(exposition: str) -> Labels:
    found: Labels = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One that everything has happened to that a server counts."""
    folder = tmp_path_factory.mktemp("monitored")
    for step in (100, 200):
        put_checkpoint(folder / "runs" / "sql", step)
    put_checkpoint(folder / "runs" / "sql", 300, rank=32)
    half = {"shares": [{"revision": "step-100", "share": 0.5}, {"revision": "step-200", "share": 0.5}]}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LORAKIT_API_KEY", KEY)
        with running(folder, write_base(folder / "numbers"), headers=HEADERS) as found:
            with httpx.Client(base_url=found.url, headers=HEADERS) as client:
                client.put("/v1/adapters/sql/aliases/sql", json={"revision": "step-100"}).raise_for_status()
                client.post("/v1/adapters/sql/rollback").raise_for_status()
                client.put("/v1/adapters/sql/aliases/half", json=half).raise_for_status()
                shadowed = {"revision": "step-100", "shadow": ["step-200"]}
                client.put("/v1/adapters/sql/aliases/sql", json=shadowed).raise_for_status()
                shadows: list[Any] = []
                found.served.reconciler.shadow_observers.append(shadows.append)
                found.do(found.served.ask("sql"))
                found.do(found.served.until(lambda: shadows))
            yield found


def told(server: Running) -> str:
    return httpx.get(f"{server.url}/metrics", headers=HEADERS).text


def test_what_is_asked_of_lorakit_is_there_by_name_and_label(gateway: Running) -> None:
    known = labels_of(told(gateway))
    of_lorakit = [(text, shown) for text, shown in asked() if "lorakit_" in text]
    assert len(of_lorakit) > 30
    assert not [what for text, shown in of_lorakit for what in unknown(known, text, shown)]


def test_what_is_asked_of_the_engine_is_there_by_name_and_label(world: World) -> None:
    with world.server.client() as client:
        known = labels_of(client.get("/metrics").text) | {"up": set()}
    of_engine = [(text, shown) for text, shown in asked() if "lorakit_" not in text]
    assert len(of_engine) > 10
    assert not [what for text, shown in of_engine for what in unknown(known, text, shown)]


def test_the_values_that_are_asked_for_are_told_by_the_documentation() -> None:
    page = (ROOT / "docs" / "observing.md").read_text(encoding="utf-8")
    for text, _ in asked():
        for selected in parts(promql_parser.parse(text), promql_parser.VectorSelector):
            for matcher in selected.matchers.matchers:
                if matcher.op == promql_parser.MatchOp.Equal and matcher.name not in OF_PROMETHEUS:
                    assert f"`{matcher.value}`" in page, text


def test_every_metric_of_lorakits_own_is_on_the_dashboard_or_has_a_reason_not_to_be(gateway: Running) -> None:
    shown = {
        selected.name
        for text, _ in asked()
        for selected in parts(promql_parser.parse(text), promql_parser.VectorSelector)
    }
    own = {name.removesuffix("_bucket") for name in labels_of(told(gateway)) if name.startswith("lorakit_")}
    own -= {name for name in own if name.endswith(("_sum", "_count"))}
    assert own == {name.removesuffix("_bucket") for name in shown if name.startswith("lorakit_")}


def test_a_name_that_is_gone_or_a_label_is_found() -> None:
    known = {"requests_total": {"alias"}, "load_bucket": {"le"}}
    assert not list(unknown(known, "sum by (alias) (rate(requests_total[5m]))", ["alias"]))
    assert list(unknown(known, "sum by (alias) (rate(requests[5m]))", []))
    assert list(unknown(known, 'requests_total{code="200"}', []))
    assert list(unknown(known, "sum by (code) (requests_total)", []))
    assert list(unknown(known, "sum(requests_total)", ["alias"]))
    assert list(unknown(known, "requests_total / on (alias) load_bucket", ["code"]))


def test_panels_do_not_overlap_and_each_says_what_it_shows() -> None:
    places = [
        (panel["gridPos"]["x"] + across, panel["gridPos"]["y"] + down)
        for panel in DASHBOARD["panels"]
        for across in range(panel["gridPos"]["w"])
        for down in range(panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places))
    assert all(0 <= x < 24 for x, _ in places)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert all(panel["title"] and panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS)
    assert len({rule["alert"] for rule in RULES}) == len(RULES)


# by Prometheus itself


def test_the_alerts_are_raised_when_they_should_and_not_otherwise() -> None:
    folder = SERVING / "prometheus"
    run("promtool", "check", "rules", folder / "alerts.yml")
    run("promtool", "test", "rules", folder / "alerts_test.yml")


@pytest.mark.slow
def test_a_real_prometheus_reads_a_server_with_its_key_and_answers_what_the_dashboard_asks(
    gateway: Running, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text(KEY)
    config = (SERVING / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
    for there, here in {
        "/run/secrets/lorakit-key": str(tmp_path / "key"),
        "/etc/prometheus/alerts.yml": str(SERVING / "prometheus" / "alerts.yml"),
        "lorakit:8000": gateway.url.removeprefix("http://"),
        "15s": "200ms",
    }.items():
        assert there in config
        config = config.replace(there, here)
    (tmp_path / "prometheus.yml").write_text(config)
    run("promtool", "check", "config", tmp_path / "prometheus.yml")
    address = f"127.0.0.1:{free_port()}"
    flags = {"config.file": "prometheus.yml", "storage.tsdb.path": "data", "web.listen-address": address}
    process = subprocess.Popen(
        ["prometheus", *(f"--{name}={value}" for name, value in flags.items())], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    try:
        with httpx.Client(base_url=f"http://{address}/api/v1") as prometheus:
            wait_until(lambda: answers(prometheus, "count_over_time(lorakit_info[1m]) > 2"))
            for text, _ in asked():
                answers(prometheus, text)  # or raises
            for text in ("lorakit_alias_info", "sum(lorakit_adapters)", 'up{job="lorakit"} == 1'):
                assert answers(prometheus, text), text
            rules = prometheus.get("/rules").json()["data"]["groups"]
            assert [rule["name"] for group in rules for rule in group["rules"]] == [rule["alert"] for rule in RULES]
            wait_until(lambda: answers(prometheus, 'ALERTS{alertname="LorakitRefused", reason="rank"}'))
    finally:
        process.terminate()
        process.wait(20)


def answers(prometheus: httpx.Client, expression: str) -> Any:
    answer = prometheus.get("/query", params={"query": expression})
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]["result"]


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        with contextlib.suppress(httpx.TransportError, AssertionError):
            if condition():
                return
        time.sleep(0.1)
    raise AssertionError("it did not come to that")
