"""Texts of several servers as one, read again by Prometheus' own parser."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from lorakit.server.spread.expositions import joined

FIRST = b"""# HELP vllm:running Requests.
# TYPE vllm:running gauge
vllm:running{engine="0",model_name="a\\"b}"} 2.0
# TYPE plain_total counter
plain_total 3
"""
SECOND = b"""# HELP vllm:running Requests.
# TYPE vllm:running gauge
vllm:running{engine="0",model_name="m"} 5.0
# HELP lag Seconds.
# TYPE lag histogram
lag_bucket{le="1.0"} 1
lag_bucket{le="+Inf"} 2
lag_sum 3.5
lag_count 2
empty{} 1
"""


def test_each_sample_says_whose_it_is_and_families_stand_together() -> None:
    text = joined({"0": FIRST, "host:8001": SECOND}, "replica").decode()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    running = next(family for family in families if family.name == "vllm:running")
    assert running.documentation == "Requests."
    assert [(sample.labels["replica"], sample.labels["model_name"], sample.value) for sample in running.samples] == [
        ("0", 'a"b}', 2.0), ("host:8001", "m", 5.0)
    ]  # fmt: skip
    lag = next(family for family in families if family.name == "lag")
    assert {sample.name for sample in lag.samples} == {"lag_bucket", "lag_sum", "lag_count"}
    assert text.count("# TYPE vllm:running") == 1


def test_of_nobody_it_is_empty() -> None:
    assert joined({}, "replica") == b""
    assert joined({"0": b""}, "replica") == b""
