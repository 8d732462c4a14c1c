"""The same module under two names: a path begins as the class of the model does that it was trained in.

`layers.0.mlp.up_proj` of an AutoModel is `model.layers.0.mlp.up_proj` of the class with a head; models for vision and
text have moved their parts between versions of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.keys import PREFIXES, unwrapped
from lorakit.errors import WrongBase

T = TypeVar("T")
_PREFIX = "base_model.model."

_STACK = re.compile(r"^(?P<before>(?:[^.]+\.)*?)(?P<stack>[^.]+)\.\d+\.")


def apart(one: Iterable[str], other: Iterable[str]) -> tuple[str, str] | None:
    """What the paths of one stack of layers begin with in each, where that seems to be one stack under two names."""
    mine, theirs = _stacks(one), _stacks(other)
    for stack in mine.keys() & theirs.keys():
        if mine[stack] & theirs[stack]:
            continue
        for before in sorted(mine[stack]):
            for there in sorted(theirs[stack]):
                if before.endswith(there) or there.endswith(before) or {before, there} <= set(PREFIXES):
                    return before, there
    return None


def ensure_one_naming(one: Adapter, other: Adapter) -> None:
    """Raises WrongBase where the two call their modules by the names of different classes."""
    found = apart(one.deltas, other.deltas)
    if found:
        raise _of_two_classes(one.name, f"those of '{other.name}'", *found)


def ensure_named_alike(adapter: Adapter) -> None:
    """Raises WrongBase where the sum of several folders has modules of two classes: PEFT would load those of one."""
    for befores in _stacks(adapter.deltas).values():
        for before in befores:
            for there in befores:
                if before != there and before.endswith(there):
                    raise _of_two_classes(adapter.name, "others", before, there)


def _of_two_classes(name: str, others: str, before: str, there: str) -> WrongBase:
    return WrongBase(
        f"the modules of '{name}' begin with '{before}', {others} with '{there}': they seem to be the same, trained in "
        f"different classes of the model; mix them with --base BASE, which tells"
    )


def renamed(adapter: Adapter, old: str, new: str) -> Adapter:
    """With all that begins with `old` beginning with `new`.

    Raises:
        WrongBase: two modules would have one name.
    """

    def name(path: str) -> str:
        return new + path.removeprefix(old) if path.startswith(old) else path

    trained = replace(
        adapter.trained,
        tensors=_all_of(adapter.trained.tensors, name, adapter),
        rows=_all_of(adapter.trained.rows, name, adapter),
    )
    return replace(
        adapter,
        deltas=_all_of(adapter.deltas, name, adapter),
        biases=_all_of(adapter.biases, name, adapter),
        trained=trained,
        others=tuple(replace(stored, name=f"{_PREFIX}{name(unwrapped(stored.name))}") for stored in adapter.others),
    )


def _all_of(values: Mapping[str, T], name: Callable[[str], str], adapter: Adapter) -> dict[str, T]:
    found = {name(path): value for path, value in values.items()}
    if len(found) < len(values):
        raise WrongBase(f"adapter '{adapter.name}' has modules of two classes of the model: save it anew from one")
    return found


def _stacks(modules: Iterable[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for module in modules:
        match = _STACK.match(module)
        if match:
            found.setdefault(match["stack"], set()).add(match["before"])
    return found
