"""A merge onto a quantised base, and one that is quantised as it is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from lorakit.errors import Refused, UsageError
from lorakit.merge.merge import merge
from tests.folders import factors, write_adapter
from tests.merge.quantised.folders import DATA, FOLDERS, expected, weights_in
from tests.models import LINEARS, assert_same_bits, bits, load, make_adapter

KINDS = ["fp8", "int8", "w4a16"]


def adapter_for(folder: Path, base: Path) -> Path:
    modules = {weight.name.removesuffix(".weight"): weight.shape for weight in weights_in(base).values()}
    return write_adapter(folder, factors(modules, rank=2), rank=2)


def summed(adapter: Path, name: str, weight: torch.Tensor, share: float = 1.0) -> torch.Tensor:
    """In float64."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    a, b = (tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"].double() for side in "AB")
    return weight.double() + share * config["lora_alpha"] / config["r"] * (b @ a)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_merge_onto_dequantised_values_is_one_rounding_of_them(tmp_path: Path, name: str) -> None:
    base = DATA / name
    adapter = adapter_for(tmp_path / "adapter", base)
    merge(base, [adapter], out=tmp_path / "out", device="cpu", onto="dequantised")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for weight in weights_in(base).values():
        exact = summed(adapter, weight.name, expected(name)[weight.name].float())
        mine = merged[weight.name]
        assert (mine != exact.to(mine.dtype)).float().mean() <= 1e-3
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        not {part.name for one in weights_in(base).values() for part in one.parts.values()}
        - {weight.name for weight in weights_in(base).values()}
        & merged.keys()
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_a_merge_in_the_same_format_changes_what_it_has_to_alone(tmp_path: Path, name: str) -> None:
    base = DATA / name
    adapter = adapter_for(tmp_path / "adapter", base)
    share = 0.001  # of factors that are large beside these weights
    report = merge(base, [(adapter, share)], out=tmp_path / "out", device="cpu", onto="same")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {name: (one.dtype, one.shape) for name, one in before.items()} == {
        name: (one.dtype, one.shape) for name, one in after.items()
    }
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    for weight in weights_in(tmp_path / "out").values():
        before_it = expected(name)[weight.name].double()
        exact = summed(adapter, weight.name, before_it, share)
        assert (weight.read().double() - exact).norm() < 0.1 * exact.norm() + (exact - before_it).norm()
        assert report.survivals[weight.name].ratio is not None


def test_a_quantised_base_asks_what_to_merge_onto(tmp_path: Path) -> None:
    base = DATA / "bnb-nf4"
    adapter = adapter_for(tmp_path / "adapter", base)
    with pytest.raises(Refused, match=r"is quantised \(by bitsandbytes\): name the original model with --base, or say"):
        merge(base, [adapter], out=tmp_path / "out")
    with pytest.raises(Refused, match="name the original, in 16 bit, with --base"):
        merge(base, [adapter], out=tmp_path / "out", onto="original")
    with pytest.raises(UsageError, match="no way to merge onto 'there'"):
        merge(base, [adapter], out=tmp_path / "out", onto="there")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, an adapter, and their merge."""
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder / "base")
    adapter = make_adapter(folder / "adapter", folder / "base", target_modules=LINEARS["llama"])
    merge(folder / "base", [adapter], out=folder / "merged", device="cpu")
    return folder / "base", adapter, folder / "merged"


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.arange(20)[None]).logits.float()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_that_is_quantised_is_the_merge_rounded_once_more(
    tmp_path: Path, plain: tuple[Path, Path, Path], kind: str
) -> None:
    base, adapter, merged = plain
    merge(base, [adapter], out=tmp_path / "out", device="cpu", quantize=kind)
    exact = merge(base, [adapter], out=tmp_path / "exact", device="cpu", dtype="fp32").out
    assert exact is not None
    wanted = load_file(exact / "model.safetensors")
    step = {"fp8": 2**-4, "int8": 2**-7, "w4a16": 2**-3}[kind]
    for name, weight in weights_in(tmp_path / "out").items():
        groups = wanted[name].reshape(weight.shape[0], -1, 128 if kind == "w4a16" else weight.shape[1])
        largest = groups.abs().amax(-1, keepdim=True)
        error = (weight.read().reshape(groups.shape) - groups).abs()
        # half a step, the largest code's clamping, and bf16: of the scale, and of the product when it is read
        assert bool((error <= step * 1.3 * largest).all())
    assert weights_in(tmp_path / "out").keys() == {
        name for name in wanted if name.endswith("proj.weight")
    }  # fmt: skip
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(quantised) - logits(load(merged))).abs().max() < {"fp8": 1.0, "int8": 1.0, "w4a16": 3.0}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_what_lorakit_quantised_it_can_merge_onto_again(
    tmp_path: Path, plain: tuple[Path, Path, Path], kind: str
) -> None:
    base, adapter, _ = plain
    merge(base, [(adapter, 0.0)], out=tmp_path / "quantised", device="cpu", quantize=kind)
    (tmp_path / "quantised" / "recipe.yaml").write_text("of the quantised one")
    merge(tmp_path / "quantised", [adapter], out=tmp_path / "out", device="cpu", onto="dequantised")
    merged = bits(tmp_path / "out")
    for name, weight in weights_in(tmp_path / "quantised").items():
        exact = summed(adapter, name, weight.read())
        assert (merged[name] != exact.to(merged[name].dtype)).float().mean() <= 1e-3
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_layers_that_the_adapter_leaves_alone_keep_their_bytes(tmp_path: Path, plain: tuple[Path, Path, Path]) -> None:
    base, _, _ = plain
    one = make_adapter(tmp_path / "one", base, target_modules=["q_proj"])
    merge(base, [(one, 0.0)], out=tmp_path / "quantised", device="cpu", quantize="fp8")
    merge(tmp_path / "quantised", [one], out=tmp_path / "out", device="cpu", onto="same")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("quantised", "out"))
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert {name.rpartition(".weight")[0].rpartition(".")[2] for name in changed} == {"q_proj"}


def test_a_plain_base_has_nothing_to_dequantise(tmp_path: Path, plain: tuple[Path, Path, Path]) -> None:
    base, adapter, merged = plain
    with pytest.raises(Refused, match="isn't quantised"):
        merge(base, [adapter], out=tmp_path / "out", onto="dequantised")
    for onto in ("original", "same"):
        merge(base, [adapter], out=tmp_path / onto, device="cpu", onto=onto)
        assert_same_bits(bits(tmp_path / onto), bits(merged))
        shutil.rmtree(tmp_path / onto)
