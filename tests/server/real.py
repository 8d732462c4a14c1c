"""Real vLLM on a CPU: a tiny random model, adapters that all say something else, servers, and what they answer.

The oracle is a cold server: plain vLLM, started with each adapter under a name of its own, asked once, and ended.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

PROMPTS = ("hello", "the quick brown fox", "0123")
ENGINE_FLAGS = ("--max-model-len", "256", "--dtype", "float32")
QUICK = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_ENABLE_RESPONSES_API_STORE": "1",
    "TORCH_COMPILE_DISABLE": "1",
}  # fmt: skip


def make_tiny_model(folder: Path) -> Path:
    """A random two-layer Llama with a byte-level tokenizer; vLLM on a CPU wants heads of 32."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<s>", "</s>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:",
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=256,
        eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def make_random_adapter(folder: Path, base: Path, seed: int, **lora: Any) -> Path:
    """As PEFT saves it, on all linear layers, strong enough to change every token."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {"r": 8, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def write_checkpoint(run: Path, adapter: Path, step: int, eval_loss: float | None = None) -> Path:
    """A checkpoint in the order in which transformers' Trainer writes one: `trainer_state.json` last."""
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copyfile(adapter / name, folder / name)
    log: list[dict[str, Any]] = [{"step": step, "epoch": 1.0, "loss": 2.0}]
    if eval_loss is not None:
        log.append({"step": step, "epoch": 1.0, "eval_loss": eval_loss})
    state = {"global_step": step, "epoch": 1.0, "log_history": log}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


@dataclass(frozen=True)
class Answer:
    """The first tokens of a completion with their logprobs, and which revision the answer says it is of."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    revision: str | None

    def agrees_with(self, other: Answer) -> bool:
        return self.tokens == other.tokens and all(
            math.isclose(mine, theirs, abs_tol=2e-3) for mine, theirs in zip(self.logprobs, other.logprobs, strict=True)
        )


def ask(client: httpx.Client, model: str, prompt: str = PROMPTS[0], *, max_tokens: int = 6) -> Answer:
    response = client.post(
        "/v1/completions",
        json={"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "logprobs": 1},
    )
    assert response.status_code == 200, response.text
    return answer_of(response.json(), response.headers.get("x-lorakit-revision"))


def answer_of(body: Mapping[str, Any], revision: str | None) -> Answer:
    found = body["choices"][0]["logprobs"]
    if revision is not None:
        assert body["model"] == revision
    return Answer(tuple(found["tokens"]), tuple(found["token_logprobs"]), revision)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def plain_vllm(
    base: Path, log: Path, *flags: str, max_loras: int, max_rank: int, **more: str
) -> Iterator[httpx.Client]:
    """vLLM without lorakit, freshly started, which loads and unloads adapters when asked; `more` are variables."""
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--served-model-name", "base",
        "--host", "127.0.0.1", "--port", str(port), "--enable-lora", "--max-loras", str(max_loras),
        "--max-lora-rank", str(max_rank), "--enforce-eager", "--distributed-executor-backend", "uni", *ENGINE_FLAGS,
        *flags,
    ]  # fmt: skip
    variables = {
        **os.environ, **QUICK, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", **more,
    }  # fmt: skip
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=variables, stdout=stream, stderr=stream, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_for(client, "/health", process, log)
            yield client
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            end_group(process)


def cold_answers(
    base: Path, adapters: Mapping[str, Path], log: Path, *, max_rank: int = 8
) -> dict[tuple[str, str], Answer]:
    """What plain vLLM, freshly started, answers as the base and as each adapter: by (name, prompt)."""
    with plain_vllm(base, log, *named_modules(adapters), max_loras=len(adapters) + 1, max_rank=max_rank) as client:
        return answers_of(client, adapters)


def named_modules(adapters: Mapping[str, Path]) -> list[str]:
    return ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]


def answers_of(client: httpx.Client, adapters: Iterable[str]) -> dict[tuple[str, str], Answer]:
    """What the base and each adapter answer: by (name, prompt)."""
    return {(name, prompt): ask(client, name, prompt) for name in ("base", *adapters) for prompt in PROMPTS}


def wait_for(client: httpx.Client, path: str, process: subprocess.Popen[bytes], log: Path, limit: float = 240) -> None:
    """Until a path answers 200; fails with the server's own last words."""
    ends = time.monotonic() + limit
    while time.monotonic() < ends and process.poll() is None:
        try:
            if client.get(path).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"{path} did not answer 200:\n" + log.read_text(errors="replace")[-4000:])


def end_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


@dataclass
class Server:
    """A running `lorakit serve`."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def client(self, timeout: float = 60) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=timeout)

    def adapter(self, name: str) -> dict[str, Any]:
        with self.client() as client:
            response = client.get(f"/v1/adapters/{name}")
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    def wait_until(self, what: Any, limit: float = 60) -> Any:
        """Ask until the answer is true, and give it back."""
        ends = time.monotonic() + limit
        while time.monotonic() < ends:
            try:
                if found := what():
                    return found
            except (httpx.TransportError, AssertionError):
                pass
            time.sleep(0.05)
        raise AssertionError("it did not come to that:\n" + self.log.read_text(errors="replace")[-4000:])

    def processes(self) -> list[int]:
        """The supervisor's children and theirs."""
        found, todo = [], [self.process.pid]
        while todo:
            parent = todo.pop()
            listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True)
            children = [int(word) for word in listed.stdout.split()]
            found += children
            todo += children
        return found


@contextmanager
def serving(base: Path, home: Path, log: Path, *flags: str, engine: Sequence[str] = ENGINE_FLAGS) -> Iterator[Server]:
    """`lorakit serve`, ready; ended by Ctrl+C, which leaves no process behind."""
    port = free_port()
    command = [sys.executable, "-m", "lorakit", "serve", str(base), "--port", str(port), *flags, "--", *engine]
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command, env={**os.environ, **QUICK, "LORAKIT_HOME": str(home)}, stdout=stream, stderr=stream
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        with server.client() as client:
            wait_for(client, "/ready", process, log)
        yield server
    finally:
        started = server.processes()
        process.send_signal(signal.SIGINT)
        try:
            code = process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert code == 130
        assert not [pid for pid in started if is_running(pid)]


@contextmanager
def started(folder: Path, *words: str) -> Iterator[Server]:
    """lorakit with these words of its command line, `serve --engine` or `sync`: ready, with its store and its log in
    `folder`; ended by SIGTERM."""
    port, log = free_port(), folder / f"{words[0]}.log"
    command = [sys.executable, "-m", "lorakit", *words, "--port", str(port)]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env={**os.environ, "LORAKIT_HOME": str(folder / "home")}, stdout=stream, stderr=stream
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        with server.client() as client:
            wait_for(client, "/ready", process, log)
        yield server
    finally:
        process.terminate()
        assert process.wait(30) == 0


def is_running(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent to notice does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
