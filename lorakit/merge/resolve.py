"""From an adapter's module paths to the names of tensors on disk.

An adapter names modules as the model class of its training did; a base on disk may have been saved from another class,
or by another version of it. What may differ is a prefix, so a few are tried, and the match has to be the only one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches

# What a path may begin with, longest first, and what may stand there on disk in its place.
PREFIXES = (
    "model.language_model.model.",
    "model.language_model.",
    "language_model.model.",
    "base_model.model.",
    "_orig_mod.",
    "module.",
    "transformer.",
    "language_model.",
    "model.",
    "",
)


class Resolver:
    """Finds the one weight of the base that a module path means."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)

    def weight_of(self, module: str) -> str | None:
        """The stored weight of the module; None when there is none, or when several are equally near."""
        return self.tensor_of(f"{module}.weight")

    def tensor_of(self, path: str) -> str | None:
        """The stored tensor that a path such as `model.norm.weight` means."""
        if path in self.names:
            return path
        found = {candidate for candidate in _candidates(path) if candidate in self.names}
        return found.pop() if len(found) == 1 else None

    def nearest(self, module: str, count: int = 3) -> list[str]:
        """The stored names that look most like the module's path."""
        weights = (name.removesuffix(".weight") for name in self.names if name.endswith(".weight"))
        return [f"{name}.weight" for name in get_close_matches(module, list(weights), n=count, cutoff=0.5)]


def _candidates(path: str) -> Iterator[str]:
    for old in PREFIXES:
        if path.startswith(old):
            yield from (new + path.removeprefix(old) for new in PREFIXES)


def copied_from_base(name: str) -> str | None:
    """The path of the base's weight that an adapter's tensor may be a copy of; None when its name says no such thing.

    PEFT saves a whole embedding beside its LoRA factors, as `<module>.base_layer.weight`.
    """
    path = name.removeprefix("base_model.model.")
    return path.replace(".base_layer.", ".") if path.endswith(".weight") else None
