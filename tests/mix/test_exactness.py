"""Whatever adapters are mixed, with whatever weights: the float64 formula's result, or its best approximation."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lorakit

Dense = dict[str, np.ndarray[Any, Any]]

LINEARS = {
    "model.layers.0.self_attn.q_proj": (8, 8), "model.layers.0.mlp.up_proj": (12, 8),
    "model.layers.1.mlp.down_proj": (8, 12), "lm_head": (16, 8),
}  # fmt: skip
EMBEDDING = "model.embed_tokens"  # (16, 8): as PEFT has it, A (r, 16) and B (8, r)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

weights_of_one = st.floats(-3, 3).map(lambda value: round(value, 3))
weights = weights_of_one | st.builds(lambda first, rest: {"*.mlp.*": first, "*": rest}, weights_of_one, weights_of_one)


@dataclass(frozen=True)
class Given:
    """An adapter to be written: by module its rank and alpha, where they are not the config's."""

    ranks: dict[str, int]
    alphas: dict[str, float]
    use_rslora: bool
    lora_bias: bool
    dtype: torch.dtype
    seed: int


@st.composite
def adapters(draw: st.DrawFn) -> Given:
    modules = draw(st.lists(st.sampled_from([*LINEARS, EMBEDDING]), min_size=1, unique=True))
    modules = sorted({*modules, draw(st.sampled_from(["model.layers.0.mlp.up_proj"]))})
    return Given(
        {module: draw(st.integers(1, 5)) for module in modules},
        {module: draw(st.sampled_from([0.5, 1, 3, 16])) for module in modules},
        draw(st.booleans()),
        EMBEDDING not in modules and draw(st.booleans()),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 99)),
    )


def write(folder: Path, adapter: Given) -> tuple[Path, Dense, Dense]:
    """The folder, and what it adds to each weight and each bias, in float64."""
    torch.manual_seed(adapter.seed)
    tensors: dict[str, torch.Tensor] = {}
    dense: Dense = {}
    biases: Dense = {}
    for module, rank in adapter.ranks.items():
        out, into = (8, 16) if module == EMBEDDING else LINEARS[module]
        a, b = (torch.randn(shape).to(adapter.dtype) for shape in ((rank, into), (out, rank)))
        scale = adapter.alphas[module] / (sqrt(rank) if adapter.use_rslora else rank)
        product = scale * (b.double() @ a.double()).numpy()
        prefix = f"base_model.model.{module}.lora_"
        if module == EMBEDDING:
            tensors |= {f"{prefix}embedding_A": a, f"{prefix}embedding_B": b}
            dense[module] = product.T
            continue
        tensors |= {f"{prefix}A.weight": a, f"{prefix}B.weight": b}
        dense[module] = product
        if adapter.lora_bias:
            bias = torch.randn(out).to(adapter.dtype)
            tensors[f"{prefix}B.bias"] = bias
            biases[module] = scale * bias.double().numpy()
    config = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 16, "rank_pattern": adapter.ranks, "alpha_pattern": adapter.alphas,
        "use_rslora": adapter.use_rslora, "lora_bias": adapter.lora_bias, "target_modules": list(adapter.ranks),
        "bias": "none", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder, dense, biases


def weight_for(weight: float | dict[str, float], module: str) -> float:
    if isinstance(weight, float):
        return weight
    return next(value for pattern, value in weight.items() if fnmatchcase(module, pattern))


def added_up(parts: list[tuple[Dense, float | dict[str, float]]]) -> Dense:
    total: Dense = {}
    for dense, weight in parts:
        for module, delta in dense.items():
            total[module] = total.get(module, 0.0) + weight_for(weight, module) * delta
    return total


