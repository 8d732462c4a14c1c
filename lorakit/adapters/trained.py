"""What an adapter holds beside deltas: tensors that stand in the place of the base's, whole (`modules_to_save`, biases)
or by rows (`trainable_token_indices`); and what is added to biases (`lora_bias`).

Trained copies are values of weights, not changes, so no weight says how much of them there should be: they can only be
averaged, and only when that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorakit.adapters.config import AdapterConfig
from lorakit.adapters.keys import base_path, is_base_copy, is_table, parse_key
from lorakit.errors import InvalidFile, UnsupportedAdapter, UsageError, WrongBase
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import FLOATS, load_floats, load_tensor, same_bytes

if TYPE_CHECKING:
    import torch

Weigh = Callable[[str], float]
CLASSIFIERS = ("classifier", "score")  # PEFT names both in `modules_to_save`, whichever of the two the model has


@dataclass(frozen=True, slots=True)
class Blend:
    """Σ factor · tensor, of stored tensors of one shape."""

    parts: tuple[tuple[StoredTensor, float], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0][0].shape

    @property
    def dtype(self) -> str:
        """The stored one where there is nothing to compute, else float32."""
        (first, factor), *more = self.parts
        return first.dtype if factor == 1 and not more else "F32"

    def load(self) -> torch.Tensor:
        """Of `dtype`; summed in float64."""
        import torch

        (first, factor), *more = self.parts
        if factor == 1 and not more:
            return load_floats(first) if first.dtype in FLOATS else load_tensor(first)
        total = torch.zeros(self.shape, dtype=torch.float64)
        for stored, factor in self.parts:
            total += factor * load_floats(stored).double()
        return total.float()

    def scaled(self, weight: float) -> Blend:
        return Blend(tuple((stored, factor * weight) for stored, factor in self.parts))

    def plus(self, other: Blend, *, name: str) -> Blend:
        """Raises WrongBase when the shapes differ."""
        if self.shape != other.shape:
            raise WrongBase(
                f"'{name}' is {list(self.shape)} in one adapter and {list(other.shape)} in another: "
                f"they were made for different bases"
            )
        together = dict(self.parts)
        for stored, factor in other.parts:
            together[stored] = together.get(stored, 0.0) + factor
        return Blend(tuple(together.items()))


@dataclass(frozen=True, slots=True)
class Rows:
    """Trained rows of an embedding, of one adapter or several: each the average, by weight, over those that have it.

    `parts` are (rows as stored, (count, features)), their indices in the embedding, and the weight.
    """

    parts: tuple[tuple[StoredTensor, tuple[int, ...], float], ...]

    @property
    def indices(self) -> tuple[int, ...]:
        return tuple(sorted({index for _, indices, _ in self.parts for index in indices}))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.indices), self.parts[0][0].shape[1]

    def load(self) -> torch.Tensor:
        """(len(indices), features), in float32."""
        import torch

        place = {index: row for row, index in enumerate(self.indices)}
        total = torch.zeros(self.shape, dtype=torch.float64)
        weights = torch.zeros(len(place), 1, dtype=torch.float64)
        for stored, indices, weight in self.parts:
            rows = torch.tensor([place[index] for index in indices])
            total.index_add_(0, rows, weight * load_floats(stored).double())
            weights.index_add_(0, rows, torch.full((len(indices), 1), weight, dtype=torch.float64))
        return (total / weights).float()


@dataclass(frozen=True, slots=True)
class Trained:
    """What stands in the base's place: whole tensors by their path in the base, rows by their embedding's.

    `modules` are the config's `modules_to_save`, `bias` its `bias`.
    """

    tensors: Mapping[str, Blend] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    bias: str = "none"

    @property
    def owners(self) -> tuple[str, ...]:
        """The paths of the modules that have any."""
        return tuple(dict.fromkeys((*(owner_of(path) for path in self.tensors), *self.rows)))

    def __bool__(self) -> bool:
        return bool(self.tensors or self.rows)


def owner_of(path: str) -> str:
    """The module of a tensor's path, or of rows."""
    return path.removesuffix(".weight").removesuffix(".bias")


def spellings_of(module: str) -> tuple[str, ...]:
    """The names under one of which a file has a module that `modules_to_save` names."""
    return CLASSIFIERS if module in CLASSIFIERS else (module,)


def rows_of(config: AdapterConfig, module: str) -> tuple[int, ...] | None:
    """The rows of an embedding that `trainable_token_indices` names; None where it names none of this module."""
    said = config.raw.get("trainable_token_indices", config.raw.get("token_indices"))
    if isinstance(said, dict):
        said = next((rows for path, rows in said.items() if f".{module}".endswith(f".{path}")), None)
    if not isinstance(said, list) or not all(isinstance(row, int) for row in said):
        return None
    return tuple(said)


