"""Whatever cuts a merge short: the target is absent or complete, a rerun succeeds, and --resume redoes the rest."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from lorakit.errors import Conflict, OutOfSpace, Refused
from lorakit.merge import merge as module
from lorakit.merge.merge import MergeReport, merge
from tests.disks import small_disk_at
from tests.folders import base_tensors, factors, leftovers, linear_modules, write_adapter, write_base
from tests.merge.cut_short import Runner, disk_full_at, each_write

LAYERS, SHARDS = 3, 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_base(tmp_path_factory.mktemp("resume") / "base", base_tensors(LAYERS), shards=SHARDS)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("resume") / "adapter", factors(linear_modules(LAYERS)))


@pytest.fixture(scope="module")
def whole(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed merge gives."""
    out = tmp_path_factory.mktemp("resume") / "out"
    merged(base, adapter, out)
    return contents(out)


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner() as running:
        yield running


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> MergeReport:
    return merge(base, adapter, out=out, device="cpu", **{"dtype": "bf16", **options})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but for what a record says of time, place and what was taken up."""
    found = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    record = json.loads(found["lorakit.json"])
    for key in ("seconds", "out", "resumed"):
        record["report"].pop(key)
    return found | {"lorakit.json": json.dumps(record).encode()}


def kept_shards(parent: Path) -> dict[str, tuple[int, int]]:
    """Names of the whole shards that an interrupted run left, each with inode and time.

    In the last moment, when only the journal's end and the rename are missing, it leaves nothing to go on with.
    """
    return {
        file.name: (file.stat().st_ino, file.stat().st_mtime_ns)
        for name in leftovers(parent)
        if (parent / name / ".merge-done.jsonl").exists()
        for file in (parent / name).glob("*.safetensors")
    }


def assert_absent_or(out: Path, whole: dict[str, bytes]) -> bool:
    if out.exists():
        assert contents(out) == whole
        return False
    return True


def assert_gone_on_with(base: Path, adapter: Path, out: Path, whole: dict[str, bytes]) -> None:
    """After a kill: `resume` leaves the whole shards untouched, and the result is the undisturbed one's."""
    if not assert_absent_or(out, whole):
        return
    kept = kept_shards(out.parent)
    report = merged(base, adapter, out, resume=True)
    assert set(report.resumed) == set(kept)
    for name in report.resumed:
        assert ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) == kept[name]
    assert contents(out) == whole
    assert not leftovers(out.parent)


def assert_done_anew(base: Path, adapter: Path, out: Path, whole: dict[str, bytes]) -> None:
    if not assert_absent_or(out, whole):
        return
    assert merged(base, adapter, out).resumed == ()
    assert contents(out) == whole
    assert not leftovers(out.parent)


AFTER = [assert_gone_on_with, assert_done_anew]
After = Callable[[Path, Path, Path, dict[str, bytes]], None]


def calls_of_a_merge(base: Path, adapter: Path, out: Path) -> list[str]:
    made: list[str] = []
    with each_write(lambda _, name: made.append(name)):
        merged(base, adapter, out)
    return made


def kill_at_calls(
    runner: Runner, base: Path, adapter: Path, place: Path, whole: dict[str, bytes], step: int, after: After
) -> None:
    number = len(calls_of_a_merge(base, adapter, place / "counted" / "out"))
    assert number > 40
    killed = 0
    for call in [*range(1, number - 8, step), *range(number - 8, number + 1)]:
        out = place / str(call) / "out"
        killed += runner.run(base, adapter, out, call=call) == -signal.SIGKILL
        if out.parent.exists():
            after(base, adapter, out, whole)
    assert killed >= 8


@pytest.mark.parametrize("after", AFTER)
def test_killed_at_some_writes(
    runner: Runner, base: Path, adapter: Path, tmp_path: Path, whole: dict[str, bytes], after: After
) -> None:
    kill_at_calls(runner, base, adapter, tmp_path, whole, 9, after)


@pytest.mark.slow
@pytest.mark.parametrize("after", AFTER)
def test_killed_at_every_write(
    runner: Runner, base: Path, adapter: Path, tmp_path: Path, whole: dict[str, bytes], after: After
) -> None:
    kill_at_calls(runner, base, adapter, tmp_path, whole, 1, after)


