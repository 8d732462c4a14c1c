"""The `peft:` methods give what PEFT's own `add_weighted_adapter` gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lorakit.errors import UsageError
from lorakit.mix.methods.registry import LowRank, checked_options, method_named
from tests.mix.methods.deltas import DRAW, bernoulli_from, delta, dense, merge, nothing

OUT, INTO = 21, 17
WEIGHTS = [(0.7, 0.3, 0.5), (1.0, -0.5, 0.25), (-1.0, -2.0, 0.0)]
FACTORWISE = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
DENSE = ["svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]


class Two(torch.nn.Module):
    """Every adapter has the first module; of the second, see `adapted`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(INTO, OUT)
        self.second = torch.nn.Linear(OUT, INTO)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


def adapted(ranks: Sequence[int], targets: Sequence[Sequence[str]] = (), dtype: str = "float32") -> PeftModel:
    """A model with adapters "0", "1", …"""
    targets = targets or [["first"]] * len(ranks)
    configs = [
        LoraConfig(r=rank, lora_alpha=3 * index + 2, target_modules=list(names), init_lora_weights=False)
        for index, (rank, names) in enumerate(zip(ranks, targets, strict=True))
    ]
    torch.manual_seed(1)
    model = get_peft_model(Two(), configs[0], adapter_name="0")
    for index, config in enumerate(configs[1:], 1):
        model.add_adapter(str(index), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter).to(getattr(torch, dtype)).to(parameter.dtype)
    return model


def layer_of(model: PeftModel, module: str) -> Any:
    return model.base_model.model.get_submodule(module)


def delta_of(model: PeftModel, module: str, adapter: str) -> LowRank:
    layer = layer_of(model, module)
    if adapter not in layer.lora_A:
        return nothing(LowRank(layer.weight[:, :1], layer.weight[:1]))
    return LowRank(
        layer.lora_B[adapter].weight.data.clone(), layer.lora_A[adapter].weight.data.clone(), layer.scaling[adapter]
    )


