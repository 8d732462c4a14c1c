"""Adapters in llama.cpp itself: with what `--for llama.cpp` writes, it says what transformers and PEFT say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.convert.targets.llama_cpp import FILE
from tests.bucket import SERVICES
from tests.convert.readers.gguf_files import tiny, write_gguf
from tests.convert.test_targets import ODD_SCALES, Trained

PROMPT = tuple(range(3, 13))
ROWS = {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "use_rslora": True}


@pytest.fixture(autouse=True)
def _llama_cpp() -> None:
    pytest.importorskip("gguf", reason="pip install 'lorakit[gguf]'")
    if not (SERVICES / "xllamacpp").is_dir() and find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed (requirements/services.txt)")


def said_by_llama_cpp(*arguments: str | Path) -> dict[int, float]:
    model, *rest = map(str, arguments)
    command = [sys.executable, "-m", "tests.convert.llama_cpp_says", model, ",".join(map(str, PROMPT)), *rest]
    # behind what is installed otherwise: of SERVICES this alone is wanted
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(SERVICES)]))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return {int(token): logprob for token, logprob in json.loads(done.stdout.splitlines()[-1]).items()}


def logprobs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        said: torch.Tensor = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    return said


def ensure_same(said: dict[int, float], expected: torch.Tensor) -> None:
    """The likeliest tokens are the same ones, as likely."""
    assert said.keys() == set(expected.topk(len(said)).indices.tolist())
    for token, logprob in said.items():
        assert abs(float(expected[token]) - logprob) < 1e-3


@pytest.mark.parametrize(
    ("kind", "config"),
    [("llama", ODD_SCALES), ("qwen3", ODD_SCALES), ("llama", ROWS)],
    ids=["rslora and patterns", "qwen3", "embedding and head"],
)
def test_llama_cpp_says_what_peft_says(tmp_path: Path, kind: str, config: dict[str, Any]) -> None:
    trained = Trained(tmp_path, kind, **config)
    base = write_gguf(tiny(kind), tmp_path / "base.gguf")  # the same numbers, by their seed
    folder = trained.write("llama.cpp", tmp_path / "out")
    with trained.model.disable_adapter():
        ensure_same(said_by_llama_cpp(base), logprobs(trained.model))
    changed = said_by_llama_cpp(base, folder / FILE)
    ensure_same(changed, logprobs(trained.model))
    assert changed != said_by_llama_cpp(base)
