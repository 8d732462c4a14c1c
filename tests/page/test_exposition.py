"""What `/metrics` says is read as Prometheus' own parser reads it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from lorakit.server.page.exposition import parse_exposition
from lorakit.server.sight.tallies import Count, Times, exposition

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)


@settings(max_examples=40)
@given(st.dictionaries(st.tuples(NAMES, NAMES), st.floats(0, 1e12), max_size=5))
def test_counts_with_any_labels_are_read_as_prometheus_reads_them(values: dict[tuple[str, str], float]) -> None:
    text = exposition([Count("lorakit_tried", "Tried.", ("alias", "code"), dict(values))]).decode()
    theirs = {
        (sample.labels["alias"], sample.labels["code"]): sample.value
        for family in text_string_to_metric_families(text) for sample in family.samples
    }  # fmt: skip
    ours = parse_exposition(text, ("lorakit_",)).of("lorakit_tried_total")
    assert {(one.labels["alias"], one.labels["code"]): one.value for one in ours} == theirs


def test_times_have_their_mean_and_quantiles() -> None:
    times = Times("lorakit_took_seconds", "Took.", (0.1, 1.0, 10.0), ("alias",))
    for seconds in (0.05, 0.05, 0.5, 5.0):
        times.add("sql", seconds=seconds)
    times.add("chat", seconds=100.0)
    told = parse_exposition(exposition([times]).decode(), ("lorakit_",))
    assert told.mean("lorakit_took_seconds", alias="sql") == pytest.approx(1.4)
    assert told.quantile("lorakit_took_seconds", 0.5, alias="sql") == pytest.approx(0.1)
    assert told.quantile("lorakit_took_seconds", 0.75, alias="sql") == pytest.approx(1.0)
    assert told.quantile("lorakit_took_seconds", 0.5, alias="chat") == 10.0, "all that is known: it took longer"
    assert told.quantile("lorakit_took_seconds", 0.5, alias="nobody") is None
    assert told.mean("lorakit_took_seconds", alias="nobody") is None


def test_what_is_no_sample_is_left_out() -> None:
    told = parse_exposition('lorakit_a{b="c" 1\nlorakit_b x\nlorakit_c 1\nother 2\n# lorakit_d 3\n', ("lorakit_",))
    assert set(told.samples) == {"lorakit_c"}
