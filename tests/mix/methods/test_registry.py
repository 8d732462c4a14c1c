"""Methods are found by name, take what they say they take, and agree where they have to."""

from __future__ import annotations

import subprocess
import sys
from inspect import signature
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.errors import UsageError
from lorakit.mix.methods.registry import METHODS, Draw, LowRank, checked_options, method_named
from tests.mix.methods.deltas import DRAW, delta, dense, merge, nothing, several, weights_for

OURS = [name for name in METHODS if ":" not in name]
# with these every value is kept
ALL_OF_IT: dict[str, dict[str, Any]] = {
    "della": {"density": 1, "epsilon": 0},
    "breadcrumbs": {"density": 1, "gamma": 0},
}


def all_of_it(name: str) -> dict[str, Any]:
    return ALL_OF_IT.get(name, {"density": 1} if "density" in METHODS[name].options else {})


def test_the_weighted_sum_comes_first() -> None:
    assert next(iter(METHODS)) == "linear"
    assert all(name == method.name for name, method in METHODS.items())


def test_every_method_says_what_it_does_and_who_found_it() -> None:
    for method in METHODS.values():
        assert method.summary
        assert "\n" not in method.summary
        assert "arXiv" in method.paper or method.name == "slerp" or method.paper in ("PEFT", "LoRAX")


def test_looking_at_the_methods_does_not_import_torch() -> None:
    program = (
        "import sys; from lorakit.mix.methods.registry import METHODS; assert METHODS; print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


@pytest.mark.parametrize("name", METHODS)
def test_the_options_are_those_of_the_function(name: str) -> None:
    method = METHODS[name]
    if name.startswith("peft:") and name.endswith("_svd"):
        ours = METHODS[name.removeprefix("peft:").removesuffix("_svd")]
        assert method.options == ours.options
        return
    takes = set(signature(method.function).parameters) - {"deltas", "weights", "draw"}
    assert takes == method.options.keys() - {"seed"}


@pytest.mark.parametrize("name", METHODS)
def test_the_defaults_are_allowed(name: str) -> None:
    assert checked_options(METHODS[name], {}) == dict(METHODS[name].options)


def test_an_unknown_method_is_told_its_nearest() -> None:
    with pytest.raises(UsageError, match=r"no method 'tie'; nearest: ties"):
        method_named("tie")
    with pytest.raises(UsageError, match=r"no method 'zzz'; nearest: linear, slerp, ties"):
        method_named("zzz")


def test_an_option_that_a_method_does_not_take_is_refused() -> None:
    with pytest.raises(UsageError, match="method 'linear' takes no density; it takes no option"):
        checked_options(method_named("linear"), {"density": 0.5})
    with pytest.raises(UsageError, match="method 'ties' takes no gamma, seed; it takes density, majority_sign"):
        checked_options(method_named("ties"), {"seed": 1, "gamma": 0.1})


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("ties", "density", 0),
        ("ties", "density", -0.5),
        ("ties", "density", 1.1),
        ("ties", "density", float("nan")),
        ("ties", "density", "half"),
        ("ties", "density", True),
        ("ties", "majority_sign", "both"),
        ("ties", "majority_sign", None),
        ("dare_linear", "seed", -1),
        ("dare_linear", "seed", 1.5),
        ("dare_linear", "seed", True),
        ("della", "epsilon", -0.1),
        ("breadcrumbs", "gamma", 1.0),
    ],
)
def test_a_value_out_of_range_is_refused(name: str, option: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"{option}={value!r} of method '{name}': it has to be "):
        checked_options(method_named(name), {option: value})


def test_the_seed_goes_into_the_draw() -> None:
    method, deltas = method_named("dare_linear"), [delta(9, 7, 2, 1)]
    options = checked_options(method, {"seed": 5, "density": 0.3})
    merged = method.merged(deltas, [1.0], module="q_proj", options=options)
    assert torch.equal(merged, method.function(deltas, [1.0], draw=Draw(5, "q_proj"), density=0.3))
    other = method.merged(deltas, [1.0], module="k_proj", options=options)
    assert not torch.equal(merged, other)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("slerp", "iso_c")])
@settings(max_examples=25)
@given(several(1, 1))
def test_one_adapter_of_which_nothing_is_dropped_is_itself(name: str, deltas: list[LowRank]) -> None:
    expected = dense(deltas[0])
    torch.testing.assert_close(
        merge(name, deltas, [1.0], **all_of_it(name)), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())
    )


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("slerp", "peft:linear")])
@settings(max_examples=25)
@given(several(1, 3, most_rank=3), st.integers(0, 99))
def test_an_adapter_without_the_module_counts_as_one_of_zeros(name: str, deltas: list[LowRank], seed: int) -> None:
    """Whether it is left out, there with rank 0, or there with factors of zero."""
    if ":" in name:
        deltas = [delta(*deltas[0].shape, 3, seed + index) for index in range(2)]
    weights = weights_for(deltas, seed)
    left_out = merge(name, deltas, weights)
    scale = max(float(dense(each).abs().max()) for each in deltas)
    rank_zero = merge(name, [*deltas, nothing(deltas[0])], [*weights, 0.9])
    torch.testing.assert_close(rank_zero, left_out, rtol=1e-6, atol=1e-7 * scale)
    if ":" not in name:
        zeros = LowRank(torch.zeros(deltas[0].shape[0], 1), torch.zeros(1, deltas[0].shape[1]))
        of_zeros = merge(name, [*deltas, zeros], [*weights, 0.9])
        torch.testing.assert_close(of_zeros, left_out, rtol=1e-6, atol=1e-7 * scale)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "slerp"])
def test_factors_in_sixteen_bits_are_taken_as_they_are(name: str) -> None:
    narrow = [LowRank(each.B.bfloat16(), each.A.half(), 0.5) for each in (delta(9, 7, 3, 1), delta(9, 7, 3, 2))]
    wide = [LowRank(each.B.float(), each.A.float(), 0.5) for each in narrow]
    assert torch.equal(merge(name, narrow, [0.7, 0.3]), merge(name, wide, [0.7, 0.3]))


@pytest.mark.parametrize("name", METHODS)
def test_what_is_given_is_left_as_it_was(name: str) -> None:
    deltas = [delta(9, 7, 3, 1), delta(9, 7, 3, 2)]
    before = [(each.B.clone(), each.A.clone()) for each in deltas]
    merge(name, deltas, [0.7, 0.3])
    for each, (left, right) in zip(deltas, before, strict=True):
        assert torch.equal(each.B, left)
        assert torch.equal(each.A, right)


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_a_gpu_gives_the_same(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    deltas = [delta(90, 70, 3, 1), delta(90, 70, 3, 2)]
    there = [LowRank(each.B.cuda(), each.A.cuda(), each.scale) for each in deltas]
    merged = merge(name, there, [0.7, 0.3], DRAW)
    assert merged.is_cuda
    torch.testing.assert_close(merged.cpu(), merge(name, deltas, [0.7, 0.3], DRAW), rtol=1e-5, atol=1e-5)
