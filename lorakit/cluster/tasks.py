"""Pieces of one work as Ray tasks: so many threads each, done again where a worker dies, ended with the work.

They end by themselves when a file goes that all see: `ray.cancel` of a task that is done at that moment may end the
process that asks for it (Ray 2.55: "Check failed ... Tried to complete task that was not pending").
"""

from __future__ import annotations

import _thread
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from lorakit.cluster.sight import Sight
from lorakit.errors import LorakitError, UsageError

RETRIES = 3  # of one task whose worker died
LOOKED = 120.0  # seconds for a node to begin a worker and look
LOOKS = 0.25  # seconds between two looks of a task whether the work goes on
ENDED = 15.0  # seconds to wait for tasks to end with it


@dataclass(frozen=True, slots=True)
class Node:
    id: str
    name: str
    cpus: int
    gpus: int


class Tasks:
    """What is being done on a cluster for one work; leaving it ends what is not done.

    `threads` is what each task may use: what was asked for, else what the smallest node has, at most `most`. `device`
    is where tasks compute: "auto" is a GPU where any node has one. `mark` is a file that all nodes see, and that is
    there for as long as the work goes on; without one, what is being done is left to come to its end.

    Raises:
        UsageError: no node has so many cores, or none has a GPU.
    """

    def __init__(
        self, ray: Any, *, threads: int | None, most: int, device: str = "cpu", mark: Path | None = None
    ) -> None:
        self._ray = ray
        self._mark = mark
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
        if self._mark is None or not waiting:
            return
        self._mark.unlink(missing_ok=True)
        with contextlib.suppress(self._ray.exceptions.RayError):  # so that none still writes where files are removed
            _, late = self._ray.wait(waiting, num_returns=len(waiting), timeout=ENDED)
            for one in late:
                self._ray.cancel(one, force=True)
            if late:
                self._ray.wait(late, num_returns=len(late), timeout=ENDED)

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
        remote = self._ray.remote(while_going_on).options(**self._options)
        self._waiting[remote.remote(self._mark, task, *arguments)] = name

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


def while_going_on(mark: Path | None, task: Callable[..., Any], *arguments: Any) -> Any:
    """On a node: call a function. Where `mark` is gone, or goes meanwhile, it is interrupted as by Ctrl+C, and what
    comes of it is None, for which nobody waits any more."""
    if mark is None:
        return task(*arguments)
    lock, done = threading.Lock(), threading.Event()

    def look() -> None:
        while not done.wait(LOOKS):
            if not _is_there(mark):
                with lock:
                    if not done.is_set():
                        _thread.interrupt_main()
                return

    if not _is_there(mark):
        return None
    try:
        threading.Thread(target=look, daemon=True).start()
        try:
            return task(*arguments)
        finally:
            with lock:
                done.set()
    except KeyboardInterrupt:
        return None


def _is_there(mark: Path) -> bool:
    try:
        os.close(os.open(mark, os.O_RDONLY))  # which NFS asks its server about; what it says of one may be a minute old
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # it can't be told now, and the work may go on
        pass
    return True


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