def mixed_by_peft(
    model: PeftModel, combination: str, weights: Sequence[float], turns: Sequence[int] = (), **options: Any
) -> None:
    """As adapter "mix", of full rank where PEFT makes an SVD.

    Its chance comes from our draw: `turns` are the adapters in the order in which it asks for theirs.
    """
    names = [str(index) for index in range(len(weights))]
    if combination.endswith("svd"):
        options["svd_rank"] = min(OUT, INTO)
    if "majority_sign" in options:
        options["majority_sign_method"] = options.pop("majority_sign")
    generators = [DRAW.generator(index) for index in range(len(weights))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bernoulli", bernoulli_from([generators[turn] for turn in turns or range(len(weights))]))
        model.add_weighted_adapter(names, list(weights), "mix", combination_type=combination, **options)


def options_of(combination: str, density: float, sign: str = "total") -> dict[str, Any]:
    takes = method_named(f"peft:{combination}").options
    return {name: value for name, value in {"density": density, "majority_sign": sign}.items() if name in takes}


def factors_of(combination: str, deltas: Sequence[LowRank], weights: Sequence[float], **options: Any) -> LowRank:
    method = method_named(f"peft:{combination}")
    merged = method.merged(deltas, weights, module=DRAW.module, options=checked_options(method, {**options}))
    assert isinstance(merged, LowRank)
    return merged


@pytest.mark.parametrize("density", [0.2, 0.55])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("combination", FACTORWISE)
def test_the_factors_are_pefts_bit_for_bit(combination: str, weights: tuple[float, ...], density: float) -> None:
    model = adapted([4, 4, 4])
    deltas = [delta_of(model, "first", str(index)) for index in range(3)]
    options = options_of(combination, density)
    mixed_by_peft(model, combination, weights, **options)
    seeded = {"seed": DRAW.seed} if "dare" in combination else {}
    mine, theirs = factors_of(combination, deltas, weights, **options, **seeded), delta_of(model, "first", "mix")
    assert torch.equal(mine.A, theirs.A)
    assert torch.equal(mine.B, theirs.B)
    assert (mine.scale, theirs.scale) == (1.0, 1.0)


@pytest.mark.parametrize("combination", ["ties", "dare_ties", "ties_svd", "dare_ties_svd"])
def test_a_majority_by_frequency_is_pefts(combination: str) -> None:
    model, options = adapted([4, 4, 4]), options_of(combination, 0.5, "frequency")
    deltas = [delta_of(model, "first", str(index)) for index in range(3)]
    mixed_by_peft(model, combination, [0.7, 0.3, 0.5], **options)
    mine = merge(f"peft:{combination}", deltas, [0.7, 0.3, 0.5], **options)
    torch.testing.assert_close(mine, dense(delta_of(model, "first", "mix")), rtol=1e-4, atol=1e-4)


def test_factors_of_sixteen_bits_are_pruned_as_peft_prunes_them() -> None:
    """Many of their values are equal."""
    model = adapted([4, 4], dtype="float8_e4m3fn")
    deltas = [delta_of(model, "first", str(index)) for index in range(2)]
    mixed_by_peft(model, "ties", [0.5, 0.5], density=0.5)
    narrow = [LowRank(each.B.bfloat16(), each.A.bfloat16(), each.scale) for each in deltas]
    mine, theirs = factors_of("ties", narrow, [0.5, 0.5]), delta_of(model, "first", "mix")
    assert torch.equal(mine.A, theirs.A)
    assert torch.equal(mine.B, theirs.B)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_cat_is_pefts_bit_for_bit_at_any_ranks(weights: tuple[float, ...]) -> None:
    model = adapted([2, 5, 3])
    deltas = [delta_of(model, "first", str(index)) for index in range(3)]
    mixed_by_peft(model, "cat", weights)
    mine, theirs = factors_of("cat", deltas, weights), delta_of(model, "first", "mix")
    assert torch.equal(mine.A, theirs.A)
    assert torch.equal(mine.B, theirs.B)


@pytest.mark.parametrize("density", [0.2, 0.55])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("combination", DENSE)
def test_the_dense_delta_is_what_peft_decomposes(combination: str, weights: tuple[float, ...], density: float) -> None:
    model, options = adapted([2, 5, 3]), options_of(combination, density)
    deltas = [delta_of(model, "first", str(index)) for index in range(3)]
    mixed_by_peft(model, combination, weights, **options)
    mine, theirs = merge(f"peft:{combination}", deltas, weights, **options), dense(delta_of(model, "first", "mix"))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("combination", [*FACTORWISE, *DENSE, "cat"])
def test_an_adapter_without_the_module_is_left_out_as_peft_leaves_it_out(combination: str) -> None:
    """And the others are still merged by the combination, though but one of them is left."""
    model, options = adapted([4, 4], [["first"], ["second"]]), options_of(combination, 0.5)
    deltas = [delta_of(model, "second", str(index)) for index in range(2)]
    assert [each.rank for each in deltas] == [0, 4]
    # "first" has its turns before "second"; of a pair of factors each has one
    turns = [0, 1] if combination.endswith("svd") else [0, 0, 1, 1]
    mixed_by_peft(model, combination, [0.7, -0.3], turns, **options)
    mine = merge(f"peft:{combination}", deltas, [0.7, -0.3], **options)
    theirs = dense(delta_of(model, "second", "mix"))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("combination", [*FACTORWISE, *DENSE, "cat"])
def test_one_adapter_alone_is_not_pruned(combination: str) -> None:
    model, options = adapted([4]), options_of(combination, 0.5)
    deltas = [delta_of(model, "first", "0")]
    mixed_by_peft(model, combination, [-0.7], **options)
    mine, theirs = merge(f"peft:{combination}", deltas, [-0.7], **options), dense(delta_of(model, "first", "mix"))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine, -0.7 * dense(deltas[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("combination", FACTORWISE)
def test_different_ranks_are_refused_as_peft_refuses_them(combination: str) -> None:
    with pytest.raises(ValueError, match="must have the same r value"):
        mixed_by_peft(adapted([4, 5]), combination, [0.5, 0.5], **options_of(combination, 0.5))
    with pytest.raises(UsageError, match=f"they have 4, 5: take '{combination}'"):
        merge(f"peft:{combination}", [delta(9, 7, 4, 1), delta(9, 7, 5, 2)], [0.5, 0.5])


@pytest.mark.parametrize("combination", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_full_density_prunes_nothing(combination: str) -> None:
    deltas = [delta(9, 7, 4, 1), delta(9, 7, 4, 2)]
    prunes_nothing = merge(f"peft:{combination}", deltas, [0.5, 0.5], density=1.0)
    if "ties" not in combination:
        torch.testing.assert_close(prunes_nothing, merge("peft:linear", deltas, [0.5, 0.5]))
    assert int((prunes_nothing == 0).sum()) == 0
