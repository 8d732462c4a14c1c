"""What `/metrics` says, read again: as much of Prometheus' text format as lorakit and vLLM write."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_SAMPLE = re.compile(r'([a-zA-Z_:][\w:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})? (\S+)')
_LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"')
_ESCAPED = {r"\\": "\\", r"\"": '"', r"\n": "\n"}

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Sample:
    labels: Labels
    value: float


@dataclass(frozen=True, slots=True)
class Exposition:
    """Samples by name; those of histograms by the names of their parts."""

    samples: Mapping[str, Sequence[Sample]] = field(default_factory=dict)

    def of(self, name: str) -> Sequence[Sample]:
        return self.samples.get(name, ())

    def value(self, name: str, **labels: str) -> float | None:
        """The sum of all that have these labels; None where there are none."""
        found = [one.value for one in self.of(name) if _has(one.labels, labels)]
        return sum(found) if found else None

    def by(self, name: str, label: str) -> dict[str, float]:
        """Sums by the values of a label."""
        sums: dict[str, float] = {}
        for one in self.of(name):
            key = one.labels.get(label, "")
            sums[key] = sums.get(key, 0.0) + one.value
        return sums

    def mean(self, name: str, **labels: str) -> float | None:
        """Of a histogram."""
        total, count = self.value(f"{name}_sum", **labels), self.value(f"{name}_count", **labels)
        return total / count if total is not None and count else None

    def quantile(self, name: str, share: float, **labels: str) -> float | None:
        """Of a histogram, linear within its buckets, as Prometheus' `histogram_quantile`."""
        ends: dict[float, float] = {}
        for one in self.of(f"{name}_bucket"):
            if _has(one.labels, labels):
                end = float(one.labels.get("le", "inf"))
                ends[end] = ends.get(end, 0.0) + one.value
        return _quantile(sorted(ends.items()), share)


def parse_exposition(text: str, prefixes: tuple[str, ...]) -> Exposition:
    """The samples whose names begin so; what can't be read is left out."""
    found: dict[str, list[Sample]] = {}
    for line in text.split("\n"):
        if not line.startswith(prefixes):
            continue
        match = _SAMPLE.match(line)
        if match is None:
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        labels = {name: _unescaped(said) for name, said in _LABEL.findall(match[2] or "")}
        found.setdefault(match[1], []).append(Sample(labels, value))
    return Exposition(found)


def _unescaped(text: str) -> str:
    return re.sub(r"\\[\\\"n]", lambda match: _ESCAPED[match[0]], text)


def _has(labels: Labels, wanted: Labels) -> bool:
    return all(labels.get(name) == value for name, value in wanted.items())


def _quantile(ends: Sequence[tuple[float, float]], share: float) -> float | None:
    if not ends or not ends[-1][1]:
        return None
    wanted = share * ends[-1][1]
    below, before = 0.0, 0.0
    for end, count in ends:
        if count >= wanted:
            if math.isinf(end):
                return below
            return below + (end - below) * (wanted - before) / (count - before) if count > before else end
        below, before = end, count
    return below
