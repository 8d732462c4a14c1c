"""Whether an optimizer's stored state is one for the parameters that are trained: torch itself looks at their number
alone, and what does not fit then ends the process in the middle of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_BLOCKWISE = ("absmax", "qmap")  # of quantised moments
_OF_NO_MEANING = {"params", "param_names", "initial_lr"}


def what_does_not_fit(stored: Any, optimizer: Any) -> str | None:
    """In words; None when `stored` can be loaded into the optimizer."""
    if not (isinstance(stored, Mapping) and isinstance(stored.get("state"), Mapping)):
        return "it is no state of an optimizer"
    theirs, mine = stored.get("param_groups"), optimizer.param_groups
    if not (isinstance(theirs, list) and all(isinstance(group, Mapping) for group in theirs)):
        return "it has no groups of parameters"
    if problem := _groups(theirs, mine):
        return problem
    return next(_states(stored["state"], theirs, mine), None)


def _groups(theirs: list[Any], mine: list[dict[str, Any]]) -> str | None:
    counts = [[len(group.get("params", ())) for group in groups] for groups in (theirs, mine)]
    if counts[0] != counts[1]:
        return f"its groups have {counts[0]} parameters, and here they have {counts[1]}"
    for one, other in zip(theirs, mine, strict=True):
        if differing := (one.keys() ^ other.keys()) - _OF_NO_MEANING:
            return f"it is of another kind of optimizer: {', '.join(sorted(map(str, differing)))}"
        if one.get("decoupled_weight_decay") != other.get("decoupled_weight_decay"):
            return "one of the two is Adam, and the other AdamW"
    return None


def _states(states: Mapping[Any, Any], theirs: list[Any], mine: list[dict[str, Any]]) -> Iterator[str]:
    import torch

    of = {
        index: parameter
        for one, other in zip(theirs, mine, strict=True)
        for index, parameter in zip(one["params"], other["params"], strict=True)
    }
    for index, values in states.items():
        if index not in of or not isinstance(values, Mapping):
            yield f"its parameter {index} is in none of its groups"
            return
        for name, value in values.items():
            if not isinstance(value, torch.Tensor):
                continue
            if not _fits(str(name), tuple(value.shape), tuple(of[index].shape)):
                yield (
                    f"{name} of parameter {index} is {list(value.shape)} there, and the parameter is "
                    f"{list(of[index].shape)} here"
                )
            elif value.is_floating_point() and not bool(value.isfinite().all()):
                yield f"{name} of parameter {index} holds NaN or infinity"


def _fits(name: str, shape: tuple[int, ...], parameter: tuple[int, ...]) -> bool:
    """As large as the parameter, a number, or one of Adafactor's two factors of it."""
    of_parameter = (parameter, (), (1,), parameter[:-1], parameter[:-2] + parameter[-1:])
    return shape in of_parameter or name.startswith(_BLOCKWISE)
