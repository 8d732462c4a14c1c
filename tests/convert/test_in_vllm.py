"""What was converted, in real vLLM: it answers as transformers does with the weights that were trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import lorakit
from tests.convert.readers.gguf_files import write_gguf
from tests.convert.readers.test_universal import made_universal
from tests.models import load
from tests.server.real import PROMPTS, ask, plain_vllm
from tests.trainers.by_hand import kept
from tests.trainers.written import Trainers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def wrapped(trainers: Trainers, folder: Path) -> Path:
    torch.manual_seed(4)
    model = load(trainers.base)
    state = {f"module._orig_mod.{name}": one + 0.1 * torch.randn_like(one) for name, one in model.state_dict().items()}
    torch.save({"state_dict": state, "step": 3}, folder / "step.pt")
    return folder / "step.pt"


def in_gguf(trainers: Trainers, folder: Path) -> Path:
    pytest.importorskip("gguf", reason="pip install 'lorakit[gguf]'")
    return write_gguf(load(trainers.base), folder / "model.gguf")


def universal(trainers: Trainers, folder: Path) -> Path:
    return made_universal(trainers.wrote("deepspeed_zero").folder / "zero3", folder, "global_step4")


def by_hand(name: str, model: str) -> Callable[[Trainers, Path], Path]:
    """A model that was written in another environment, and kept."""

    def extracted(_: Trainers, folder: Path) -> Path:
        return kept(f"{name}_whole", folder / "kept") / model

    return extracted


FORMATS: dict[str, Callable[[Trainers, Path], Path]] = {
    "torch": wrapped,
    "gguf": in_gguf,
    "torchtune": by_hand("torchtune", "own"),
    "litgpt": by_hand("litgpt", "llama"),
    "lightning": lambda trainers, _: next((trainers.wrote("lightning_fit").folder / "best").glob("*.ckpt")),
    "dcp": lambda trainers, _: trainers.wrote("two_ranks").folder / "fsdp" / "step-2",
    "dcp-safetensors": lambda trainers, _: trainers.wrote("two_ranks").folder / "sharded" / "huggingface" / "shards",
    "fsdp": lambda trainers, _: trainers.wrote("two_ranks").folder / "sharded" / "ranks" / "actor",
    "universal": universal,
    "deepspeed": lambda trainers, _: trainers.wrote("deepspeed_zero").folder / "zero3",
    "huggingface": lambda trainers, _: trainers.wrote("hf_trainer").folder / "whole" / "checkpoint-10",
}


def logprobs(model: Path, prompt: str) -> list[float]:
    """Of the six likeliest tokens in a row, by transformers."""
    running, found = load(model), []
    ids = AutoTokenizer.from_pretrained(model)(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        for _ in range(6):
            said = running(ids).logits[0, -1].log_softmax(-1)
            found.append(float(said.max()))
            ids = torch.cat([ids, said.argmax().reshape(1, 1)], 1)
    return found


@pytest.mark.parametrize("form", FORMATS)
def test_it_answers_as_transformers_does(trainers: Trainers, tmp_path: Path, form: str) -> None:
    report = lorakit.convert(FORMATS[form](trainers, tmp_path), tmp_path / "out", trainers.base, dtype="fp32")
    assert report.format == form.partition("-")[0]
    with plain_vllm(tmp_path / "out", tmp_path / "log", max_loras=1, max_rank=8) as client:
        for prompt in PROMPTS:
            found = ask(client, "base", prompt).logprobs
            assert found == pytest.approx(logprobs(tmp_path / "out", prompt), abs=2e-3)
