"""Merge, convert and extract on a real Ray: the bytes of one machine, whole or not at all, whoever is killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorakit
from lorakit.cluster.joining import joined
from lorakit.cluster.tasks import Tasks
from lorakit.convert.convert import convert
from lorakit.errors import LorakitError, NotFound, Refused, UsageError
from lorakit.merge.merge import merge
from tests.folders import factors, leftovers, write_adapter, write_base
from tests.hub import Hub
from tests.ray_cluster import cluster_here, environment, joining_node

SIDE, WEIGHTS = 2048, 6  # 16 MB each, a shard each
SLOW = {"rounding": "stochastic", "workers": 1, "dtype": "bf16"}  # a third of a second a shard
SOON = 60.0  # seconds


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with cluster_here() as found:
        yield found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama in 7 shards, and adapters beside it."""
    from tests.models import LINEARS, make_adapter, make_base

    folder = tmp_path_factory.mktemp("spread")
    base = make_base(folder / "base", max_shard_size="200KB")
    make_adapter(folder / "lora", base, target_modules=LINEARS["llama"])
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose shards take a while, and an adapter of it."""
    folder = tmp_path_factory.mktemp("large")
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(WEIGHTS)]
    chance = np.random.default_rng(0)
    tensors = {f"{name}.weight": chance.standard_normal((SIDE, SIDE), dtype=np.float32) for name in names}
    write_base(folder / "base", tensors, shards=WEIGHTS)
    write_adapter(folder / "lora", factors(dict.fromkeys(names, (SIDE, SIDE))))
    return folder


@pytest.fixture(scope="module")
def undisturbed(large: Path) -> dict[str, str]:
    return digests(merged(large, large / "undisturbed", **SLOW))


def merged(folder: Path, out: Path, **options: Any) -> Path:
    merge(folder / "base", folder / "lora", out=out, device="cpu", **options)
    return out


def digests(folder: Path) -> dict[str, str]:
    """Of every file but the two that name the folder and the time."""
    files = {path.name: path for path in folder.rglob("*") if path.is_file()}
    assert {"lorakit.json"} <= files.keys()
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest()
        for name, file in files.items()
        if name not in ("lorakit.json", "README.md")
    }


def record(folder: Path) -> dict[str, Any]:
    """What lorakit.json says, but for time and place."""
    found: dict[str, Any] = json.loads((folder / "lorakit.json").read_text())
    for key in ("seconds", "out"):
        found["report"].pop(key)
    return found


# The bytes are those of one machine


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bf16", "rounding": "stochastic", "seed": 3, "max_shard_size": "150KB"},
        pytest.param({"quantize": "fp8"}, marks=pytest.mark.slow),  # imports compressed-tensors everywhere
    ],
)
def test_a_spread_merge_writes_the_same_bytes(
    address: str, model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    here = merged(model, tmp_path / "here", **options)
    there = merged(model, tmp_path / "there", ray=True, **options)
    assert len(list(there.glob("*.safetensors"))) > 2
    assert digests(there) == digests(here)
    assert record(there) == record(here)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "there"]


@pytest.mark.slow
def test_so_does_one_of_another_method(address: str, model: Path, tmp_path: Path) -> None:
    adapter = vera(model)
    merge(model / "base", adapter, out=tmp_path / "here", device="cpu")
    merge(model / "base", adapter, out=tmp_path / "there", device="cpu", ray=address)
    assert digests(tmp_path / "there") == digests(tmp_path / "here")


def vera(model: Path) -> Path:
    """An adapter whose layers PEFT makes together."""
    import torch
    from peft import VeraConfig, get_peft_model

    from tests.models import load

    if not (model / "vera").exists():
        torch.manual_seed(0)
        made = get_peft_model(load(model / "base"), VeraConfig(r=4, target_modules=["q_proj"]))
        for name, parameter in made.named_parameters():
            if "vera_lambda" in name:
                torch.nn.init.normal_(parameter)
        made.save_pretrained(model / "vera")
    return model / "vera"


def test_a_relative_path_is_the_same_file_on_every_node(
    address: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = merged(model, tmp_path / "here")
    monkeypatch.chdir(model)
    merge("base", "lora", out=os.path.relpath(tmp_path / "there"), device="cpu", ray=True)
    assert digests(tmp_path / "there") == digests(here)


def test_a_base_on_the_hub_comes_shard_by_shard_into_a_shared_cache(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub({"someone/model": write_base(tmp_path / "origin", shards=4)})
    adapter = write_adapter(tmp_path / "lora", base_model_name_or_path="someone/model")
    merge(tmp_path / "origin", adapter, out=tmp_path / "here", device="cpu")
    with monkeypatch.context() as patch:
        hub.point_there(patch, tmp_path / "cache")
        hub.slow = {"model-00002-of-00004.safetensors": 0.3}
        merge(None, adapter, out=tmp_path / "there", device="cpu", ray=True)
        hub.close()
    assert digests(tmp_path / "there") == digests(tmp_path / "here")


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, pytest.param({"quantize": "w4a16"}, marks=pytest.mark.slow)])
def test_a_spread_conversion_writes_the_same_bytes(
    address: str, model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    import torch
    from safetensors.torch import load_file

    tensors = {
        name: value for file in (model / "base").glob("*.safetensors") for name, value in load_file(file).items()
    }
    torch.save({"state_dict": tensors, "epoch": 1}, tmp_path / "last.ckpt")
    for out, ray in ((tmp_path / "here", False), (tmp_path / "there", True)):
        report = convert(tmp_path / "last.ckpt", out, model / "base", max_shard_size="150KB", ray=ray, **options)
        assert report.tensors > 10
    assert len(list((tmp_path / "there").glob("*.safetensors"))) > 2
    assert digests(tmp_path / "there") == digests(tmp_path / "here")
    assert record(tmp_path / "there") == record(tmp_path / "here")


@pytest.mark.parametrize("tuned", ["merged", pytest.param("vera", marks=pytest.mark.slow)])
def test_a_spread_extraction_writes_the_same_bytes(address: str, model: Path, tmp_path: Path, tuned: str) -> None:
    source = vera(model) if tuned == "vera" else merged(model, tmp_path / "tuned")
    for out, ray in ((tmp_path / "here", False), (tmp_path / "there", True)):
        lorakit.extract(source, model / "base", out, rank=3, device="cpu", ray=ray)
    assert digests(tmp_path / "there") == digests(tmp_path / "here")
    assert record(tmp_path / "there") == record(tmp_path / "here")
    measured = lorakit.extract(source, model / "base", rank=3, device="cpu", ray=True, dry_run=True)
    assert [one.module for one in measured.modules] == [
        one["module"] for one in record(tmp_path / "here")["report"]["modules"]
    ]


# Whoever is killed


def staged(parent: Path) -> Path | None:
    return next((parent / name for name in leftovers(parent)), None)


def eventually(found: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + SOON
    while not (value := found()):
        assert time.monotonic() < end, what
        time.sleep(0.002)
    return value


def writer_of(parent: Path) -> tuple[int, str] | None:
    """A process that has a part of a shard open, and which."""
    folder = staged(parent)
    if folder is None or not any(folder.glob("*.part")):
        return None
    for process in Path("/proc").glob("[0-9]*"):
        try:
            opened = [os.readlink(file) for file in (process / "fd").iterdir()]
        except OSError:
            continue
        for name in opened:
            if name.startswith(f"{folder}/") and name.endswith(".part") and int(process.name) != os.getpid():
                return int(process.name), Path(name).name
    return None


def test_a_worker_that_is_killed_is_replaced(
    address: str, large: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    killed: list[str] = []

    def kill() -> None:
        pid, part = eventually(lambda: writer_of(tmp_path), "no worker writes a part")
        os.kill(pid, signal.SIGKILL)
        killed.append(part)

    killer = threading.Thread(target=kill)
    killer.start()
    out = merged(large, tmp_path / "out", ray=True, **SLOW)
    killer.join()
    assert len(killed) == 1
    assert digests(out) == undisturbed
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_a_task_that_kills_every_worker_is_given_up(address: str) -> None:
    with joined(True) as ray, Tasks(ray, threads=1, most=1) as tasks:
        tasks.begin("model-00001", lambda: os._exit(1))
        with pytest.raises(
            LorakitError, match="the task of 'model-00001' died on the Ray cluster, and 3 times more when"
        ):
            list(tasks.finished())


def test_a_task_that_would_go_on_for_ever_is_interrupted_when_its_work_ends(address: str, tmp_path: Path) -> None:
    mark, running = tmp_path / "mark", tmp_path / "running"
    mark.touch()

    def go_on() -> None:
        running.write_text(str(os.getpid()))
        try:
            while True:
                time.sleep(0.01)
        finally:
            running.unlink()

    with joined(True) as ray, Tasks(ray, threads=1, most=1, mark=mark) as tasks:
        tasks.begin("model-00001", go_on)
        eventually(running.exists, "it does not begin")
        left = time.monotonic()
    assert not running.exists()  # what it does last is done, as it is not where a process is killed
    assert time.monotonic() - left < 10


def stopped(done: int, total: int) -> None:
    if done >= total / 3:
        raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("resume", [False, True])
def test_an_interrupted_merge_cancels_its_tasks(
    address: str, large: Path, undisturbed: dict[str, str], tmp_path: Path, resume: bool
) -> None:
    with pytest.raises(KeyboardInterrupt):
        merged(large, tmp_path / "out", ray=True, resume=resume, progress=stopped, **SLOW)
    assert writer_of(tmp_path) is None
    assert len(leftovers(tmp_path)) == resume
    kept = inodes(tmp_path)
    report = merge(large / "base", large / "lora", out=tmp_path / "out", device="cpu", resume=resume, ray=True, **SLOW)
    assert set(report.resumed) == kept.keys()
    assert (2 if resume else 0) <= len(kept) < WEIGHTS
    assert kept.items() <= {file.name: file.stat().st_ino for file in (tmp_path / "out").iterdir()}.items()
    assert digests(tmp_path / "out") == undisturbed
    assert leftovers(tmp_path) == []


def inodes(parent: Path) -> dict[str, int]:
    """Of the shards that are whole, where a result is being written."""
    folder = staged(parent)
    return {} if folder is None else {file.name: file.stat().st_ino for file in folder.glob("*.safetensors")}


def command(large: Path, out: Path, ray: str, *more: str) -> subprocess.Popen[str]:
    settings = ["--dtype", "bf16", "--rounding", "stochastic", "--workers", "1", "--device", "cpu", *more]
    said = [str(large / "lora"), "--base", str(large / "base"), "--out", str(out), ray, *settings]
    return subprocess.Popen(
        [sys.executable, "-m", "lorakit", "merge", *said], env=os.environ | environment(), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def processes_of(group: int) -> list[int]:
    """Those of a cluster that a command has started are of its group."""
    found = [int(process.name) for process in Path("/proc").glob("[0-9]*")]
    return [pid for pid in found if Path(f"/proc/{pid}/stat").exists() and _group(pid) == group]


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("started", [False, True])
def test_a_command_that_is_killed_is_gone_on_with(
    address: str, large: Path, undisturbed: dict[str, str], tmp_path: Path, started: bool
) -> None:
    ray = "--ray" if started else f"--ray={address}"
    with command(large, tmp_path / "out", ray, "--resume") as one:
        eventually(lambda: inodes(tmp_path), "no shard is whole")
        one.kill()
    eventually(lambda: writer_of(tmp_path) is None, "a worker goes on")
    kept = inodes(tmp_path)
    with command(large, tmp_path / "out", ray, "--resume", "--json") as again:
        said, told = again.communicate(timeout=2 * SOON)
    assert again.returncode == 0, told
    assert set(json.loads(said)["resumed"]) == kept.keys()
    assert 0 < len(kept) < WEIGHTS
    assert kept.items() <= {file.name: file.stat().st_ino for file in (tmp_path / "out").iterdir()}.items()
    assert digests(tmp_path / "out") == undisturbed
    assert leftovers(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("started", [False, True])
def test_an_interrupted_command_leaves_nothing(address: str, large: Path, tmp_path: Path, started: bool) -> None:
    process = command(large, tmp_path / "out", "--ray" if started else f"--ray={address}")
    writer, _ = eventually(lambda: writer_of(tmp_path), "no worker writes a part")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, told = process.communicate(timeout=SOON)
    assert (process.returncode, said, told.strip()) == (130, "", "error: interrupted")
    assert list(tmp_path.iterdir()) == []
    eventually(lambda: not Path(f"/proc/{writer}").exists(), "a worker goes on")
    eventually(lambda: not processes_of(process.pid), "processes of the cluster live on")


# What a cluster is asked for, and can't do


def test_a_failure_on_a_node_is_told_as_if_it_had_been_here(address: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"model.layers.0.self_attn.q_proj.weight": np.full((8, 8), 1e5, np.float32)})
    adapter = write_adapter(tmp_path / "lora", factors({"model.layers.0.self_attn.q_proj": (8, 8)}))
    with pytest.raises(Refused, match="beyond the range of float16"):
        merge(base, adapter, out=tmp_path / "out", dtype="fp16", ray=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora"]


def test_what_can_not_be_spread_is_refused(address: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for options, reason in (
        ({"residual": tmp_path / "rest"}, "--residual is made by one process"),
        ({"undo": True}, "--undo is made by one process"),
        ({"workers": 64}, "no node of the Ray cluster has 64 CPUs: the largest, .*, has 2; ask for fewer"),
        ({"device": "cuda:1"}, "say --device cuda"),
        ({"device": "cuda"}, "no node of the Ray cluster has a GPU"),
    ):
        with pytest.raises(UsageError, match=reason):
            merge(model / "base", model / "lora", out=out, ray=True, **{"device": "cpu", **options})
    with pytest.raises(UsageError, match="an adapter, and --ray is for whole models"):
        convert(model / "lora", out, model / "base", ray=True)
    with pytest.raises(UsageError, match="with nothing to spread"):
        convert(model / "base", out, only=["tokenizer"], ray=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # the check itself is in test_sight.py
def test_a_node_that_does_not_see_the_base_is_named(address: str, model: Path, tmp_path: Path) -> None:
    hidden = f'mount -t tmpfs none {model / "base"} && exec "$@"'
    apart = ("unshare", "--mount", "sh", "-c", hidden, "sh")
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount anything")
    with joining_node(address, tmp_path / "log", before=apart):
        (tmp_path / "results").mkdir()
        with pytest.raises(
            NotFound, match=rf"node '.+' does not see '{model}/base/model-00001-of-.*--ray needs a file"
        ):
            merged(model, tmp_path / "results" / "out", ray=True)
        assert list((tmp_path / "results").iterdir()) == []
