"""A mix is the exact weighted sum, and PEFT loads it as such."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import lorakit
import lorakit.errors
from tests.folders import factors, write_adapter
from tests.models import LINEARS, load, make_adapter, make_base

# name -> what PEFT is asked for; ranks, modules, scales and dtypes all differ
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEARS["llama"], "r": 4, "lora_alpha": 8},
    "rslora": {"target_modules": ["q_proj", "up_proj"], "r": 9, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "lm_head"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "lm_head": 11},
        "alpha_pattern": {"k_proj": 3},
    },
    "embedding": {"target_modules": ["embed_tokens", "v_proj"], "r": 3},
    "bf16": {"target_modules": ["q_proj", "down_proj"], "dtype": "bfloat16"},
    "fp16": {"target_modules": ["up_proj", "down_proj"], "dtype": "float16", "r": 1},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("mix") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    return {
        name: make_adapter(base.parent / name, base, seed=seed, **lora)
        for seed, (name, lora) in enumerate(ADAPTERS.items())
    }


def deltas_by_the_formula(folder: Path) -> dict[str, torch.Tensor]:
    """alpha/r · B A in float64, with PEFT asked for each module's scale."""
    tensors = load_file(folder / "adapter_model.safetensors")
    dense: dict[str, torch.Tensor] = {}
    scaling = scales(folder)
    for name, a in tensors.items():
        for part in (".lora_A.weight", ".lora_embedding_A"):
            if name.endswith(part):
                module = name.removesuffix(part).removeprefix("base_model.model.")
                product = tensors[name.replace("_A", "_B")].double() @ a.double()
                dense[module] = scaling[module] * (product.T if "embedding" in part else product)
    return dense


def scales(folder: Path) -> dict[str, float]:
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    layers = PeftModel.from_pretrained(load(Path(base)), folder).base_model.model.named_modules()
    return {name: layer.scaling["default"] for name, layer in layers if hasattr(layer, "lora_A")}


def weights_with(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    merged = PeftModel.from_pretrained(load(base, "float64"), adapter, autocast_adapter_dtype=False).merge_and_unload()
    return dict(merged.state_dict())


@pytest.mark.parametrize(
    "weights",
    [
        {"plain": 0.7, "rslora": 0.3},
        {"plain": 1.0, "patterns": -0.5, "rslora": 2.0},
        {"bf16": 0.4, "fp16": 0.6, "plain": 0.1},
        {"embedding": 0.5, "plain": 0.5},
        {"plain": 0.0, "rslora": 1.0},
        {"patterns": 3.0},
    ],
    ids=str,
)
def test_peft_loads_the_base_plus_the_dense_sum(
    base: Path, adapters: dict[str, Path], tmp_path: Path, weights: dict[str, float]
) -> None:
    mixed = lorakit.mix([(adapters[name], weight) for name, weight in weights.items()])
    mixed.save(tmp_path / "mixed")
    expected = {name: tensor.double() for name, tensor in load(base).state_dict().items()}
    touched = set()
    for name, weight in weights.items():
        for module, delta in deltas_by_the_formula(adapters[name]).items():
            expected[f"{module}.weight"] = expected[f"{module}.weight"] + weight * delta
            touched.add(module)
    assert set(mixed.modules) == touched
    found = weights_with(base, tmp_path / "mixed")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_the_report_says_how_the_adapters_lie_to_one_another(adapters: dict[str, Path]) -> None:
    names = ["plain", "rslora", "fp16"]
    report = lorakit.mix([(adapters[name], 1.0) for name in names]).report
    assert report is not None
    dense = [deltas_by_the_formula(adapters[name]) for name in names]

    def inner(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
        return float(sum((one[module] * two[module]).sum() for module in one.keys() & two.keys()))

    norms = [sqrt(inner(one, one)) for one in dense]
    assert report.norms == pytest.approx(norms)
    for i, row in enumerate(report.cosines):
        assert row == pytest.approx([inner(dense[i], other) / norms[i] / norms[j] for j, other in enumerate(dense)])
    assert (report.rank, report.truncation_error) == (4 + 9 + 1, 0.0)


def test_the_algebra_and_mix_are_the_same(adapters: dict[str, Path], tmp_path: Path) -> None:
    a, b = (lorakit.load_adapter(adapters[name]) for name in ("plain", "rslora"))
    (0.7 * a + 0.3 * b).save(tmp_path / "algebra")
    lorakit.mix([(a, 0.7), (b, 0.3)]).save(tmp_path / "mix")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("algebra", "mix"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_adapter_named_twice_adds_up(adapters: dict[str, Path]) -> None:
    mixed = lorakit.mix([(adapters["plain"], 0.7), (adapters["plain"], 0.2)])
    assert mixed.rank == 4
    module = "model.layers.0.mlp.up_proj"
    expected = 0.9 * deltas_by_the_formula(adapters["plain"])[module]
    torch.testing.assert_close(mixed.delta(module).dense(), expected)


def test_a_zero_adapter_has_no_cosine(adapters: dict[str, Path]) -> None:
    nothing = 0 * lorakit.load_adapter(adapters["plain"])
    report = lorakit.mix([(nothing, 1.0), (adapters["rslora"], 1.0)]).report
    assert report is not None
    assert report.cosines == ((None, None), (None, pytest.approx(1.0)))


def test_the_result_says_where_it_came_from(adapters: dict[str, Path], tmp_path: Path) -> None:
    lorakit.mix([(adapters["plain"], 0.7), (adapters["rslora"], 0.3)]).save(tmp_path / "mixed")
    record = json.loads((tmp_path / "mixed" / "lorakit.json").read_text())
    assert record["operation"] == "mix"
    assert [parent["weight"] for parent in record["parents"]] == [0.7, 0.3]
    assert record["report"]["rank"] == 13


@pytest.mark.parametrize(
    ("pairs", "options", "reason"),
    [
        ([], {}, "nothing to mix"),
        ([("a", 1.0)], {"method": "tie"}, "'tie'.*ties"),
        ([("a", 1.0)], {"density": 0.5}, "density"),
        ([("a", 1.0)], {"method": "ties", "density": 1.5}, "density"),
        ([("a", 1.0)], {"trained": "sum"}, "trained 'sum': it is 'refuse' or 'average'"),
    ],
)
def test_what_is_not_there_is_said(pairs: list[Any], options: dict[str, Any], reason: str) -> None:
    with pytest.raises(lorakit.errors.UsageError, match=reason):
        lorakit.mix(pairs, **options)


def test_adapters_of_different_shapes_do_not_mix(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", factors({"q_proj": (8, 8)}))
    two = write_adapter(tmp_path / "two", factors({"q_proj": (8, 9)}))
    with pytest.raises(lorakit.errors.WrongBase, match="'q_proj' is linear"):
        lorakit.mix([(one, 0.5), (two, 0.5)])


def test_different_bases_are_noted(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", base_model_name_or_path="org/one")
    two = write_adapter(tmp_path / "two", base_model_name_or_path="org/two")
    report = lorakit.mix([(one, 0.5), (two, 0.5)]).report
    assert report is not None
    assert report.notes == ("the adapters name different bases: org/one, org/two",)
