"""Every merging method by its name: what it is good for, which options it takes, what it gives.

A method is `f(deltas, weights, *, draw, **options)`, with the deltas of one module. Adapters that have nothing for that
module are deltas of rank 0, or left out: it is the same to every formula but those that look at the number of
adapters or at all weights, which are `slerp` and the `peft:` ones (PEFT takes one adapter alone for "linear").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

from lorakit.errors import UsageError
from lorakit.mix.methods import cores, elementwise, lorax_forms, peft_forms
from lorakit.mix.methods.knots import knots
from lorakit.mix.methods.linear import linear, slerp
from lorakit.mix.methods.low_rank import Draw, LowRank

if TYPE_CHECKING:
    import torch

__all__ = ["METHODS", "Draw", "LowRank", "Method", "checked_options", "method_named"]

TRIM = {"density": 0.5}
ELECT = {"majority_sign": "total"}
CHANCE = {"seed": 0}


@dataclass(frozen=True, slots=True)
class Method:
    """A way to make one delta of several.

    `gives` "factors": a LowRank of scale 1 in float32 or float64; "dense": an (out, in) float32 matrix.
    `options` are the ones it takes, with their defaults. `seed` among them is for the `Draw`, not for `function`.
    """

    name: str
    summary: str
    paper: str
    gives: Literal["factors", "dense"]
    options: Mapping[str, Any]
    function: Callable[..., Any]

    def merged(
        self, deltas: Sequence[LowRank], weights: Sequence[float], *, module: str, options: Mapping[str, Any]
    ) -> LowRank | torch.Tensor:
        """The merged delta of one module. `options` as `checked_options` gives them.

        Raises:
            UsageError: the method can't take that many adapters, these weights or these ranks.
        """
        others = {name: value for name, value in options.items() if name != "seed"}
        merged: LowRank | torch.Tensor = self.function(
            deltas, weights, draw=Draw(options.get("seed", 0), module), **others
        )
        return merged


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            "linear",
            "the weighted sum, exact at any ranks; for language models the only one found to gain reliably "
            "(arXiv:2511.21437)",
            "Task Arithmetic, arXiv:2212.04089",
            "factors",
            {},
            linear,
        ),
        Method(
            "slerp",
            "from one adapter to another along the arc between them, at the same norm; exactly two",
            "Shoemake, SIGGRAPH 1985",
            "factors",
            {},
            slerp,
        ),
        Method(
            "ties",
            "keeps the largest values, elects a sign for each, averages those that agree; for tasks that conflict",
            "TIES-Merging, arXiv:2306.01708",
            "dense",
            TRIM | ELECT,
            elementwise.ties,
        ),
        Method(
            "dare_linear",
            "drops values at random, scales up the rest, sums; thins out adapters before many are added",
            "DARE, arXiv:2311.03099",
            "dense",
            TRIM | CHANCE,
            elementwise.dare_linear,
        ),
        Method(
            "dare_ties",
            "drops values at random, scales up the rest, elects signs as ties does",
            "DARE, arXiv:2311.03099",
            "dense",
            TRIM | ELECT | CHANCE,
            elementwise.dare_ties,
        ),
        Method(
            "magnitude_prune",
            "sums the largest values of each adapter; the simplest way to thin them out",
            "TIES-Merging, arXiv:2306.01708 (its first step)",
            "dense",
            TRIM,
            elementwise.magnitude_prune,
        ),
        Method(
            "della",
            "as dare_ties, but small values are dropped more often than large ones",
            "DELLA-Merging, arXiv:2406.11617",
            "dense",
            TRIM | {"epsilon": 0.1} | CHANCE,
            elementwise.della,
        ),
        Method(
            "breadcrumbs",
            "sums what is left of each adapter without its outliers and its small values",
            "Model Breadcrumbs, arXiv:2312.06795",
            "dense",
            TRIM | {"gamma": 0.01},
            elementwise.breadcrumbs,
        ),
        Method(
            "tsv",
            "makes the singular vectors of all adapters orthogonal to one another, so that none writes over another",
            "TSV-Merge, arXiv:2412.00081",
            "factors",
            {},
            cores.tsv,
        ),
        Method(
            "iso_c",
            "makes all directions of the sum equally strong, so that no task dominates",
            "Iso-C, arXiv:2502.04959",
            "factors",
            {},
            cores.iso_c,
        ),
        Method(
            "core_ties",
            "ties on the small cores of the deltas in common bases; as quick as linear",
            "Core Space Merging, arXiv:2509.17786",
            "factors",
            TRIM | ELECT,
            cores.core_ties,
        ),
        Method(
            "core_tsv",
            "tsv in the common bases of Core Space; the same delta as tsv",
            "Core Space Merging, arXiv:2509.17786",
            "factors",
            {},
            cores.core_tsv,
        ),
        Method(
            "knots",
            "aligns the adapters by one SVD of all, then ties on their right singular factors",
            "KnOTS, arXiv:2410.19735",
            "factors",
            TRIM | ELECT,
            knots,
        ),
        Method("peft:linear", "PEFT's linear: on A and B apart", "PEFT", "factors", {}, peft_forms.linear),
        Method("peft:cat", "PEFT's cat: the weighted sum", "PEFT", "factors", {}, peft_forms.cat),
        Method("peft:ties", "PEFT's ties: on A and B apart", "PEFT", "factors", TRIM | ELECT, peft_forms.ties),
        Method(
            "peft:dare_linear",
            "PEFT's dare_linear: on A and B apart",
            "PEFT",
            "factors",
            TRIM | CHANCE,
            peft_forms.dare_linear,
        ),
        Method(
            "peft:dare_ties",
            "PEFT's dare_ties: on A and B apart",
            "PEFT",
            "factors",
            TRIM | ELECT | CHANCE,
            peft_forms.dare_ties,
        ),
        Method(
            "peft:magnitude_prune",
            "PEFT's magnitude_prune: on A and B apart",
            "PEFT",
            "factors",
            TRIM,
            peft_forms.magnitude_prune,
        ),
        Method("peft:svd", "PEFT's svd: the weighted sum of the dense deltas", "PEFT", "factors", {}, linear),
        Method(
            "peft:ties_svd",
            "PEFT's ties_svd: on the dense deltas",
            "PEFT",
            "dense",
            TRIM | ELECT,
            peft_forms.ties_svd,
        ),
        Method(
            "peft:dare_linear_svd",
            "PEFT's dare_linear_svd: on the dense deltas",
            "PEFT",
            "dense",
            TRIM | CHANCE,
            peft_forms.dare_linear_svd,
        ),
        Method(
            "peft:dare_ties_svd",
            "PEFT's dare_ties_svd: on the dense deltas",
            "PEFT",
            "dense",
            TRIM | ELECT | CHANCE,
            peft_forms.dare_ties_svd,
        ),
        Method(
            "peft:magnitude_prune_svd",
            "PEFT's magnitude_prune_svd: on the dense deltas",
            "PEFT",
            "dense",
            TRIM,
            peft_forms.magnitude_prune_svd,
        ),
        Method("lorax:linear", "LoRAX's linear: on A and B apart", "LoRAX", "factors", {}, lorax_forms.linear),
        Method("lorax:ties", "LoRAX's ties: on A and B apart", "LoRAX", "factors", TRIM | ELECT, lorax_forms.ties),
        Method(
            "lorax:dare_linear",
            "LoRAX's dare_linear: on A and B apart, and nothing scaled up",
            "LoRAX",
            "factors",
            TRIM | CHANCE,
            lorax_forms.dare_linear,
        ),
        Method(
            "lorax:dare_ties",
            "LoRAX's dare_ties: on A and B apart, and nothing scaled up",
            "LoRAX",
            "factors",
            TRIM | ELECT | CHANCE,
            lorax_forms.dare_ties,
        ),
    )
}


def method_named(name: str) -> Method:
    """Raises UsageError when there is none of that name; names the nearest."""
    if name not in METHODS:
        # without a near name all of them, short of PEFT's forms, which have the same names again
        near = get_close_matches(name, METHODS, n=3) or [known for known in METHODS if ":" not in known]
        raise UsageError(f"there is no method '{name}'; nearest: {', '.join(near)} (lorakit methods lists them all)")
    return METHODS[name]


def checked_options(method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given options, and the method's own defaults for the others.

    Raises:
        UsageError: the method does not take one of them, or a value is out of its range.
    """
    unknown = sorted(given.keys() - method.options.keys())
    if unknown:
        takes = ", ".join(method.options) or "no option"
        raise UsageError(f"method '{method.name}' takes no {', '.join(unknown)}; it takes {takes}")
    options = {**method.options, **{name: _plain(value) for name, value in given.items()}}
    for name, value in options.items():
        allowed, is_allowed = RANGES[name]
        if not is_allowed(value):
            raise UsageError(f"{name}={value!r} of method '{method.name}': it has to be {allowed}")
    _check_together(method, options)
    return options


def _plain(value: Any) -> Any:
    """A number of numpy's as Python's own."""
    return value.item() if hasattr(value, "item") else value


def _check_together(method: Method, options: Mapping[str, Any]) -> None:
    if "epsilon" in options:
        density, epsilon = options["density"], options["epsilon"]
        if density - epsilon / 2 <= 0 or density + epsilon / 2 > 1:
            raise UsageError(
                f"method '{method.name}' keeps values with probabilities from density - epsilon/2 to "
                f"density + epsilon/2, which has to be within 0 and 1: with density={density:g} "
                f"set epsilon below {2 * min(density, 1 - density):g}, not {epsilon:g}"
            )
    if "gamma" in options and options["density"] + options["gamma"] > 1:
        raise UsageError(
            f"method '{method.name}' leaves out the share gamma={options['gamma']:g} and can't keep "
            f"density={options['density']:g} of the rest: set density to {1 - options['gamma']:g} at most"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


RANGES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "density": ("a number above 0, up to 1", lambda value: _is_number(value) and 0 < value <= 1),
    "epsilon": ("a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1),
    "gamma": ("a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1),
    "majority_sign": ("total or frequency", lambda value: value in ("total", "frequency")),
    "seed": (
        "a whole number, 0 or more",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    ),
}
