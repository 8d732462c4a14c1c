"""Pieces of one work as Ray tasks: so many threads each, done again where a worker dies, cancelled with the work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import Any

from lorakit.cluster.sight import Sight
from lorakit.errors import LorakitError, UsageError

RETRIES = 3  # of one task whose worker died
LOOKED = 120.0  # seconds for a node to begin a worker and look
CANCELLED = 10.0  # seconds to wait for cancelled tasks to be over


@dataclass(frozen=True, slots=True)
class Node:
    id: str
    name: str
    cpus: int
    gpus: int


class Tasks:
    """What is being done on a cluster for one work; leaving it cancels what is not done.

    `threads` is what each task may use: what was asked for, else what the smallest node has, at most `most`. `device`
    is where tasks compute: "auto" is a GPU where any node has one.

    Raises:
        UsageError: no node has so many cores, or none has a GPU.
    """

    def __init__(self, ray: Any, *, threads: int | None, most: int, device: str = "cpu") -> None:
        self._ray = ray
        nodes = _nodes(ray)
        self.device = _device(device, nodes)
        gpus = 0 if self.device == "cpu" else 1
        nodes = [node for node in nodes if node.gpus >= gpus and node.cpus]
        self.threads = threads or (min(most, *(node.cpus for node in nodes)) if nodes else 1)
        self.nodes = [node for node in nodes if node.cpus >= self.threads]
        if nodes and not self.nodes:
            largest = max(nodes, key=lambda node: node.cpus)
            raise UsageError(
                f"no node of the Ray cluster has {self.threads} CPUs: the largest, '{largest.name}', has "
                f"{largest.cpus}; ask for fewer with --workers"
            )
        self._options = {
            "num_cpus": self.threads, "num_gpus": gpus, "max_retries": RETRIES, "scheduling_strategy": "SPREAD",
        }  # fmt: skip
        self._waiting: dict[Any, Any] = {}

    @property
    def slots(self) -> int:
        """How many tasks there is room for at once."""
        return max(1, sum(node.cpus // self.threads for node in self.nodes))

    def __enter__(self) -> Tasks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        waiting = list(self._waiting)
        self._waiting.clear()
        with contextlib.suppress(self._ray.exceptions.RayError):
            for one in waiting:
                self._ray.cancel(one, force=True)
            if waiting:  # so that none still writes where its files are being removed
                self._ray.wait(waiting, num_returns=len(waiting), timeout=CANCELLED)

    def ensure_seeing(self, sight: Sight) -> None:
        """Ask every node that may get a task whether it sees the files.

        Raises:
            NotFound, UsageError: see `Sight.ensure_here`.
            LorakitError: a node has no lorakit, or does not answer.
        """
        on_node = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
        look = self._ray.remote(_look)
        asked = {}
        for node in self.nodes:
            there = {"num_cpus": 0, "scheduling_strategy": on_node(node.id, soft=False)}
            asked[look.options(**there).remote(sight)] = node
        done, late = self._ray.wait(list(asked), num_returns=len(asked), timeout=LOOKED) if asked else ([], [])
        for one in done:
            self._result(one, f"the look of node '{asked[one].name}' at the files")
        if late:
            raise LorakitError(
                f"node '{asked[late[0]].name}' of the Ray cluster has not answered for {LOOKED:.0f} s: `ray status` "
                f"says whether it is well"
            )

    def put(self, value: Any) -> Any:
        """What many tasks get as an argument, sent to each node once."""
        return self._ray.put(value)

    def begin(self, name: Any, task: Callable[..., Any], *arguments: Any) -> None:
        """Have a function of a module of lorakit called somewhere; `finished` gives the name with the result."""
        self._waiting[self._ray.remote(task).options(**self._options).remote(*arguments)] = name

    def finished(self, timeout: float | None = None) -> Iterator[tuple[Any, Any]]:
        """Names and results of what is done: of all there is, or of what is in so many seconds.

        Raises:
            LorakitError: what the function raised; or a worker died again and again.
        """
        while self._waiting:
            done, _ = self._ray.wait(list(self._waiting), timeout=timeout)
            for one in done:
                name = self._waiting.pop(one)
                yield name, self._result(one, f"the task of '{name}'")
            if timeout is not None:
                return

    def _result(self, one: Any, who: str) -> Any:
        known = self._ray.exceptions
        try:
            return self._ray.get(one)
        except known.RayTaskError as error:
            if isinstance(error.cause, LorakitError | OSError | MemoryError):
                raise error.cause from None
            raise LorakitError(f"{who} failed on the Ray cluster: {_last_line(error)}") from error
        except known.OutOfMemoryError as error:
            raise LorakitError(f"{who} was ended for want of memory on its node: ask for fewer --workers") from error
        except known.RayError as error:
            raise LorakitError(
                f"{who} died on the Ray cluster, and {RETRIES} times more when it was begun again: {_last_line(error)}"
            ) from error


def _look(sight: Sight) -> None:
    sight.ensure_here()


def _nodes(ray: Any) -> list[Node]:
    return [
        Node(
            node["NodeID"], node.get("NodeManagerHostname") or node["NodeManagerAddress"],
            int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]  # fmt: skip


def _device(device: str, nodes: list[Node]) -> str:
    if device.startswith("cuda:"):
        raise UsageError(f"with --ray each task gets a GPU of its own, and '{device}' names one: say --device cuda")
    has_gpu = any(node.gpus for node in nodes)
    if device == "cuda" and not has_gpu:
        raise UsageError("no node of the Ray cluster has a GPU: say --device cpu")
    return "cuda" if has_gpu and device != "cpu" else "cpu"


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
