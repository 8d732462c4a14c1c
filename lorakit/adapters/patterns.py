"""Which modules a pattern means: `*.mlp.*` as in a shell, `q_proj` as in PEFT's target_modules, the end of a path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from lorakit.adapters.delta import require_finite
from lorakit.errors import NotFound, UsageError


def names(pattern: str, module: str) -> bool:
    """Whether `pattern` means `module`, a path such as `model.layers.0.mlp.up_proj`."""
    if any(sign in pattern for sign in "*?["):
        return fnmatchcase(module, pattern)
    return f".{module}".endswith(f".{pattern}")


def chosen(patterns: Iterable[str], modules: Iterable[str], owner: str) -> set[str]:
    """The modules that any pattern means.

    Raises:
        NotFound: a pattern means none.
    """
    every = list(modules)
    found: set[str] = set()
    for pattern in patterns:
        meant = {module for module in every if names(pattern, module)}
        if not meant:
            raise NotFound(f"'{pattern}' names no module of adapter '{owner}'; it has, for one, '{_one(every)}'")
        found |= meant
    return found


def weights_by_module(patterns: Mapping[str, float], modules: Iterable[str], owner: str) -> dict[str, float]:
    """The weight of each module: that of the first pattern that means it.

    Raises:
        UsageError: a module has no weight.
        NotFound: a pattern means no module.
    """
    every = list(modules)
    chosen(patterns, every, owner)
    weights: dict[str, float] = {}
    for module in every:
        if not any(names(pattern, module) for pattern in patterns):
            raise UsageError(f"no pattern gives a weight to '{module}' of adapter '{owner}': add '*' behind the others")
        weights[module] = weight_of(patterns, module)
    return weights


def weight_of(patterns: Mapping[str, float], module: str) -> float:
    """The weight of the first pattern that means the module; 0 where none does.

    Raises:
        UsageError: it is not finite.
    """
    weight = next((float(value) for pattern, value in patterns.items() if names(pattern, module)), 0.0)
    require_finite(weight)
    return weight


def _one(modules: list[str]) -> str:
    return modules[0] if modules else "none"
