"""Does vLLM really answer with an adapter as PEFT does? An engine is started, and both are asked for the same logprobs.

    lorakit check runs/sql/checkpoint-500 --base models/llama --probe

What is compared is what the adapter changes: the logprobs of a prompt's tokens with it, in vLLM and in transformers
with PEFT. Takes the memory of the base twice, one after the other.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.adapters.reading import load_adapter
from lorakit.convert.answers import MERGE, Check
from lorakit.errors import EngineFailed, LorakitError
from lorakit.server.engines.vllm import (
    Installed,
    allowed_rank,
    environment,
    installed,
    plain_command,
    prompt_logprobs,
    prompt_question,
)
from lorakit.server.supervision.engine_process import end_with_parent

PROMPT = "The capital of France is Paris. 2 + 2 = 4. def add(a, b): return a + b"
LENGTH = 24  # tokens of it, or as many others where there is no tokenizer
TOLERANCES = {"float32": 5e-3, "float16": 5e-2, "bfloat16": 2e-1}  # of a logprob
SHARE = 0.25  # of what the adapter changes: an engine that is further off serves another adapter, or none
PATIENCE = 600.0  # seconds for the engine to start

_NO_CAUSE = ("See root cause above", "See stack trace above")  # which vLLM logs last

Logprobs = Sequence[float]


@dataclass(frozen=True, slots=True)
class Compared:
    """Logprobs of the same tokens: of the base and with the adapter by PEFT, and with the adapter by the engine."""

    base: Logprobs
    peft: Logprobs
    engine: Logprobs
    dtype: str

    @property
    def change(self) -> float:
        """The most that the adapter changes."""
        return max(abs(one - other) for one, other in zip(self.peft, self.base, strict=True))

    @property
    def distance(self) -> float:
        """The most that the engine is off."""
        return max(abs(one - other) for one, other in zip(self.engine, self.peft, strict=True))

    def answer(self) -> Check:
        tolerance = TOLERANCES.get(self.dtype, TOLERANCES["bfloat16"])
        off = f"vLLM is off by up to {self.distance:.2g}"
        said = f"the adapter changes logprobs by up to {self.change:.3g}, {off}, in {self.dtype}"
        if self.distance > max(tolerance, SHARE * self.change):
            cure = "report it with the versions of vLLM and PEFT; until then merge it (lorakit merge), and serve that"
            return Check("probe", False, said, cure)
        if self.change <= 2 * tolerance:
            return Check("probe", None, f"{said}: too little to tell an adapter that is served from one that is not")
        return Check("probe", True, said)


def probe(adapter: Path, served: Path, base: str, *, max_rank: int | None = None, extra: Sequence[str] = ()) -> Check:
    """Ask both, and say whether they agree, in the dtype that the base is stored in. An engine that refuses the adapter
    is an answer, too.

    Args:
        adapter: what PEFT loads.
        served: what vLLM gets: the same, or what `lorakit convert` made of it.
        base: a folder or hub id, for both.
        max_rank: what the engine allows; None for as much as the adapter has.
        extra: arguments for vLLM.
    """
    try:
        found = installed()
    except EngineFailed as error:
        reason, _, cure = str(error).partition(": ")
        return Check("probe", None, reason, cure or None)
    tokens = _tokens(base)
    try:
        of_base, of_peft, dtype = _ask_peft(adapter, base, tokens)
    except (LorakitError, ImportError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        return Check("probe", None, f"transformers and PEFT can't run it here: {error}", "install lorakit[train]")
    loaded = load_adapter(served)
    rank = allowed_rank(max(1, loaded.rank, loaded.config.rank) if max_rank is None else max_rank)
    # left to itself vLLM takes a float32 base in 16 bit
    of_engine = _ask_engine(found, served, base, rank, tokens, ["--dtype", dtype, *extra])
    return of_engine if isinstance(of_engine, Check) else Compared(of_base, of_peft, of_engine, dtype).answer()


def _tokens(base: str) -> list[int]:
    """Of the prompt; where there is no tokenizer, the first that there are."""
    try:
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(base)(PROMPT)["input_ids"]
    except (ImportError, OSError, ValueError, KeyError):
        found = range(1, LENGTH + 1)
    return [int(token) for token in found][:LENGTH]


def _ask_engine(
    found: Installed, served: Path, base: str, rank: int, tokens: Sequence[int], extra: Sequence[str]
) -> list[float] | Check:
    """Its logprobs, or what it says instead."""
    import httpx

    try:
        return _logprobs_of_engine(found, served, base, rank, tokens, extra)
    except TimeoutError as error:
        return Check("probe", None, str(error), "ask for it where the base loads faster")
    except EngineFailed as error:
        return Check("probe", False, str(error), MERGE)
    except httpx.HTTPError as error:
        return Check("probe", False, f"vLLM started with the adapter, and gave no answer: {error!r}", MERGE)


def _logprobs_of_engine(
    found: Installed, served: Path, base: str, rank: int, tokens: Sequence[int], extra: Sequence[str]
) -> list[float]:
    """Raises EngineFailed, TimeoutError, httpx.HTTPError."""
    import httpx

    with tempfile.TemporaryDirectory(prefix="lorakit-probe-") as place:
        address, log = os.path.join(place, "s"), Path(place) / "log"
        command = plain_command(
            found,
            base=base,
            name="base",
            socket=address,
            rank=rank,
            adapters={"probed": served.absolute()},
            extra=extra,
        )
        with _running(command, environment(found, os.environ, offline=Path(base).is_dir()), log) as process:
            _wait(address, process, log)
            transport = httpx.HTTPTransport(uds=address)
            with httpx.Client(transport=transport, base_url="http://engine", timeout=60) as client:
                answer = client.post("/v1/completions", json=prompt_question("probed", tokens))
        try:
            return prompt_logprobs(answer.json(), tokens)
        except (ValueError, LookupError, TypeError):
            raise EngineFailed(f"vLLM loaded the adapter, and answered {answer.status_code}: {answer.text}") from None


@contextmanager
def _running(command: Sequence[str], variables: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env=variables, stdout=stream, stderr=stream, start_new_session=True, preexec_fn=end_with_parent
        )
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait(place: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it listens, which it does once its model is loaded.

    Raises:
        EngineFailed: it ended.
        TimeoutError: it does neither.
    """
    ends = time.monotonic() + PATIENCE
    while time.monotonic() < ends and process.poll() is None:
        with socket.socket(socket.AF_UNIX) as knock, suppress(OSError):
            knock.connect(place)
            return
        time.sleep(0.2)
    if process.poll() is None:
        raise TimeoutError(f"vLLM was not up after {PATIENCE:.0f} seconds")
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if "Error" in line]
    causes = [line for line in errors if not any(words in line for words in _NO_CAUSE)]
    said = (causes or errors or lines or ["nothing"])[-1]
    raise EngineFailed(f"vLLM did not start with the adapter; its log says: {said}")


def _ask_peft(adapter: Path, base: str, tokens: Sequence[int]) -> tuple[list[float], list[float], str]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    dtype = str(model.dtype).removeprefix("torch.")
    prompt = torch.tensor([tokens])

    def logprobs() -> list[float]:
        with torch.inference_mode():
            scores = model(input_ids=prompt).logits[0, :-1].float().log_softmax(-1)
        return [float(score) for score in scores.gather(1, prompt[0, 1:, None])[:, 0]]

    of_base = logprobs()
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    return of_base, logprobs(), dtype