def read_back(folder: Path) -> tuple[Dense, Dense]:
    """By PEFT's rule: alpha/r of the module's own pattern, or the config's."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {
        name: tensor.double().numpy() for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    dense: Dense = {}
    biases: Dense = {}
    for name, tensor in tensors.items():
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        rank = config["rank_pattern"].get(module, config["r"])
        scale = config["alpha_pattern"].get(module, config["lora_alpha"]) / rank
        if name.endswith((".lora_A.weight", ".lora_embedding_A")):
            assert tensor.shape[0] == rank
            product = scale * (tensors[name.replace("_A", "_B")] @ tensor)
            dense[module] = product.T if "embedding" in name else product
        elif name.endswith(".lora_B.bias"):
            biases[module] = scale * tensor
    return dense, biases


def best(dense: np.ndarray[Any, Any], rank: int) -> np.ndarray[Any, Any]:
    u, s, vh = np.linalg.svd(dense, full_matrices=False)
    kept: np.ndarray[Any, Any] = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return kept


def assert_same(mine: Dense, exact: Dense, scale: float) -> None:
    for module, delta in exact.items():
        np.testing.assert_allclose(mine[module], delta, rtol=1e-5, atol=2e-6 * scale, err_msg=module)


@settings(max_examples=60)
@given(st.lists(st.tuples(adapters(), weights), min_size=1, max_size=3), st.sampled_from(["exact", 1, 3, 6]))
def test_a_mix_is_the_formula_or_its_best_approximation(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[Given, Any]], rank: str | int
) -> None:
    folder = tmp_path_factory.mktemp("exact")
    written = [write(folder / str(number), adapter) for number, (adapter, _) in enumerate(pairs)]
    given_weights = [weight for _, weight in pairs]
    patterns = [weight for weight in given_weights if isinstance(weight, dict)]
    reached = [any("mlp" in module for module in dense) for _, dense, _ in written]
    assert all(reached) or not patterns  # every adapter has an mlp, so that every pattern means something
    exact = added_up([(dense, weight) for (_, dense, _), weight in zip(written, given_weights, strict=True)])
    biases = added_up([(bias, weight) for (_, _, bias), weight in zip(written, given_weights, strict=True)])
    sizes = [float(np.abs(delta).max()) for _, dense, _ in written for delta in dense.values()]
    scale = 10 * max(sizes)
    mixed = lorakit.mix(zip([path for path, _, _ in written], given_weights, strict=True), rank=rank)
    if biases and EMBEDDING in exact:  # PEFT has no place for both
        with pytest.raises(lorakit.LorakitError, match="no lora_bias for embeddings"):
            mixed.save(folder / "out")
        shutil.rmtree(folder)
        return
    found, found_biases = read_back(mixed.save(folder / "out"))
    assert found.keys() == exact.keys()
    wanted = exact if isinstance(rank, str) else {module: best(delta, rank) for module, delta in exact.items()}
    if isinstance(rank, str):
        assert_same(found, wanted, scale)
    else:  # where singular values are near each other there are several best ones: their errors are the same
        for module, delta in exact.items():
            optimum = np.linalg.norm(delta - wanted[module])
            assert np.linalg.norm(delta - found[module]) == pytest.approx(optimum, rel=1e-5, abs=1e-5 * scale)
    assert_same(found_biases, biases, scale)
    assert not any(np.any(found_biases[module]) for module in found_biases.keys() - biases.keys())
    shutil.rmtree(folder)


@settings(max_examples=30)
@given(st.lists(adapters(), min_size=3, max_size=3), st.lists(weights_of_one, min_size=3, max_size=3))
def test_the_algebra_is_that_of_the_formulas(
    tmp_path_factory: pytest.TempPathFactory, three: list[Given], factors: list[float]
) -> None:
    folder = tmp_path_factory.mktemp("algebra")
    written = [write(folder / str(number), adapter) for number, adapter in enumerate(three)]
    a, b, c = (lorakit.load_adapter(path) for path, _, _ in written)
    first, second, third = factors
    value = first * a + (b * second - c) / 2 - third * b.only("up_proj") + c * {"*.mlp.*": 0.5, "*": 0.25}
    dense = [part for _, part, _ in written]
    half = {"*.mlp.*": 0.5, "*": 0.25}
    total = added_up([(dense[0], first), (dense[1], second / 2), (dense[2], -0.5), (dense[2], half)])
    up = "model.layers.0.mlp.up_proj"
    total[up] = total[up] - third * dense[1][up]
    assert set(value.modules) == total.keys()
    for module, delta in total.items():
        found = value.delta(module).dense().numpy()
        np.testing.assert_allclose(found, delta, rtol=1e-9, atol=1e-9 * max(1, float(np.abs(delta).max())))
    shutil.rmtree(folder)
