"""A merge that is cut short leaves nothing that looks finished, and memory does not grow with the model."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import Conflict, InvalidFile, OutOfSpace
from lorakit.files.safetensors import StoredTensor, planned_header
from lorakit.merge import execute, merge
from lorakit.merge.plan import CopyTensor
from tests.disks import small_disk_at
from tests.folders import leftovers, linear_modules, stored, write_adapter, write_base

CUT_SHORT = """
import os, signal, sys, lorakit
base, adapter, out = sys.argv[1:4]
def stop(done, total):
    if done > total / 3:
        os.kill(os.getpid(), signal.SIGKILL)
lorakit.merge(base, [adapter], out=out, device="cpu", progress=stop)
"""

INTERRUPTED = """
import contextlib, os, signal, sys
import lorakit.cli.merge as verb
from lorakit.cli import main
sent = []
@contextlib.contextmanager
def interrupting(*_, **__):
    def stop(done, total):
        if done > total / 3 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
    yield stop
verb.progress_bar = interrupting
main(["merge", sys.argv[2], "--base", sys.argv[1], "--out", sys.argv[3], "--device", "cpu"])
"""

PEAK = """
import re, sys, threading, lorakit
def now():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
peak, done = [0], threading.Event()
def look():
    while not done.wait(0.002):
        peak[0] = max(peak[0], now())
watcher = threading.Thread(target=look)
watcher.start()
lorakit.merge(sys.argv[1], [sys.argv[2]], out=sys.argv[3], device="cpu")
done.set()
watcher.join()
print(peak[0])
"""


def run(program: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", shards=3)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def test_a_killed_merge_leaves_no_target_and_the_next_one_clears_up(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "out"
    assert run(CUT_SHORT, base, adapter, out).returncode == -signal.SIGKILL
    assert not out.exists()
    assert len(leftovers(out.parent)) == 1
    merge.merge(base, [adapter], out=out, device="cpu")
    assert sorted(stored(out)) == sorted(stored(base))
    assert not leftovers(out.parent)


def test_an_interrupted_command_ends_with_130_and_leaves_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "out"
    ended = run(INTERRUPTED, base, adapter, out)
    assert (ended.returncode, ended.stderr.strip()) == (130, "error: interrupted")
    assert not out.parent.exists()


@pytest.mark.parametrize("call", ["pwrite", "copy_file_range", "fsync"])
def test_a_full_disk_is_said_and_nothing_is_left(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutOfSpace, match="no space left while writing"):
        merge.merge(base, [adapter], out=tmp_path / "results" / "out", device="cpu")
    assert not (tmp_path / "results").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk_at(tmp_path / "small", 64) as place:
        yield place


def test_a_disk_that_is_too_small_is_said_before_the_work(base: Path, adapter: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"1" * 60_000)
    with pytest.raises(OutOfSpace, match=r"needs .* GB, and .* GB are free there"):
        merge.merge(base, [adapter], out=small_disk / "out", device="cpu")


def test_a_disk_that_fills_up_meanwhile_is_left_as_it_was(
    base: Path, adapter: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "_ensure_space", lambda *_: None)
    (small_disk / "filler").write_bytes(b"1" * 60_000)
    with pytest.raises(OutOfSpace, match="no space left"):
        merge.merge(base, [adapter], out=small_disk / "out", device="cpu")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_base_that_becomes_shorter_meanwhile_is_noticed(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = merge.plan_merge

    def plan_and_cut(*arguments: object, **options: object) -> object:
        planned = plan(*arguments, **options)  # type: ignore[arg-type]
        shard = base / "model-00002-of-00003.safetensors"
        os.truncate(shard, shard.stat().st_size - 8)
        return planned

    monkeypatch.setattr(merge, "plan_merge", plan_and_cut)
    with pytest.raises(InvalidFile, match="became shorter"):
        merge.merge(base, [adapter], out=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_written_again_meanwhile_is_noticed(base: Path, adapter: Path, tmp_path: Path) -> None:
    touched = []

    def touch(*_: object) -> None:
        if not touched:
            touched.append(os.utime(adapter / "adapter_model.safetensors"))

    with pytest.raises(Conflict, match="was written again"):
        merge.merge(base, [adapter], out=tmp_path / "out", device="cpu", progress=touch)
    assert not (tmp_path / "out").exists()


def test_an_error_in_the_callback_stops_the_merge(base: Path, adapter: Path, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        merge.merge(base, [adapter], out=tmp_path / "results" / "out", device="cpu", progress=fail)
    assert not (tmp_path / "results").exists()


def zeros_base(folder: Path, layers: int) -> Path:
    """A base whose file takes no room on the disk: all of it is a hole."""
    folder.mkdir()
    shapes = {f"model.layers.{layer}.mlp.up_proj.weight": (2048, 2048) for layer in range(layers)}
    shapes |= {"model.embed_tokens.weight": (4096, 2048), "lm_head.weight": (4096, 2048)}
    head, header = planned_header(folder / "model.safetensors", [(n, "BF16", s) for n, s in shapes.items()], {})
    (folder / "model.safetensors").write_bytes(head)
    os.truncate(folder / "model.safetensors", header.size)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def test_private_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    from tests.folders import factors

    peaks = []
    for layers in (2, 48):
        base = zeros_base(tmp_path / f"base-{layers}", layers)
        modules = {f"model.layers.{layer}.mlp.up_proj": (2048, 2048) for layer in range(layers)}
        adapter = write_adapter(tmp_path / f"adapter-{layers}", factors(modules, rank=16), rank=16)
        ended = run(PEAK, base, adapter, tmp_path / f"out-{layers}")
        assert ended.returncode == 0, ended.stderr
        peaks.append(int(ended.stdout))
    assert peaks[1] < 600
    assert peaks[1] < peaks[0] + 60


def tensors(sizes: list[tuple[int, int]]) -> list[CopyTensor]:
    """Tensors of given (gap before, size), laid out alike in source and target but for a shift."""
    copied, position = [], 0
    for number, (gap, size) in enumerate(sizes):
        position += gap
        place = StoredTensor(f"{number}", Path("source"), "U8", (size,), position, position + size)
        moved = StoredTensor(f"{number}", Path("target"), "U8", (size,), position + 100, position + 100 + size)
        copied.append(CopyTensor(place, moved))
        position += size
    return copied


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40))), st.integers(1, 30))
def test_runs_cover_what_is_copied_once(sizes: list[tuple[int, int]], block: int) -> None:
    copied = tensors(sizes)
    before, execute.COPY_BLOCK = execute.COPY_BLOCK, block
    try:
        pieces = list(execute.runs(copied))
    finally:
        execute.COPY_BLOCK = before
    covered = [byte for piece in pieces for byte in range(piece.source_offset, piece.source_offset + piece.count)]
    assert covered == [byte for tensor in copied for byte in range(tensor.source.start, tensor.source.end)]
    assert all(piece.target_offset == piece.source_offset + 100 and 0 < piece.count <= block for piece in pieces)


def test_neighbours_are_copied_together() -> None:
    pieces = execute.runs(tensors([(0, 10), (0, 20), (5, 7)]))
    assert [(piece.source_offset, piece.target_offset, piece.count) for piece in pieces] == [(0, 100, 30), (35, 135, 7)]


def test_every_module_is_merged(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge.merge(base, [adapter], out=tmp_path / "out", device="cpu")
    assert {tensor.target.name for tensor in report.plan.computed} == {f"{name}.weight" for name in linear_modules()}
