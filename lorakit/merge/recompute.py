"""Every tensor of a plan computed again, by the executor itself, and compared with the one on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from lorakit.files.safetensors import StoredTensor
from lorakit.merge.base import BaseModel
from lorakit.merge.blocks import Adder, arithmetic, exact_arithmetic
from lorakit.merge.compare import Comparison, Difference, compare_copied
from lorakit.merge.execute import Meter, Progress, Sources, worker_count
from lorakit.merge.plan import ComputeTensor, MergePlan
from lorakit.merge.rounding import Rounding
from lorakit.merge.spot_check import is_simple, sampled_rows, wrong_rows

MOST_TIES = 1e-3  # of a tensor's elements, in 16 bit
CLOSE = {"F32": 1e-5, "F64": 1e-13}  # ‖difference‖ / ‖values‖ that another order of the same sums may give


@dataclass(frozen=True, slots=True)
class TensorResult:
    """A tensor that isn't on disk, bit for bit, as it was computed again.

    `state`: different, missing, extra, another kind (dtype or shape), or close: only last bits differ, of sums that
    another machine, or another order, rounds in another way.
    """

    tensor: str
    state: str
    elements: int = 0
    different: int = 0
    ulps: int = 0
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Recomputed:
    """How many tensors are equal, what of the others, and how many rows were looked at in float64."""

    equal: int
    results: tuple[TensorResult, ...]
    spot_checked: int


def recompute(
    plan: MergePlan,
    found: BaseModel,
    settings: Mapping[str, Any],
    *,
    device: str,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Recomputed:
    """Compare what a plan gives with what was found; holds blocks, never a model, and writes nothing."""
    comparing = _Comparing(plan, found)
    comparing.run(Rounding(settings.get("rounding", "nearest"), settings.get("seed", 0)), device, workers, progress)
    results = {result.tensor: result for result in (*comparing.other_names(), *_judged(comparing, settings, device))}
    rows = 0
    for tensor in (tensor for shard in plan.shards for tensor in shard.computed):  # not those that are quantised
        name = tensor.target.name
        if name not in comparing.comparisons or not is_simple(tensor):
            continue
        rows += len(sampled_rows(tensor.matrix[0]))
        off = wrong_rows(tensor, found.tensors[name], stochastic=settings.get("rounding") == "stochastic")
        if off and (name not in results or results[name].state == "close"):
            results[name] = TensorResult(name, "different", reason=f"rows {off} are not what float64 says")
    equal = sum(1 for name in comparing.comparisons if name not in results)
    return Recomputed(equal, tuple(results.values()), rows)


class _Comparing:
    """Pairs tensors by their names; an `Output` for the executor."""

    def __init__(self, plan: MergePlan, found: BaseModel) -> None:
        self.plan = plan
        self.found = found.tensors
        self.planned = {name: stored for shard in plan.shards for name, stored in shard.target.tensors.items()}
        self.copied = {copy.target.name for shard in plan.shards for copy in shard.copied}
        self.comparisons: dict[str, Comparison] = {}

    def run(self, rounding: Rounding, device: str, workers: int | None, progress: Progress | None) -> None:
        both = [name for name in self.planned if name in self.found]
        alike = [name for name in both if _kind(self.planned[name]) == _kind(self.found[name])]
        meter = Meter(sum(self.planned[name].nbytes for name in alike), progress)
        tasks: list[Future[Any]] = []
        with ExitStack() as stack:
            sources = Sources()
            stack.callback(sources.close)
            self.comparisons = {name: Comparison(self.found[name], sources.of(self.found[name])) for name in alike}
            threads = stack.enter_context(exact_arithmetic(device))
            adder = Adder(device, threads, meter.add, rounding=rounding)
            pool = stack.enter_context(ThreadPoolExecutor(workers or worker_count(), thread_name_prefix="verify"))
            stack.callback(_stop, meter, tasks)
            for shard in self.plan.shards:
                for copy in shard.copied:
                    if copy.target.name in self.comparisons:
                        tasks.append(pool.submit(self._copied, copy.source, copy.target.name, sources, meter))
                for tensor in shard.computed:
                    if tensor.target.name in self.comparisons:
                        tasks.append(pool.submit(adder.write, tensor, sources.of(tensor.source), self))
                for whole in shard.whole:
                    if all(target.name in self.comparisons for target in whole.targets):
                        tasks.append(pool.submit(adder.write_whole, whole, self))
            done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
            for task in done:
                task.result()

    def put(self, tensor: ComputeTensor, offset: int, view: memoryview) -> None:
        self.comparisons[tensor.target.name].put(tensor, offset, view)

    def _copied(self, source: StoredTensor, name: str, sources: Sources, meter: Meter) -> None:
        for count in compare_copied(source, sources.of(source), self.comparisons[name]):
            meter.add(count)

    def other_names(self) -> Iterator[TensorResult]:
        for name, stored in self.planned.items():
            if name not in self.found:
                yield TensorResult(name, "missing")
            elif name not in self.comparisons:
                reason = f"{_in_words(self.found[name])} on disk, {_in_words(stored)} when merged again"
                yield TensorResult(name, "another kind", reason=reason)
        for whole in (whole for shard in self.plan.shards for whole in shard.whole):
            for name in (target.name for target in whole.targets):
                if name in self.comparisons and not self.comparisons[name].difference.elements:
                    yield TensorResult(name, "different", reason="another part of the same weight is not there")
        for name in self.found.keys() - self.planned.keys():
            yield TensorResult(name, "extra")


def _stop(meter: Meter, tasks: list[Future[Any]]) -> None:
    meter.stopped = True
    for task in tasks:
        task.cancel()


def _kind(stored: StoredTensor) -> tuple[str, tuple[int, ...]]:
    return stored.dtype, stored.shape


def _in_words(stored: StoredTensor) -> str:
    return f"{stored.dtype} {list(stored.shape)}"


def _judged(comparing: _Comparing, settings: Mapping[str, Any], device: str) -> Iterator[TensorResult]:
    same_arithmetic = settings.get("arithmetic") in (None, arithmetic(device))
    same_draws = settings.get("rounding") != "stochastic" or str(settings.get("device", "cpu"))[:4] == device[:4]
    for name, comparison in comparing.comparisons.items():
        difference, dtype = comparison.difference, comparing.planned[name].dtype
        if difference.different:
            close = name not in comparing.copied and _is_close(difference, dtype, same_arithmetic, same_draws)
            state = "close" if close else "different"
            yield TensorResult(name, state, difference.elements, difference.different, difference.ulps)


def _is_close(difference: Difference, dtype: str, same_arithmetic: bool, same_draws: bool) -> bool:
    """Whether sums in another order explain it. The bits of float64 products depend on how they are cut."""
    if dtype == "F64" or (dtype == "F32" and not same_arithmetic):
        return difference.relative <= CLOSE[dtype]
    if dtype not in ("F16", "BF16") or difference.ulps > 1:
        return False
    if not same_draws:  # the other neighbour may have been drawn
        return True
    return not same_arithmetic and difference.different <= MOST_TIES * difference.elements
