"""A mix is the exact weighted sum, and PEFT loads it as such."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import lorakit
import lorakit.errors
from tests.folders import factors, linear_modules, write_adapter, write_base
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


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_numbers_that_are_none_are_refused(tmp_path: Path, bad: str) -> None:
    tensors = factors({"q_proj": (8, 8)})
    broken = write_adapter(tmp_path / "broken", {name: value * float(bad) for name, value in tensors.items()})
    whole = write_adapter(tmp_path / "whole", tensors)
    for options in ({}, {"rank": 1}, {"method": "ties"}, {"budget": 100}):
        with pytest.raises(lorakit.errors.InvalidFile, match=r"lora_[AB]\.weight' holds NaN or infinity"):
            lorakit.mix([(broken, 1.0), (whole, 1.0)], **options).save(tmp_path / "out")
    a = lorakit.load_adapter(whole)
    for refused in (lambda: float(bad) * a, lambda: a * {"*": float(bad)}, lambda: lorakit.mix([(whole, float(bad))])):
        with pytest.raises(lorakit.errors.UsageError, match="no finite number"):
            refused()
    with pytest.raises(lorakit.errors.UnsupportedAdapter, match="too large for float32"):
        lorakit.mix([(whole, 1e60)]).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_factors_that_are_no_floats_are_refused(tmp_path: Path) -> None:
    tensors = {name: value.astype("int8") for name, value in factors({"q_proj": (8, 8)}).items()}
    with pytest.raises(lorakit.errors.InvalidFile, match="is I8: save it in bf16, fp16 or fp32"):
        lorakit.mix([write_adapter(tmp_path / "whole", tensors)]).save(tmp_path / "out")


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    adapter = lorakit.load_adapter(write_adapter(tmp_path / "a"))
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(lorakit.errors.NotFound, match=r"adapter_model\.safetensors' is gone"):
        (2 * adapter).save(tmp_path / "out")


def test_pairs_may_be_any_iterable_of_pairs_or_adapters(tmp_path: Path) -> None:
    one, two = write_adapter(tmp_path / "one"), write_adapter(tmp_path / "two")
    mixed = lorakit.mix(zip([one, str(two)], np.float32([0.5, 0.25]), strict=True), rank=np.int64(3))
    record = json.loads((mixed.save(tmp_path / "out") / "lorakit.json").read_text())
    assert [parent["weight"] for parent in record["parents"]] == [0.5, 0.25]
    assert lorakit.mix([one, lorakit.load_adapter(two)]).report.weights == (1.0, 1.0)  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["ties", "linear", "slerp"])
def test_an_adapter_named_twice_is_one_whatever_the_method(tmp_path: Path, method: str) -> None:
    one, two = write_adapter(tmp_path / "one"), write_adapter(tmp_path / "two", factors(linear_modules(1), seed=2))
    twice = lorakit.mix([(one, 0.5), (two, 0.7), (str(one), 0.25)], method)
    once = lorakit.mix([(one, 0.75), (two, 0.7)], method)
    for module in once.modules:
        assert torch.equal(twice.delta(module).dense(), once.delta(module).dense())


def test_names_of_wrappers_are_no_part_of_a_modules_name(tmp_path: Path) -> None:
    tensors = factors({"model.layers.0.mlp.up_proj": (8, 8)})
    wrapped = {
        name.replace("base_model.model.", "base_model.model._orig_mod.module."): value
        for name, value in tensors.items()
    }
    one, two = write_adapter(tmp_path / "one", tensors), write_adapter(tmp_path / "two", wrapped)
    assert lorakit.mix([one, two]).modules == ("model.layers.0.mlp.up_proj",)


def test_modules_of_two_names_are_one_where_the_base_says_which(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    long = write_adapter(tmp_path / "long", factors({"model.layers.0.mlp.up_proj": (12, 8)}))
    short = write_adapter(tmp_path / "short", factors({"layers.0.mlp.up_proj": (12, 8)}, seed=2))
    with pytest.raises(lorakit.errors.WrongBase, match=r"begin with 'model\.', those of .* with ''.*--base"):
        lorakit.mix([long, short])
    with pytest.raises(lorakit.errors.WrongBase, match="--base"):
        (lorakit.load_adapter(long) + lorakit.load_adapter(short)).save(tmp_path / "sum")
    assert lorakit.mix([long, short], base=base).modules == ("model.layers.0.mlp.up_proj",)
    # the whole adapter is renamed, though one module alone is in both
    more = write_adapter(tmp_path / "more", factors({"layers.1.mlp.up_proj": (12, 8)}, seed=3))
    assert set(lorakit.mix([short, more, long], base=base).modules) == {
        "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj",
    }  # fmt: skip


def test_terms_that_are_large_in_one_factor_and_small_in_the_other_are_kept(tmp_path: Path) -> None:
    tensors = factors({"q_proj": (8, 8)}), factors({"q_proj": (8, 8)}, seed=2)
    folders = []
    for number, (named, large) in enumerate(zip(tensors, ("lora_A", "lora_B"), strict=True)):
        scaled = {name: value * np.float32(1e7 if large in name else 1e-7) for name, value in named.items()}
        folders.append(write_adapter(tmp_path / str(number), scaled))
    exact, cut = lorakit.mix(folders), lorakit.mix(folders, rank=4, method="peft:svd")
    torch.testing.assert_close(cut.delta("q_proj").dense(), exact.delta("q_proj").dense(), rtol=1e-5, atol=1e-5)
    assert lorakit.shrink(lorakit.mix(folders, "peft:cat"), rank=3).delta("q_proj").norm() > 1


def test_parts_keep_the_table_of_a_resized_vocabulary(tmp_path: Path) -> None:
    name = "base_model.model.lm_head.weight"
    table = {name: factors({"x": (16, 8)})["base_model.model.x.lora_B.weight"]}
    adapter = lorakit.load_adapter(write_adapter(tmp_path / "a", factors(linear_modules()) | table))
    assert [stored.name for stored in adapter.only("q_proj").others] == [name]


@pytest.mark.parametrize("pairs", [{"a": 0.5}, "folder", [1]])
def test_what_is_no_list_of_adapters_is_said(pairs: Any) -> None:
    with pytest.raises(lorakit.errors.UsageError, match=r"a list of \(adapter, weight\)"):
        lorakit.mix(pairs)


@pytest.mark.parametrize("weight", [None, "much", {"*": "much"}])
def test_a_weight_that_is_none_is_said(tmp_path: Path, weight: Any) -> None:
    with pytest.raises(lorakit.errors.UsageError, match="neither a number nor patterns"):
        lorakit.mix([(write_adapter(tmp_path / "a"), weight)])


def test_what_a_stage_lost_stays_known(tmp_path: Path) -> None:
    one, two = write_adapter(tmp_path / "one", factors(linear_modules(), 5), rank=5), write_adapter(tmp_path / "two")
    small = lorakit.shrink(one, rank=1)
    record = json.loads(((0.5 * small + lorakit.load_adapter(two)).save(tmp_path / "out") / "lorakit.json").read_text())
    assert "truncation_error" not in record
    lost = small.report.truncation_error  # type: ignore[union-attr]
    assert record["parents"][0]["truncation_error"] == pytest.approx(lost) != 0


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_embedding_stays_tied(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "tied-llama")
    lora = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True, "modules_to_save": None}
    one, two = (make_tied(tmp_path / str(seed), base, seed, lora) for seed in (1, 2))
    for name, mixed in (
        ("sum", lorakit.mix([(one, 0.5), (two, 0.25)])), ("small", lorakit.mix([(one, 0.5), (two, 0.25)], rank=3)),
    ):  # fmt: skip
        folder = mixed.save(tmp_path / name)
        assert json.loads((folder / "adapter_config.json").read_text())["ensure_weight_tying"] is True
        lorakit.merge(base, folder, out=tmp_path / f"{name}-merged")
        assert json.loads((tmp_path / f"{name}-merged" / "config.json").read_text())["tie_word_embeddings"] is True
    loose = make_adapter(tmp_path / "loose", base, target_modules=["embed_tokens"])
    folder = lorakit.mix([one, loose]).save(tmp_path / "untied")
    assert not json.loads((folder / "adapter_config.json").read_text()).get("ensure_weight_tying")


def make_tied(folder: Path, base: Path, seed: int, lora: dict[str, Any]) -> Path:
    """PEFT ties the head's factors to the embedding's, and saves both."""
    make_adapter(folder, base, seed=seed, **lora)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    a, b = (tensors[f"base_model.model.model.embed_tokens.lora_embedding_{part}"] for part in "AB")
    tensors["base_model.model.lm_head.lora_A.weight"] = b.T.contiguous()
    tensors["base_model.model.lm_head.lora_B.weight"] = a.T.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


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
