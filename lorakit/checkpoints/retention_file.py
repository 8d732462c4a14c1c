"""What a run's checkpoints stay for, as a YAML file says it; the names are those of `lorakit prune`.

keep_last: 3
keep_best: {count: 2, metric: eval_loss, mode: min}
keep_every: 500
keep_for: 7d
max_bytes: 20GB
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lorakit.checkpoints.amounts import bytes_of, seconds
from lorakit.checkpoints.retention import KeepBest, KeepEvery, KeepFor, KeepLast, Mode, Policy, Retention
from lorakit.errors import UsageError
from lorakit.files.plain_yaml import read_strictly

KEYS = ("keep_last", "keep_best", "keep_every", "keep_for", "max_bytes")
OF_BEST = ("count", "metric", "mode")


def read_retention(file: Path) -> Retention:
    """The policies that a file says.

    Raises:
        NotFound: there is no such file.
        UsageError: it can't be parsed, a key is unknown or stands twice, or a value makes no sense.
    """
    said = read_strictly(file)
    try:
        return retention_of(said)
    except UsageError as error:
        raise UsageError(f"'{file}': {error}") from None


def retention_of(said: Any) -> Retention:
    """The policies that plain data says, such as `{"keep_last": 3}`.

    Raises:
        UsageError: as `read_retention`.
    """
    if not isinstance(said, Mapping):
        raise UsageError(f"it says nothing to keep: write, for instance, {KEYS[0]}: 3")
    _refuse_unknown(said, KEYS)
    policies: list[Policy] = []
    if (last := _whole(said, "keep_last", least=0)) is not None and last > 0:
        policies.append(KeepLast(last))
    if said.get("keep_best") is not None:
        policies.append(_best(said["keep_best"]))
    if (every := _whole(said, "keep_every")) is not None:
        policies.append(KeepEvery(every))
    if (age := said.get("keep_for")) is not None:
        policies.append(KeepFor(seconds(str(age))))
    size = said.get("max_bytes")
    return Retention(tuple(policies), max_bytes=None if size is None else bytes_of(str(size)), spare_newest=last != 0)


def mode_of(metric: str) -> Mode:
    """Raises UsageError when the name does not say whether less is better: the wrong guess would remove the best."""
    if metric.endswith(("loss", "perplexity")):
        return "min"
    raise UsageError(f"is more of '{metric}' better, or less? say mode max or mode min")


def _best(said: Any) -> KeepBest:
    """A number alone is by eval_loss."""
    if not isinstance(said, Mapping):
        said = {"count": said}
    _refuse_unknown(said, OF_BEST)
    count = _whole(said, "count")
    if count is None:
        raise UsageError("keep_best says no count: write, for instance, keep_best: {count: 2}")
    metric, mode = said.get("metric", "eval_loss"), said.get("mode")
    if not isinstance(metric, str):
        raise UsageError(f"the metric of keep_best is {metric!r}, and has to be a name")
    if mode not in (None, "min", "max"):
        raise UsageError(f"the mode of keep_best is {mode!r}, and has to be min or max")
    return KeepBest(count, metric, mode or mode_of(metric))


def _whole(said: Mapping[str, Any], key: str, *, least: int = 1) -> int | None:
    value = said.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{key} is {value!r}, and has to be a whole number, {least} at least")
    return value


def _refuse_unknown(said: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    for key in said:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
            raise UsageError(f"unknown key '{key}'; {hint}")
