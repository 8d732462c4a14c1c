"""Which nodes get tasks, and of what size: by what the cluster says of itself. The real one is in test_spread.py."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorakit.cluster.tasks import Tasks, while_going_on
from lorakit.errors import UsageError


def cluster(*nodes: dict[str, float], **more: Any) -> Any:
    """What Ray says of such nodes; "dead" ones are listed too."""
    listed = [
        {
            "NodeID": f"{number}", "NodeManagerHostname": f"gpu-{number}", "NodeManagerAddress": "10.0.0.1",
            "Alive": "dead" not in node, "Resources": node,
        }
        for number, node in enumerate(nodes)
    ]  # fmt: skip
    return SimpleNamespace(nodes=lambda: listed, exceptions=SimpleNamespace(RayError=ValueError), **more)


def names(tasks: Tasks) -> list[str]:
    return [node.name for node in tasks.nodes]


def test_a_task_takes_what_the_smallest_node_has() -> None:
    tasks = Tasks(cluster({"CPU": 4}, {"CPU": 64}, {}, {"CPU": 2, "dead": 1}), threads=None, most=8)
    assert (tasks.threads, tasks.slots, tasks.device, names(tasks)) == (4, 17, "cpu", ["gpu-0", "gpu-1"])


def test_what_was_asked_for_leaves_small_nodes_out() -> None:
    tasks = Tasks(cluster({"CPU": 4}, {"CPU": 64}), threads=16, most=8)
    assert (tasks.threads, tasks.slots, names(tasks)) == (16, 4, ["gpu-1"])
    with pytest.raises(UsageError, match="no node of the Ray cluster has 65 CPUs: the largest, 'gpu-1', has 64"):
        Tasks(cluster({"CPU": 4}, {"CPU": 64}), threads=65, most=8)


def test_where_a_node_has_a_gpu_tasks_compute_on_those() -> None:
    mixed = cluster({"CPU": 64}, {"CPU": 16, "GPU": 8})
    tasks = Tasks(mixed, threads=None, most=8, device="auto")
    assert (tasks.device, names(tasks)) == ("cuda", ["gpu-1"])
    assert Tasks(mixed, threads=None, most=8, device="cpu").device == "cpu"
    with pytest.raises(UsageError, match="say --device cpu"):
        Tasks(cluster({"CPU": 4}), threads=None, most=8, device="cuda")
    with pytest.raises(UsageError, match="'cuda:1' names one: say --device cuda"):
        Tasks(mixed, threads=None, most=8, device="cuda:1")


def test_a_cluster_that_has_no_node_yet_is_waited_for() -> None:
    tasks = Tasks(cluster({}), threads=None, most=8)
    assert (tasks.threads, tasks.slots, tasks.nodes) == (1, 1, [])


def test_what_is_not_done_is_told_to_end_and_waited_for(tmp_path: Path) -> None:
    told: list[Any] = []
    mark = tmp_path / "mark"
    mark.touch()

    def wait(some: list[str], **_: Any) -> tuple[list[str], list[str]]:
        told.append(("wait", some, mark.exists()))
        return some[:1], some[1:]

    ray = cluster({"CPU": 2}, cancel=lambda one, force: told.append(("cancel", one, force)), wait=wait)
    with Tasks(ray, threads=1, most=1, mark=mark) as tasks:
        tasks._waiting = {"a": 1, "b": 2}
    assert told == [("wait", ["a", "b"], False), ("cancel", "b", True), ("wait", ["b"], False)]


def test_without_a_mark_what_is_being_done_is_left_alone() -> None:
    with Tasks(cluster({"CPU": 2}), threads=1, most=1) as tasks:
        tasks._waiting = {"a": 1}


def test_a_task_ends_when_its_mark_goes_and_does_not_begin_without(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    mark.touch()
    assert while_going_on(mark, pow, 2, 3) == 8
    begun = time.monotonic()
    threading.Timer(0.2, mark.unlink).start()
    assert while_going_on(mark, _for_ever) is None
    assert time.monotonic() - begun < 10
    assert while_going_on(mark, pow, 2, 3) is None
    assert while_going_on(None, pow, 2, 3) == 8


def test_a_mark_that_can_not_be_looked_at_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "open", fails)
    assert while_going_on(tmp_path / "mark", pow, 2, 3) == 8


def _for_ever() -> None:
    while True:
        time.sleep(0.01)
