"""From an adapter's module paths to the names of tensors on disk.

An adapter names modules as the model class of its training did; a base on disk may have been saved from another class,
or by another version of it. What may differ stands in `families`, and the match has to be the only one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from functools import cached_property

from lorakit.adapters.keys import PREFIXES, unwrapped
from lorakit.merge.families import RENAMES, TOGETHER

__all__ = ["Resolver", "copied_from_base"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Resolver:
    """Finds the one weight of the base that a module path means."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)

    def weight_of(self, module: str) -> str | None:
        """The stored weight of the module; None when there is none, or when several are equally near."""
        return self.tensor_of(f"{module}.weight")

    def tensor_of(self, path: str) -> str | None:
        """The stored tensor that a path such as `model.norm.weight` means: of its own name, or else below another
        prefix, or else with parts that are spelled otherwise, too.
        """
        if path in self.names:
            return path
        plain = unwrapped(path)
        for spellings in ((path, plain), _respelled(plain)):
            found = {name for spelling in spellings for name in _moved(spelling) if name in self.names}
            if found:
                return found.pop() if len(found) == 1 else None
        return None

    def nearest(self, module: str, count: int = 3) -> list[str]:
        """The stored names that look most like the module's path."""
        near = get_close_matches(_NUMBER.sub("#", module), list(self._alike), n=count, cutoff=0.5)
        return [self._with_numbers_of(module, pattern) for pattern in near]

    def stored_otherwise(self, module: str) -> str | None:
        """Where the base has one tensor for what the adapter has in parts, or the other way round: says so."""
        parent, _, layer = module.rpartition(".")
        for parts, wholes in TOGETHER.items():
            if layer in parts:
                found = next(filter(None, (self.weight_of(f"{parent}.{whole}") for whole in wholes)), None)
                if found:
                    return f"the base has it in one piece with others, as '{found}'"
            if layer in wholes:
                pieces = [name for part in parts if (name := self.weight_of(f"{parent}.{part}"))]
                if pieces:
                    return f"the base has it in pieces: {', '.join(pieces)}"
        return None

    @cached_property
    def _alike(self) -> dict[str, list[str]]:
        """Names by what they are without their numbers: a model has few such patterns, however many its layers."""
        found: dict[str, list[str]] = {}
        for name in sorted(self.names):
            if not name.endswith(".bias"):
                found.setdefault(_NUMBER.sub("#", name).removesuffix(".weight"), []).append(name)
        return found

    def _with_numbers_of(self, module: str, pattern: str) -> str:
        numbers = _NUMBER.findall(module)
        names = self._alike[pattern]
        return next((name for name in names if _NUMBER.findall(name) == numbers), names[0])


def _moved(path: str) -> Iterator[str]:
    """The path below every other prefix."""
    for old in PREFIXES:
        if path.startswith(old):
            rest = path.removeprefix(old)
            yield from (new + rest for new in PREFIXES)


def _respelled(path: str) -> list[str]:
    """The path in every other spelling of its parts."""
    spellings = [f".{path}"]  # so that a part that stands first has a dot before it, too
    for rename in RENAMES:
        for spelling in tuple(spellings):
            if rename.within in spelling:
                for old, new in ((rename.one, rename.other), (rename.other, rename.one)):
                    if old in spelling:
                        spellings.append(spelling.replace(old, new))
    return list(dict.fromkeys(spelling[1:] for spelling in spellings[1:]))


def copied_from_base(name: str) -> str | None:
    """The path of the base's weight that an adapter's tensor may be a copy of; None when its name says no such thing.

    PEFT saves a whole embedding beside its LoRA factors, as `<module>.base_layer.weight`.
    """
    path = name.removeprefix("base_model.model.")
    return path.replace(".base_layer.", ".") if path.endswith(".weight") else None
