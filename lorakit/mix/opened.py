"""What a person names, as adapters that can be mixed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.as_lora import NEEDS_SHAPES
from lorakit.adapters.config import AVERAGED
from lorakit.adapters.naming import apart, ensure_one_naming, renamed
from lorakit.adapters.plain import as_lora
from lorakit.adapters.trained import trained_of
from lorakit.checkpoints.locate import open_adapter
from lorakit.errors import UnsupportedAdapter, WrongBase
from lorakit.merge.base import BaseModel, read_base
from lorakit.merge.layers import is_transposed
from lorakit.merge.resolve import Resolver

AdapterLike = Adapter | str | os.PathLike[str]
BaseLike = str | os.PathLike[str]


def opened(adapter: AdapterLike, base: BaseModel | None = None) -> Adapter:
    """An adapter as LoRA, whatever method of PEFT it is of, where that is exact.

    `base` is looked at (its headers alone) for the methods whose files don't say how large a layer is; without it, the
    one that the adapter names.

    Raises:
        NotFound: there is no such adapter, or no such base.
        UnsupportedAdapter: what it changes is not of low rank, or depends on the base's values.
    """
    found = adapter if isinstance(adapter, Adapter) else open_adapter(os.fspath(adapter))
    if found.config.peft_type == "LORA":
        return found
    if found.config.peft_type not in NEEDS_SHAPES:
        return as_lora(found)
    if base is None and found.base is None:
        raise UnsupportedAdapter(
            f"adapter '{found.name}' ({found.config.peft_type}) doesn't say how large the layers are that it changes: "
            f"name its base with --base"
        )
    return as_lora(found, _Shapes(base or read_base(str(found.base))))


def with_one_naming(adapters: Sequence[Adapter], base: BaseModel | None) -> list[Adapter]:
    """The adapters with the same names for the same modules: the longer ones, which are those of the class with a head.

    Raises:
        WrongBase: the names differ, and there is no base, or not of that model, to say whether they mean the same.
    """
    found = list(adapters)
    for i, j in combinations(range(len(found)), 2):
        before = apart(found[i].deltas, found[j].deltas)
        if before is None:
            continue
        if base is None:
            ensure_one_naming(found[i], found[j])
        elif _mean_the_same(found[i], *before, base):
            short, long = sorted(before, key=len)
            shorter = i if before[0] == short else j
            found[shorter] = renamed(found[shorter], short, long)
    return found


def _mean_the_same(adapter: Adapter, old: str, new: str, base: BaseModel | None) -> bool:
    resolver = Resolver(base.tensors if base else ())
    module = next(module for module in adapter.deltas if module.startswith(old) and module != old)
    mine, theirs = (resolver.weight_of(path) for path in (module, new + module.removeprefix(old)))
    if mine is None and theirs is None:
        raise WrongBase(
            f"the base has no weight for '{module}' of adapter '{adapter.name}': it was made for another one"
        )
    return mine is None or theirs is None or mine == theirs


def require_device(device: str) -> None:
    """Raises UsageError where this machine has no such device."""
    if device not in ("auto", "cpu"):
        from lorakit.merge.blocks import usable_device

        usable_device(device)


def with_trained(adapter: Adapter) -> Adapter:
    """The same with its trained copies as what can be averaged and written, not as tensors that nothing is known of."""
    found, rest = trained_of(adapter.config, adapter.others, adapter.name)
    if not found:
        return adapter
    raw = {name: value for name, value in adapter.config.raw.items() if name not in AVERAGED}
    return replace(adapter, trained=found, others=tuple(rest), config=replace(adapter.config, raw=raw))


class _Shapes(Mapping[str, tuple[int, int]]):
    """(out, in) of a base's matrices by the path that an adapter calls them."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._resolver = Resolver(base.tensors)

    def __getitem__(self, module: str) -> tuple[int, int]:
        name = self._resolver.weight_of(module)
        if name is None or len(self._base.tensors[name].shape) != 2:
            raise KeyError(module)
        rows, columns = self._base.tensors[name].shape
        return (columns, rows) if is_transposed(name, self._base) else (rows, columns)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base.tensors)

    def __len__(self) -> int:
        return len(self._base.tensors)
