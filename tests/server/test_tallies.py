"""What is counted here reads as what prometheus_client would have counted."""

from __future__ import annotations

from collections.abc import Iterable

import prometheus_client
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from lorakit.server.sight.tallies import Count, Level, Times, exposition

ENDS = (0.1, 0.5, 2)
seconds = st.floats(0, 5) | st.sampled_from(ENDS)


def samples(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families: Iterable[prometheus_client.Metric] = text_string_to_metric_families(text.decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


@given(st.lists(st.tuples(st.sampled_from(["sql", "chat", 'q"\\\n']), seconds)))
def test_counts_and_times_are_those_of_prometheus_own_client(seen: list[tuple[str, float]]) -> None:
    registry = prometheus_client.CollectorRegistry()
    counter = prometheus_client.Counter("asked", "how often", ["alias"], registry=registry)
    histogram = prometheus_client.Histogram("took", "how long", ["alias"], buckets=ENDS, registry=registry)
    count, times = Count("asked", "how often", ("alias",)), Times("took", "how long", ENDS, ("alias",))
    for alias, took in seen:
        counter.labels(alias).inc()
        histogram.labels(alias).observe(took)
        count.add(alias)
        times.add(alias, seconds=took)
    ours, theirs = samples(exposition([count, times])), samples(prometheus_client.generate_latest(registry))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert abs(ours[key] - value) < 1e-9


def test_what_is_so_now_may_have_labels_or_none() -> None:
    told = samples(exposition([Level("slots", "how many", (), {(): 3}), Level("step", "which", ("of",), {("a",): 7})]))
    assert told == {("slots", frozenset()): 3, ("step", frozenset({("of", "a")})): 7}


def test_a_copy_does_not_change_while_it_is_read_elsewhere() -> None:
    count, times = Count("asked", "how often"), Times("took", "how long", ENDS)
    count.add()
    times.add(seconds=1)
    copies = count.copied(), times.copied()
    before = exposition(copies)
    count.add()
    times.add(seconds=1)
    assert exposition(copies) == before


def test_what_has_a_label_is_forgotten_and_the_rest_stays() -> None:
    count, times = Count("asked", "how often", ("alias", "code")), Times("took", "how long", ENDS, ("alias",))
    for alias in ("sql", "chat"):
        count.add(alias, "200")
        count.add(alias, "404")
        times.add(alias, seconds=1)
    for tally in (count, times):
        tally.forget("sql")
    assert set(count.values) == {("chat", "200"), ("chat", "404")}
    assert set(times.values) == {("chat",)}
