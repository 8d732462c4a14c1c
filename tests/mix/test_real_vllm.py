"""Every kind of result answers in real vLLM as the base with the dense delta added does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

import lorakit
from lorakit.adapters.adapter import Adapter

TOKENS = 4

RESULTS: dict[str, Callable[[Adapter, Adapter], Adapter]] = {
    "exact": lambda a, b: lorakit.mix([(a, 0.7), (b, 0.3)]),
    "difference": lambda a, b: a - 0.5 * b,
    "parts": lambda a, b: a.only("*.mlp.*") + b.without("q_proj") * {"*.self_attn.*": 0.8, "*": 0.4},
    "rank": lambda a, b: lorakit.mix([(a, 0.7), (b, 0.3)], rank=5),
    "energy": lambda a, b: lorakit.mix([(a, 0.7), (b, 0.3)], energy=0.9, own_ranks=True),
    "budget": lambda a, b: lorakit.mix([(a, 0.7), (b, 0.3)], budget=8000),
    "padded": lambda a, b: lorakit.mix([(a, 0.7), (b, 0.3)], budget=8000, own_ranks=False),
    "shrunk": lambda a, b: lorakit.shrink(a, rank=3),
    "ties": lambda a, b: lorakit.mix([(a, 1.0), (b, 1.0)], "ties", rank=8, density=0.5),
    "dare": lambda a, b: lorakit.mix([(a, 0.5), (b, 0.5)], "dare_linear", rank=8, density=0.8, seed=3),
    "slerp": lambda a, b: lorakit.mix([(a, 0.5), (b, 0.5)], "slerp"),
    "knots": lambda a, b: lorakit.mix([(a, 0.5), (b, 0.5)], "knots"),
    "tsv": lambda a, b: lorakit.mix([(a, 0.5), (b, 0.5)], "tsv"),
    "iso_c": lambda a, b: lorakit.mix([(a, 0.5), (b, 0.5)], "iso_c"),
}


def dense_deltas(folder: Path) -> dict[str, torch.Tensor]:
    """alpha/r · B A of what was written."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        module, _, _ = name.removeprefix("base_model.model.").partition(".lora_")
        if name.endswith(("lora_A.weight", "lora_embedding_A")):
            alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
            product = tensors[name.replace("_A", "_B")].double() @ a.double()
            product = product.T if "embedding" in name else product
            found[f"{module}.weight"] = alpha / config["rank_pattern"].get(module, config["r"]) * product
    return found


def other_method(folder: Path, base: Path, config: object) -> Path:
    torch.manual_seed(7)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def with_deltas(base: Path, deltas: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in deltas:
                parameter += deltas[name].float()
    return model


def greedy_logprobs(model: LlamaForCausalLM, prompt: torch.Tensor) -> list[float]:
    logprobs: list[float] = []
    for _ in range(TOKENS):
        with torch.no_grad():
            scores = model(prompt).logits[0, -1].log_softmax(-1)
        logprobs.append(float(scores.max()))
        prompt = torch.cat([prompt, scores.argmax().reshape(1, 1)], dim=1)
    return logprobs


def test_vllm_answers_as_the_dense_delta_and_so_does_peft(materials: tuple[Path, list[Path]], tmp_path: Path) -> None:
    from tests.server.real import PROMPTS, cold_answers, make_random_adapter

    base, adapters = materials
    a, b = (lorakit.load_adapter(folder) for folder in adapters[:2])
    folders = {name: make(a, b).save(tmp_path / name) for name, make in RESULTS.items()}
    targets = ["q_proj", "down_proj"]
    loha = other_method(tmp_path / "as-loha", base, LoHaConfig(r=3, alpha=6, target_modules=targets))
    lokr = other_method(tmp_path / "as-lokr", base, LoKrConfig(r=3, alpha=6, target_modules=targets))
    folders["loha"] = lorakit.mix([(loha, 0.8), (a, 0.2)]).save(tmp_path / "loha")
    folders["lokr"] = lorakit.mix([(lokr, 0.8), (a, 0.2)], rank=16).save(tmp_path / "lokr")
    rows = make_random_adapter(tmp_path / "as-rows", base, 9, target_modules=["embed_tokens", "v_proj"])
    folders["embedding"] = lorakit.mix([(rows, 0.8), (a, 0.2)]).save(tmp_path / "embedding")
    answers = cold_answers(base, folders, tmp_path / "vllm.log", max_rank=32)
    prompt = AutoTokenizer.from_pretrained(base)(PROMPTS[0], return_tensors="pt").input_ids
    for name, folder in folders.items():
        model = with_deltas(base, dense_deltas(folder))
        logprobs = greedy_logprobs(model, prompt)
        answer = answers[name, PROMPTS[0]]
        # as numbers: vLLM joins bytes of one letter, so the tokens' texts are not each one's own
        assert logprobs == pytest.approx(answer.logprobs[:TOKENS], abs=2e-3), name
        by_peft = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
        with torch.no_grad():
            torch.testing.assert_close(by_peft(prompt).logits, model(prompt).logits, rtol=1e-4, atol=1e-3, msg=name)
