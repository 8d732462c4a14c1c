"""Patterns of modules: as in a shell, or the end of a path."""

from __future__ import annotations

import pytest

from lorakit.adapters.patterns import chosen, names, weights_by_module
from lorakit.errors import NotFound, UsageError

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("*.mlp.*", 2),
        ("up_proj", 2),
        ("mlp.up_proj", 2),
        ("proj", 0),
        ("*", 4),
        ("model.layers.[0]*", 2),
        ("lm_head", 1),
    ],
)
def test_what_a_pattern_means(pattern: str, count: int) -> None:
    assert sum(names(pattern, module) for module in MODULES) == count


def test_a_pattern_that_means_nothing_is_a_mistake() -> None:
    with pytest.raises(NotFound, match=r"'\*\.mpl\.\*' names no module of adapter 'a'"):
        chosen(["*.mlp.*", "*.mpl.*"], MODULES, "a")


def test_the_first_pattern_counts() -> None:
    weights = weights_by_module({"*.self_attn.*": 0.8, "*": 0.4}, MODULES, "a")
    assert [weights[module] for module in MODULES] == [0.8, 0.4, 0.4, 0.4]


def test_every_module_needs_a_weight() -> None:
    with pytest.raises(UsageError, match=r"no pattern gives a weight to 'model\.layers\.0\.self_attn\.q_proj'"):
        weights_by_module({"*.mlp.*": 0.8, "lm_head": 1}, MODULES, "a")
