"""What a task writes, without a cluster: the bytes of the process that merges. With a real one: tests/cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lorakit.cluster.sight import sight_of
from lorakit.errors import NotFound
from lorakit.merge import merge as module
from lorakit.merge.merge import merge
from lorakit.merge.spread import RayCrew, write_one
from tests.folders import base_tensors, factors, leftovers, linear_modules, write_adapter, write_base


class Here:
    """Does each task in this process, once or twice, and gives the results in another order."""

    device, threads = "cpu", 2

    def __init__(self, times: int) -> None:
        self.times = times
        self.done: list[tuple[Any, Any]] = []

    def begin(self, name: Any, task: Any, *arguments: Any) -> None:
        self.done += [(name, [task(*arguments) for _ in range(self.times)][-1])]

    def finished(self, timeout: float | None) -> Iterator[tuple[Any, Any]]:
        while self.done:
            yield self.done.pop()


def spread_here(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    @contextmanager
    def crew(ray: Any, plan: Any, adapters: Any, folder: Path, *_: Any) -> Iterator[RayCrew]:
        with sight_of(folder, [shard.file for shard in plan.base.shards]) as sight:
            yield RayCrew(Here(times), sight)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "ensure_installed", lambda: None)
    monkeypatch.setattr(module, "_crew", crew)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", base_tensors(3), shards=5)


@pytest.mark.parametrize("times", [1, 2])
def test_a_task_that_is_done_twice_is_there_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    adapter = write_adapter(tmp_path / "lora", factors(linear_modules(3)))
    here = merge(base, adapter, out=tmp_path / "here", device="cpu", dtype="bf16")
    spread_here(monkeypatch, times)
    seen: list[int] = []
    there = merge(
        base, adapter, out=tmp_path / "there", device="cpu", dtype="bf16", ray=True,
        progress=lambda done, total: seen.append(done),
    )  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == sorted(
        path.name for path in (tmp_path / "here").iterdir()
    )
    for file in (tmp_path / "here").glob("model*"):
        assert (tmp_path / "there" / file.name).read_bytes() == file.read_bytes()
    assert there.survivals == here.survivals
    assert seen == sorted(seen)
    assert seen[-1] == there.plan.nbytes
    assert leftovers(tmp_path) == []


def test_a_shard_that_came_from_the_hub_into_another_cache_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "cache" / "model.safetensors"
    with sight_of(tmp_path, []) as sight, pytest.raises(NotFound, match=f"does not see '{gone}'"):
        write_one(sight, b"", None, None, [gone])  # type: ignore[arg-type]
