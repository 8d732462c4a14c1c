"""Merged model and residual adapter together answer as the unrounded sum does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lorakit.adapters.reading import load_adapter
from lorakit.convert.check import check_adapter
from lorakit.errors import Conflict, Refused, UsageError
from lorakit.merge import blocks
from lorakit.merge.base import read_base
from lorakit.merge.merge import merge
from tests.folders import leftovers
from tests.models import LINEARS, load, make_adapter, make_base


def make_small(adapter: Path, base: Path, ratio: float = 0.0003) -> Path:
    """Scale the B of each module so that ‖Δ‖ = ratio · ‖W‖."""
    file = adapter / "adapter_model.safetensors"
    tensors, weights = load_file(file), dict(load(base).state_dict())
    scale = load_adapter(adapter).config.alpha / load_adapter(adapter).config.rank
    for name in [name for name in tensors if ".lora_B." in name]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        delta = scale * tensors[name].double() @ tensors[name.replace("lora_B", "lora_A")].double()
        tensors[name] *= float(ratio * weights[f"{module}.weight"].double().norm() / delta.norm())
    save_file(tensors, file, metadata={"format": "pt"})
    return adapter


def errors_of_outputs(base: Path, adapters: list[tuple[Path, float]], out: Path, residual: Path) -> dict[str, Any]:
    """By module: the errors of outputs, with and without the residual, on inputs in the adapters' row space.

    The oracle is float64: base + Σ weight · scale · B A on each linear layer, from the files as PEFT reads them.
    """
    merged = load(out, "float32")
    with_residual = PeftModel.from_pretrained(load(out, "float32"), residual).eval()
    weights = dict(load(base).state_dict())
    tensors = [(load_file(folder / "adapter_model.safetensors"), load_adapter(folder), w) for folder, w in adapters]
    errors = {}
    for module in load_adapter(residual).modules:
        exact, rows = weights[f"{module}.weight"].double(), []
        transposed = not isinstance(merged.get_submodule(module), torch.nn.Linear)  # Conv1D
        exact = exact.T if transposed else exact
        for stored, adapter, weight in tensors:
            name = f"base_model.model.{module}.lora_A.weight"
            if name in stored:
                a, b = stored[name].double(), stored[name.replace("lora_A", "lora_B")].double()
                exact = exact + weight * adapter.config.alpha / adapter.config.rank * b @ a
                rows.append(a)
        torch.manual_seed(0)
        x = torch.randn(20, sum(len(a) for a in rows), dtype=torch.float64) @ torch.cat(rows)
        wanted = x @ exact.T
        plain = merged.get_submodule(module)
        bias = 0 if plain.bias is None else plain.bias.detach().double()
        with torch.inference_mode():
            alone = plain(x.float()).double() - bias
            both = with_residual.base_model.model.get_submodule(module)(x.float()).double() - bias
        errors[module] = (float((alone - wanted).norm()), float((both - wanted).norm()))
    return errors


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", dtype="bfloat16", max_shard_size="200KB")


@pytest.fixture(autouse=True)
def _several_blocks_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CPU_BLOCK", 4000)


def test_what_a_bf16_merge_loses_of_a_tiny_delta_is_in_the_residual(base: Path, tmp_path: Path) -> None:
    adapter = make_small(make_adapter(tmp_path / "adapter", base, target_modules=LINEARS["llama"]), base)
    out, residual = tmp_path / "out", tmp_path / "residual"
    report = merge(base, [adapter], out=out, device="cpu", residual=residual)
    errors = errors_of_outputs(base, [(adapter, 1.0)], out, residual)
    assert len(errors) == 14
    assert all(alone > 50 * both for alone, both in errors.values()), errors
    assert report.residual == {"path": str(residual), "weights": 14, "left_out": []}
    assert "load it beside the result" in report.notes[-1]
    assert "--residual" not in report.notes[0]


def test_the_residual_is_an_adapter_of_the_result(base: Path, tmp_path: Path) -> None:
    adapter = make_small(make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"]), base)
    out, residual = tmp_path / "out", tmp_path / "residual"
    merge(base, [adapter], out=out, device="cpu", residual=residual)
    assert sorted(path.name for path in residual.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "lorakit.json",
    ]  # fmt: skip
    config = json.loads((residual / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(out)
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (8, 8, "CAUSAL_LM")
    assert json.loads((residual / "lorakit.json").read_text())["operation"] == "residual"
    assert not leftovers(tmp_path)
    verdict = check_adapter(load_adapter(residual), read_base(out))
    assert not verdict.problems
    assert not verdict.repairs
    delta = load_adapter(residual).deltas["model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(delta.A @ delta.A.T, torch.eye(8), rtol=0, atol=1e-6)


def test_the_result_is_the_same_with_and_without(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=LINEARS["llama"])
    merge(base, [adapter], out=tmp_path / "out", device="cpu", residual=tmp_path / "residual")
    merge(base, [adapter], out=tmp_path / "alone", device="cpu")
    for file in sorted(base.glob("*.safetensors")):
        assert (tmp_path / "out" / file.name).read_bytes() == (tmp_path / "alone" / file.name).read_bytes()


def test_several_adapters_of_other_ranks_and_stochastic_rounding(base: Path, tmp_path: Path) -> None:
    one = make_small(make_adapter(tmp_path / "one", base, target_modules=LINEARS["llama"]), base)
    two = make_small(make_adapter(tmp_path / "two", base, seed=2, r=3, lora_alpha=7, target_modules=["up_proj"]), base)
    pairs = [(one, 0.7), (two, -0.5)]
    out, residual = tmp_path / "out", tmp_path / "residual"
    merge(base, pairs, out=out, device="cpu", rounding="stochastic", residual=residual)
    errors = errors_of_outputs(base, pairs, out, residual)
    assert all(alone > 50 * both for alone, both in errors.values()), errors
    assert load_adapter(residual).rank == 11


def test_transposed_layers(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2", "bfloat16")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=LINEARS["gpt2"], fan_in_fan_out=True)
    make_small(adapter, base)
    out, residual = tmp_path / "out", tmp_path / "residual"
    merge(base, [adapter], out=out, device="cpu", residual=residual)
    errors = errors_of_outputs(base, [(adapter, 1.0)], out, residual)
    assert len(errors) == 8
    assert all(alone > 50 * both for alone, both in errors.values()), errors


def test_what_has_no_residual_is_listed(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "embed_tokens"])
    report = merge(base, [adapter], out=tmp_path / "out", device="cpu", residual=tmp_path / "residual")
    assert report.residual is not None
    assert report.residual["weights"] == 2
    assert [line.split(":")[0] for line in report.residual["left_out"]] == ["model.embed_tokens.weight"]
    record = json.loads((tmp_path / "out" / "lorakit.json").read_text())
    assert record["report"]["residual"]["left_out"] == report.residual["left_out"]


def test_nothing_that_is_rounded_is_no_residual(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    with pytest.raises(UsageError, match="there is no residual to write"):
        merge(base, [adapter], out=tmp_path / "out", device="cpu", residual=tmp_path / "residual")
    merge(base, [adapter], out=tmp_path / "out", device="cpu", dtype="bf16", residual=tmp_path / "residual")


def test_neither_appears_when_the_merge_fails(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], lora_alpha=10_000_000)
    with pytest.raises(Refused, match="beyond the range of float16"):
        merge(base, [adapter], out=tmp_path / "out", device="cpu", dtype="fp16", residual=tmp_path / "residual")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_places_that_are_taken(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    with pytest.raises(Conflict, match="exists already"):
        merge(base, [adapter], out=tmp_path / "out", residual=adapter)
    with pytest.raises(UsageError, match="can't both be"):
        merge(base, [adapter], out=tmp_path / "out", residual=tmp_path / "out")
    with pytest.raises(UsageError, match="--resume"):
        merge(base, [adapter], out=tmp_path / "out", residual=tmp_path / "residual", resume=True)