@pytest.mark.parametrize("part", [0.01, 0.3, 0.6, 0.9, 1.0])
def test_killed_by_progress(
    runner: Runner, base: Path, adapter: Path, tmp_path: Path, whole: dict[str, bytes], part: float
) -> None:
    assert runner.run(base, adapter, tmp_path / "out", part=part) == -signal.SIGKILL
    assert_gone_on_with(base, adapter, tmp_path / "out", whole)


@pytest.mark.slow
def test_killed_at_any_moment(
    runner: Runner, base: Path, adapter: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    chance = random.Random(0)
    for number in range(60):
        out = tmp_path / str(number) / "out"
        runner.run(base, adapter, out, seconds=chance.uniform(0, 0.25), resume=number % 2 == 0)
        if out.parent.exists():
            random.Random(number).choice(AFTER)(base, adapter, out, whole)


def test_killed_again_and_again_while_it_is_gone_on_with(
    runner: Runner, base: Path, adapter: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out, before = tmp_path / "out", 0
    for _ in range(3):
        assert runner.run(base, adapter, out, rename=3, resume=True) == -signal.SIGKILL
        assert len(kept_shards(tmp_path)) == before + 2
        before += 2
    assert_gone_on_with(base, adapter, out, whole)


SCRIPT = "import sys, lorakit; lorakit.merge(sys.argv[1], [sys.argv[2]], out=sys.argv[3], device='cpu', dtype='bf16')"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize(
    "call", ["rename", "fsync", "ftruncate,truncate", "mkdir", "pwrite64", "copy_file_range", "unlink"]
)
@pytest.mark.parametrize("when", [1, 6])
def test_killed_in_the_kernel(
    base: Path, adapter: Path, tmp_path: Path, whole: dict[str, bytes], call: str, when: int
) -> None:
    out = tmp_path / "results" / "out"
    traced = ["strace", "-f", "-qq", "--seccomp-bpf", "-o", tmp_path / "log", "-e", f"trace={call}"]
    inject = ["-e", f"inject={call}:signal=KILL:when={when}"]
    command = [*traced, *inject, sys.executable, "-B", "-c", SCRIPT, base, adapter, out]
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    if "ptrace" in ended.stderr:
        pytest.skip(f"strace may not trace here: {ended.stderr.strip()}")
    if out.parent.exists():
        assert_gone_on_with(base, adapter, out, whole)


@pytest.mark.parametrize("resume", [False, True])
def test_out_of_space_at_every_write(
    base: Path, adapter: Path, tmp_path: Path, whole: dict[str, bytes], resume: bool
) -> None:
    made = calls_of_a_merge(base, adapter, tmp_path / "counted" / "out")
    for number, name in enumerate(made, 1):
        if name == "unlink":
            continue
        out = tmp_path / str(number) / "results" / "out"
        out.parent.parent.mkdir()
        with each_write(disk_full_at(number)), pytest.raises(OutOfSpace, match="no space left while writing"):
            merged(base, adapter, out, resume=resume)
        assert not out.exists()
        if not resume:
            assert not out.parent.exists()
        if resume and out.parent.exists():
            assert_gone_on_with(base, adapter, out, whole)
        elif number % 10 == 0:
            assert_done_anew(base, adapter, out, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk_at(tmp_path / "small", 128) as place:
        yield place


@pytest.mark.parametrize("kilobytes", range(72, 128, 8))
def test_a_disk_that_really_fills_up(
    base: Path,
    adapter: Path,
    small_disk: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    kilobytes: int,
) -> None:
    filler, out = small_disk / "filler", small_disk / "out"
    filler.write_bytes(b"1" * kilobytes * 1024)
    monkeypatch.setattr(module, "_ensure_space", lambda *_: None)
    with pytest.raises(OutOfSpace):
        merged(base, adapter, out, resume=True)
    filler.unlink()
    assert_gone_on_with(base, adapter, out, whole)


def interrupt(error: BaseException, part: float = 0.6) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= part * total:
            raise error

    return progress


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), MemoryError()])
@pytest.mark.parametrize("resume", [False, True])
def test_an_interruption_leaves_its_shards_only_to_who_will_go_on(
    base: Path, adapter: Path, tmp_path: Path, whole: dict[str, bytes], error: BaseException, resume: bool
) -> None:
    with pytest.raises((KeyboardInterrupt, OutOfSpace, MemoryError)):
        merged(base, adapter, tmp_path / "out", resume=resume, progress=interrupt(error))
    assert len(leftovers(tmp_path)) == resume
    assert_gone_on_with(base, adapter, tmp_path / "out", whole)


