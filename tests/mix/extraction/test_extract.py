"""A fine-tune becomes an adapter that PEFT puts onto the base again, and what it loses is what is said."""

from __future__ import annotations

import json
import warnings
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import lorakit
from lorakit.errors import Conflict, InvalidFile, Refused, UsageError
from tests.folders import base_tensors, leftovers, stored, write_base
from tests.models import LINEARS, load, make_adapter, make_base, merged_by_peft

RANK = 6
IDS = torch.arange(3, 43)[None]


def fine_tuned(folder: Path, base: Path, *, rank: int = RANK, share: float = 0.05, others: bool = False) -> Path:
    """The base with a change of this rank in every matrix; with `others`, in every vector, too."""
    draw = torch.Generator().manual_seed(3)
    model = load(base)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                left, right = (torch.randn(side, rank, generator=draw) for side in parameter.shape)
                delta = left @ right.T
                parameter.copy_(parameter.float() + delta * (share * parameter.float().norm() / delta.norm()))
            elif others:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits.double()
    return found


def with_adapter(base: Path, adapter: Path, dtype: str = "auto") -> Any:
    with warnings.catch_warnings():
        # GPT-2 has both kinds of layers, and an adapter one word for them
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True but the target module is")
        return PeftModel.from_pretrained(load(base, dtype), adapter)


def distance(adapter: Path, tuned: Path, base: Path) -> float:
    """How far the logits are from the tuned model's, in units of how far the base's are."""
    wanted, before = logits(load(tuned, "float32")), logits(load(base, "float32"))
    return float((logits(with_adapter(base, adapter, "float32")) - wanted).norm() / (before - wanted).norm())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("extract")
    found = {}
    for family, dtype in [(family, "float32") for family in LINEARS] + [("llama", "bfloat16")]:
        name = family if dtype == "float32" else f"{family}-{dtype}"
        base = make_base(folder / f"{name}-base", family, dtype)
        found[name] = (fine_tuned(folder / f"{name}-tuned", base, others=True), base)
    return found


@pytest.mark.parametrize("family", list(LINEARS))
def test_peft_gives_the_tuned_models_logits_where_the_change_is_of_that_rank(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, family: str
) -> None:
    tuned, base = models[family]
    report = lorakit.extract(tuned, base, tmp_path / "out", rank=16, save_rest=True)
    assert distance(tmp_path / "out", tuned, base) < 2e-5
    assert {module.rank for module in report.modules} == {RANK}
    assert report.relative_error < 1e-6
    assert all(change.saved for change in report.uncarried)


@pytest.mark.parametrize("family", list(LINEARS))
def test_merging_it_gives_the_tuned_weights_back(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, family: str
) -> None:
    tuned, base = models[family]
    lorakit.extract(tuned, base, tmp_path / "out", rank=RANK, save_rest=True)
    lorakit.merge(base, tmp_path / "out", out=tmp_path / "merged")
    expected, found = stored(tuned), stored(tmp_path / "merged")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, atol=2e-6, err_msg=name)


