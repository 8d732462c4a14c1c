"""Counts and times by label, kept as plain numbers on the event loop; Prometheus' own types only when one asks.

prometheus_client's counters take a lock for each request, and mix with vLLM's where that shares its numbers between
processes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Metric

Labels = tuple[str, ...]


@dataclass(slots=True)
class Count:
    """A number that only grows, for each set of labels; its name ends in `_total` when it is told."""

    name: str
    about: str
    labels: Labels = ()
    values: dict[Labels, float] = field(default_factory=dict)

    def add(self, *labels: str, amount: float = 1) -> None:
        self.values[labels] = self.values.get(labels, 0) + amount

    def forget(self, label: str) -> None:
        """Drop what has it as its first label."""
        for labels in [labels for labels in self.values if labels[0] == label]:
            del self.values[labels]

    def copied(self) -> Count:
        return Count(self.name, self.about, self.labels, self.values.copy())

    def told(self) -> Metric:
        from prometheus_client.core import CounterMetricFamily

        family = CounterMetricFamily(self.name, self.about, labels=self.labels)
        for labels, value in self.values.items():
            family.add_metric(labels, value)
        return family


@dataclass(slots=True)
class Spread:
    """How many of some times were at most so long (a histogram), for each set of labels; the last is without end."""

    counts: list[int]
    total: float = 0.0


@dataclass(slots=True)
class Times:
    """Seconds, in buckets with these upper ends, for each set of labels."""

    name: str
    about: str
    ends: Sequence[float]
    labels: Labels = ()
    values: dict[Labels, Spread] = field(default_factory=dict)

    def add(self, *labels: str, seconds: float) -> None:
        spread = self.values.get(labels)
        if spread is None:
            spread = self.values[labels] = Spread([0] * (len(self.ends) + 1))
        spread.counts[bisect_left(self.ends, seconds)] += 1
        spread.total += seconds

    def forget(self, label: str) -> None:
        """Drop what has it as its first label."""
        for labels in [labels for labels in self.values if labels[0] == label]:
            del self.values[labels]

    def copied(self) -> Times:
        return Times(self.name, self.about, self.ends, self.labels, deepcopy(self.values))

    def told(self) -> Metric:
        from prometheus_client.core import HistogramMetricFamily

        family = HistogramMetricFamily(self.name, self.about, labels=self.labels)
        ends = [*(str(float(end)) for end in self.ends), "+Inf"]
        for labels, spread in self.values.items():
            family.add_metric(labels, list(zip(ends, accumulate(spread.counts), strict=True)), spread.total)
        return family


@dataclass(slots=True)
class Level:
    """What is so at this moment."""

    name: str
    about: str
    labels: Labels = ()
    values: dict[Labels, float] = field(default_factory=dict)

    def told(self) -> Metric:
        from prometheus_client.core import GaugeMetricFamily

        family = GaugeMetricFamily(self.name, self.about, labels=self.labels)
        for labels, value in self.values.items():
            family.add_metric(labels, value)
        return family


def exposition(tallies: Sequence[Count | Times | Level]) -> bytes:
    """In Prometheus' text format; a thread may do it, on copies."""
    from prometheus_client import CollectorRegistry, generate_latest

    class Told:
        def collect(self) -> list[Metric]:
            return [tally.told() for tally in tallies]

    registry = CollectorRegistry()
    registry.register(Told())
    return generate_latest(registry)