def trained_of(config: AdapterConfig, others: Sequence[StoredTensor], name: str) -> tuple[Trained, list[StoredTensor]]:
    """What of an adapter's tensors was trained in place of the base's, and what is none of it.

    Raises:
        InvalidFile: rows without their indices.
    """
    tensors: dict[str, Blend] = {}
    rows: dict[str, Rows] = {}
    rest: list[StoredTensor] = []
    for stored in others:
        key = parse_key(stored.name)
        path = base_path(stored.name)
        if key.part == "token_rows":
            indices = rows_of(config, key.module)
            if indices is None or len(stored.shape) != 2 or not len(indices) == len(set(indices)) == stored.shape[0]:
                raise InvalidFile(
                    f"'{name}': '{stored.name}' is {list(stored.shape)}, and trainable_token_indices names "
                    f"{'no' if indices is None else len(set(indices))} rows of '{key.module}'"
                )
            rows[key.module] = Rows(((stored, indices, 1.0),))
        elif key.part == "other" and ".original_module." not in stored.name and _is_asked_for(config, path):
            tensors[path] = Blend(((stored, 1.0),))
        else:
            rest.append(stored)
    saved = tuple(str(module) for module in config.raw.get("modules_to_save") or ())
    return Trained(tensors, rows, saved, str(config.raw.get("bias") or "none")), rest


def _is_asked_for(config: AdapterConfig, path: str) -> bool:
    """Whether the config speaks of such a tensor: a bias, or one below a module to save.

    PEFT saves the modules whose path ends in one of the names (peft/utils/other.py, `_set_trainable`): "norm" is
    "input_layernorm" too.
    """
    module, _, leaf = path.rpartition(".")
    if leaf == "bias" and (config.raw.get("bias") or "none") != "none":
        return True
    parts = module.split(".")
    above = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return any(ancestor.endswith(str(saved)) for saved in config.raw.get("modules_to_save") or () for ancestor in above)


def is_kept(config: AdapterConfig, name: str) -> bool:
    """Whether it is the base's own table, or one of a resized vocabulary: kept as it is, where adapters agree on it."""
    return is_base_copy(name) or (is_table(name) and not _is_asked_for(config, base_path(name)))


def averaged(parts: Sequence[tuple[Trained, Weigh]]) -> tuple[Trained, tuple[str, ...]]:
    """Each tensor's average, by weight, over the adapters that hold it, and words on those that not all of them do.

    `Weigh` gives an adapter's weight for a path.

    Raises:
        UsageError: the weights of those that hold a tensor add up to nothing.
        WrongBase: shapes differ.
    """
    tensors: dict[str, Blend] = {}
    rows: dict[str, Rows] = {}
    notes: list[str] = []
    for path in dict.fromkeys(path for trained, _ in parts for path in trained.tensors):
        holders = [(trained.tensors[path], weigh(path)) for trained, weigh in parts if path in trained.tensors]
        tensors[path] = _average(path, holders)
        notes += _held_by_some(f"'{path}'", len(holders), len(parts))
    for path in dict.fromkeys(path for trained, _ in parts for path in trained.rows):
        owners = [(trained.rows[path], weigh(path)) for trained, weigh in parts if path in trained.rows]
        rows[path] = _average_rows(path, owners)
        notes += _held_by_some(f"rows of '{path}'", len(owners), len(parts))
    modules = tuple(dict.fromkeys(module for trained, _ in parts for module in trained.modules))
    biases = {trained.bias for trained, _ in parts} - {"none"}
    bias = "none" if not biases else biases.pop() if len(biases) == 1 else "all"
    return Trained(tensors, rows, modules, bias), tuple(notes)


def _held_by_some(what: str, holders: int, adapters: int) -> list[str]:
    if holders == adapters:
        return []
    return [f"{what}: trained in {holders} of {adapters} adapters, so averaged over those alone"]


def _average(path: str, holders: Sequence[tuple[Blend, float]]) -> Blend:
    total = _total(path, [weight for _, weight in holders])
    first = holders[0][0]
    if all(len(blend.parts) == 1 and same_bytes(blend.parts[0][0], first.parts[0][0]) for blend, _ in holders):
        return first
    if any(stored.dtype not in FLOATS for blend, _ in holders for stored, _ in blend.parts):
        raise UnsupportedAdapter(f"'{path}' is of no floating dtype, and differs between adapters: it has no average")
    blend = first.scaled(holders[0][1] / total)
    for other, weight in holders[1:]:
        blend = blend.plus(other.scaled(weight / total), name=path)
    return blend


def _average_rows(path: str, holders: Sequence[tuple[Rows, float]]) -> Rows:
    widths = {rows.shape[1] for rows, _ in holders}
    if len(widths) > 1:
        raise WrongBase(f"the trained rows of '{path}' are {sorted(widths)} wide: they were made for different bases")
    parts = tuple((stored, indices, own * weight) for rows, weight in holders for stored, indices, own in rows.parts)
    for index in {index for _, indices, _ in parts for index in indices}:
        _total(f"row {index} of {path}", [weight for _, indices, weight in parts if index in indices])
    return Rows(parts)


def _total(path: str, weights: Sequence[float]) -> float:
    total = sum(weights)
    if abs(total) < 1e-12:
        raise UsageError(f"'{path}' can't be averaged: the weights of the adapters that trained it add up to 0")
    return total