def test_what_would_fail_again_is_left_to_nobody(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused):
        merged(base, adapter, tmp_path / "out", resume=True, progress=interrupt(Refused("too large")))
    assert leftovers(tmp_path) == []


@pytest.fixture
def interrupted(base: Path, adapter: Path, tmp_path: Path, runner: Runner) -> tuple[Path, Path, Path]:
    """Copies of the base and the adapter, and a target that was being written from them."""
    mine, its = tmp_path / "mine", tmp_path / "its"
    shutil.copytree(base, mine)
    shutil.copytree(adapter, its)
    runner.run(mine, its, tmp_path / "out", rename=5)
    assert kept_shards(tmp_path)
    return mine, its, tmp_path / "out"


def written_again(file: Path) -> None:
    save_file(load_file(file), file.with_suffix(".new"), metadata={"format": "pt"})
    file.with_suffix(".new").rename(file)


@pytest.mark.parametrize(
    "change",
    ["weight", "dtype", "adapter", "adapter config", "base", "base config", "rounding", "layout"],
)
def test_another_merge_does_not_take_it_up(interrupted: tuple[Path, Path, Path], change: str) -> None:
    base, adapter, out = interrupted
    options: dict[str, Any] = {"dtype": "bf16"}
    adapters: Any = adapter
    if change == "weight":
        adapters = [(adapter, 0.5)]
    elif change == "dtype":
        options = {"dtype": "fp16"}
    elif change == "rounding":
        options |= {"rounding": "stochastic"}
    elif change == "layout":
        options |= {"max_shard_size": 2000}
    elif change == "adapter":
        written_again(adapter / "adapter_model.safetensors")
    elif change == "base":
        written_again(sorted(base.glob("*.safetensors"))[-1])
    else:
        file = adapter / "adapter_config.json" if change == "adapter config" else base / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "note": 1, "lora_alpha": 9}))
    report = merge(base, adapters, out=out, device="cpu", resume=True, **options)
    assert report.resumed == ()
    assert leftovers(out.parent) == []


def test_a_shard_that_was_cut_since_is_done_anew(
    base: Path, adapter: Path, tmp_path: Path, runner: Runner, whole: dict[str, bytes]
) -> None:
    runner.run(base, adapter, tmp_path / "out", rename=5)
    first, *others = sorted(kept_shards(tmp_path))
    place = tmp_path / leftovers(tmp_path)[0]
    os.truncate(place / first, 100)
    (place / "tokenizer.json").write_text("of another time")
    (place / "folder").mkdir()
    assert set(merged(base, adapter, tmp_path / "out", resume=True).resumed) == set(others)
    assert contents(tmp_path / "out") == whole


def test_of_two_merges_at_once_one_wins(
    base: Path, adapter: Path, tmp_path: Path, runner: Runner, whole: dict[str, bytes]
) -> None:
    for number in range(5):
        out = tmp_path / str(number) / "out"
        job = {"base": base, "adapter": adapter, "out": out, "resume": number % 2 == 0}
        assert sorted(runner.together(job, job)) == [0, Conflict.code]
        assert contents(out) == whole
        assert leftovers(out.parent) == []


def test_two_that_go_on_with_the_same_do_not_share_it(
    base: Path, adapter: Path, tmp_path: Path, runner: Runner, whole: dict[str, bytes]
) -> None:
    for number in range(5):
        out = tmp_path / str(number) / "out"
        runner.run(base, adapter, out, rename=4)
        job = {"base": base, "adapter": adapter, "out": out, "resume": True}
        assert sorted(runner.together(job, job)) == [0, Conflict.code]
        assert contents(out) == whole
        assert leftovers(out.parent) == []


def test_free_space_is_asked_only_for_what_is_missing(
    base: Path, adapter: Path, tmp_path: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    runner.run(base, adapter, out, rename=5)
    sizes = [(tmp_path / leftovers(tmp_path)[0] / name).stat().st_size for name in kept_shards(tmp_path)]
    total = merge(base, adapter, device="cpu", dtype="bf16", dry_run=True).plan.nbytes
    monkeypatch.setattr(module, "free_bytes", lambda _: total - sum(sizes) - 1)
    with pytest.raises(OutOfSpace, match="are free there"):
        merged(base, adapter, out, resume=True)
    monkeypatch.setattr(module, "free_bytes", lambda _: total - sum(sizes))
    assert len(merged(base, adapter, out, resume=True).resumed) == len(sizes)