def test_a_full_svd_loses_no_less(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tuned = fine_tuned(tmp_path / "tuned", base, rank=80)
    report = lorakit.extract(tuned, base, tmp_path / "out", rank=20)
    before, after = load(base).state_dict(), load(tuned).state_dict()
    lost = whole = 0.0
    for module in report.modules:
        delta = after[f"{module.module}.weight"].double() - before[f"{module.module}.weight"].double()
        squares = torch.linalg.svdvals(delta).square()
        optimum = sqrt(float(squares[20:].sum() / squares.sum()))
        assert optimum * (1 - 1e-5) <= module.relative_error <= optimum * 1.005
        b, a = factors(tmp_path / "out", module.module, module.kind)
        product = (b @ a).T if module.kind == "embedding" else b @ a
        assert module.relative_error == pytest.approx(float((delta - product).norm() / delta.norm()), rel=1e-4)
        assert module.norm == pytest.approx(float(delta.norm()), rel=1e-6)
        assert module.energy == pytest.approx(1 - module.relative_error**2)
        lost += float((delta - product).square().sum())
        whole += float(delta.square().sum())
    assert report.relative_error == pytest.approx(sqrt(lost / whole), rel=1e-4)


def factors(folder: Path, module: str, kind: str = "linear") -> tuple[torch.Tensor, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    names = ("lora_embedding_B", "lora_embedding_A") if kind == "embedding" else ("lora_B.weight", "lora_A.weight")
    b, a = (tensors[f"base_model.model.{module}.{name}"].double() for name in names)
    return b, a


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_an_energy_is_kept_in_every_module_by_the_smallest_rank_that_does(tmp_path: Path, energy: float) -> None:
    base = make_base(tmp_path / "base")
    tuned = fine_tuned(tmp_path / "tuned", base, rank=40)
    report = lorakit.extract(tuned, base, tmp_path / "out", energy=energy)
    before, after = load(base).state_dict(), load(tuned).state_dict()
    for module in report.modules:
        name = f"{module.module}.weight"
        squares = torch.linalg.svdvals(after[name].double() - before[name].double()).square()
        smallest = int((squares.cumsum(0) / squares.sum() < energy).sum()) + 1
        assert smallest <= module.rank <= smallest + 1
        assert module.energy >= energy


def test_the_noise_of_bf16_is_not_chased(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    tuned, base = models["llama-bfloat16"]
    report = lorakit.extract(tuned, base, tmp_path / "out", energy=0.99999, save_rest=True)
    assert {module.rank for module in report.modules} == {RANK}
    assert {module.stop for module in report.modules} == {"noise"}
    assert any("rounding noise" in note for note in report.notes)
    assert lorakit.extract(tuned, base, rank=64, dry_run=True).rank == RANK


def test_a_bf16_model_that_was_stored_in_fp32_has_the_same_noise(
    models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    tuned, base = models["llama-bfloat16"]
    load(tuned, "float32").save_pretrained(tmp_path / "wide")
    assert lorakit.extract(tmp_path / "wide", base, rank=64, dry_run=True).rank == RANK


def test_a_budget_is_spent_where_it_keeps_most(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tuned = fine_tuned(tmp_path / "tuned", base, rank=12)
    budget = 20_000
    report = lorakit.extract(tuned, base, tmp_path / "out", budget=budget, exclude=["embed_tokens", "lm_head"])
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == report.parameters
    assert budget - 500 < report.parameters <= budget
    even = lorakit.extract(tuned, base, rank=5, dry_run=True, exclude=["embed_tokens", "lm_head"])
    assert even.parameters > 0.9 * budget
    assert report.relative_error < 0.97 * even.relative_error
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert len({*config["rank_pattern"].values()}) > 1
    assert config["alpha_pattern"] == config["rank_pattern"]
    for module in report.modules:
        if module.rank:
            b, a = factors(tmp_path / "out", module.module)
            delta = load(tuned).state_dict()[f"{module.module}.weight"].double()
            delta -= load(base).state_dict()[f"{module.module}.weight"].double()
            assert module.relative_error == pytest.approx(float((delta - b @ a).norm() / delta.norm()), rel=1e-4)
    layers = with_adapter(base, tmp_path / "out").base_model.model.modules()
    assert {layer.scaling["default"] for layer in layers if hasattr(layer, "lora_A")} == {1.0}


def test_what_cannot_be_carried_is_listed_and_counts_as_error(
    models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    tuned, base = models["qwen2"]
    report = lorakit.extract(tuned, base, tmp_path / "out", rank=16)
    before, after = load(base).state_dict(), load(tuned).state_dict()
    vectors = {name for name, tensor in before.items() if tensor.dim() == 1}
    assert {change.tensor for change in report.uncarried} == vectors
    for change in report.uncarried:
        delta, weight = after[change.tensor].double() - before[change.tensor].double(), before[change.tensor].double()
        assert change.norm == pytest.approx(float(delta.norm()))
        if weight.norm():
            assert change.relative_change == pytest.approx(float(delta.norm() / weight.norm()))
        assert not change.saved
    lost = sum(float((after[name].double() - before[name].double()).square().sum()) for name in vectors)
    whole = sum(float((after[name].double() - before[name].double()).square().sum()) for name in before)
    assert report.relative_error == pytest.approx(sqrt(lost / whole), rel=1e-3)
    assert any("--save-rest" in note for note in report.notes)


def test_a_resized_vocabulary_is_kept_whole_on_request(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    model = load(fine_tuned(tmp_path / "small", base))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(104, mean_resizing=False)
    model.save_pretrained(tmp_path / "tuned")
    report = lorakit.extract(tmp_path / "tuned", base, tmp_path / "out", rank=16, save_rest=True)
    assert {change.tensor for change in report.uncarried} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert report.relative_error is not None
    without = lorakit.extract(tmp_path / "tuned", base, rank=16, dry_run=True)
    assert without.relative_error is None  # what it lacks then has no norm, and may be all there is
    larger = load(base)
    larger.resize_token_embeddings(104, mean_resizing=False)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(larger, tmp_path / "out")), logits(model), atol=1e-5, rtol=1e-5
    )


def test_modules_are_saved_whole_and_those_that_hold_others_are_not(tmp_path: Path) -> None:
    draw = np.random.default_rng(5)
    more = {
        "model.layers.0.mlp.experts.gate_up_proj": draw.standard_normal((2, 8, 6)).astype("float32"),
        "model.layers.0.mlp.experts.down_proj": draw.standard_normal((2, 6, 8)).astype("float32"),
        "model.layers.0.mlp.scale": draw.standard_normal((8, 4)).astype("float32"),
        "model.layers.0.self_attn.q_proj.bias": draw.standard_normal(8).astype("float32"),
    }
    base = write_base(tmp_path / "base", base_tensors() | more)
    changed = {name: 1.1 * tensor for name, tensor in more.items() if "down_proj" not in name}
    changed["model.layers.0.self_attn.q_proj.weight"] = 1.1 * base_tensors()["model.layers.0.self_attn.q_proj.weight"]
    tuned = write_base(tmp_path / "tuned", base_tensors() | more | changed)
    report = lorakit.extract(tuned, base, tmp_path / "out", rank=8, save_rest=True)
    assert {change.tensor.rpartition(".")[2]: change.saved for change in report.uncarried} == {
        "gate_up_proj": True,
        "scale": False,
        "bias": True,
    }
    assert any("part of modules that hold others" in note for note in report.notes)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["bias"]) == (["model.layers.0.mlp.experts"], "all")
    kept = {name: tensor for name, tensor in stored(tmp_path / "out").items() if "lora_" not in name}
    assert kept.keys() == {
        "base_model.model.model.layers.0.mlp.experts.gate_up_proj",
        "base_model.model.model.layers.0.mlp.experts.down_proj",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias",
    }
    for name, tensor in kept.items():
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        np.testing.assert_array_equal(tensor, stored(tuned)[path])


def test_tensors_that_are_equal_are_counted_and_left_alone(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    model = load(base)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:, 3] += 0.5
    model.save_pretrained(tmp_path / "tuned")
    report = lorakit.extract(tmp_path / "tuned", base, tmp_path / "out", rank=4)
    assert [(module.module, module.rank) for module in report.modules] == [("model.layers.1.mlp.up_proj", 1)]
    assert report.equal == len(load(base).state_dict()) - 1
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"] == [
        "model.layers.1.mlp.up_proj"
    ]


@pytest.mark.parametrize(
    "lora", [{"use_dora": True}, {"bias": "all", "use_rslora": True}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_an_adapter_of_another_kind_becomes_plain_factors(tmp_path: Path, lora: dict[str, Any]) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=LINEARS["qwen2"], **lora)
    report = lorakit.extract(adapter, None, tmp_path / "out", rank=96, save_rest=True)
    merged = merged_by_peft(base, [(adapter, 1.0)])
    found = with_adapter(base, tmp_path / "out").merge_and_unload().state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-4, msg=name)
    assert report.relative_error < 1e-4
    record = json.loads((tmp_path / "out" / "lorakit.json").read_text())
    assert [parent["kind"] for parent in record["parents"]] == ["base", "adapter"]


def test_the_result_says_where_it_came_from(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    tuned, base = models["llama"]
    report = lorakit.extract(tuned, base, tmp_path / "out", rank=2, seed=5)
    record = json.loads((tmp_path / "out" / "lorakit.json").read_text())
    assert record["operation"] == "extract"
    assert [(parent["kind"], parent["path"]) for parent in record["parents"]] == [
        ("base", str(base)),
        ("tuned", str(tuned)),
    ]
    assert all(parent["identity"].startswith("llama-") for parent in record["parents"])
    assert (record["settings"]["rank"], record["settings"]["seed"]) == (2, 5)
    assert record["truncation_error"] == report.relative_error
    assert record["report"]["modules"] == report.as_dict()["modules"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == (str(base), "CAUSAL_LM")


def test_the_same_seed_gives_the_same_bytes(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    tuned, base = models["llama"]
    for name in ("one", "two"):
        lorakit.extract(tuned, base, tmp_path / name, rank=4)
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_dry_run_measures_the_same_and_writes_nothing(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    tuned, base = models["llama"]
    planned = lorakit.extract(tuned, base, budget=5000, dry_run=True)
    assert not list(tmp_path.iterdir())
    done = lorakit.extract(tuned, base, tmp_path / "out", budget=5000)
    assert planned.modules == done.modules
    assert planned.dry_run
    assert not done.dry_run


def test_progress_ends_at_all_bytes(models: dict[str, tuple[Path, Path]]) -> None:
    seen: list[tuple[int, int]] = []
    lorakit.extract(*models["llama"], rank=1, dry_run=True, progress=lambda *pair: seen.append(pair))
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    tensors = base_tensors()
    base = write_base(tmp_path / "base", tensors)
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"] * np.float32("nan")
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"] * 2
    broken = write_base(tmp_path / "broken", tensors)
    with pytest.raises(InvalidFile, match=r"down_proj.weight' holds NaN"):
        lorakit.extract(broken, base, tmp_path / "out", rank=2)
    with pytest.raises(Refused, match="there is nothing to extract"):
        lorakit.extract(base, base, tmp_path / "out", rank=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "broken"]
    assert not leftovers(tmp_path)
    with pytest.raises(Conflict):
        lorakit.extract(broken, base, base, rank=2)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rank": 4, "energy": 0.9}, "give one of them"),
        ({"rank": 0}, "1 or more"),
        ({"energy": 1.5}, "above 0 and at most 1"),
        ({"rank": 4, "max_rank": 8}, "with a rank, that is the largest"),
        ({"energy": 0.9, "max_rank": 0}, "leaves nothing"),
        ({"device": "tpu"}, "none of auto"),
        ({"base": None}, "with --base"),
        ({"dry_run": False}, "no folder to write"),
    ],
    ids=str,
)
def test_arguments_that_contradict_each_other_are_refused(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    base = write_base(tmp_path / "base")
    with pytest.raises(UsageError, match=reason):
        lorakit.extract(**{"tuned": base, "base": base, "dry_run": True, **options})
