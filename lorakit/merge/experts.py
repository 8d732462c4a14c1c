"""LoRA on mixtures of experts: from factors of all experts at once, or of one, to the weights as they stand on disk.

PEFT's `target_parameters` (peft/tuners/lora/layer.py, `ParamWrapper`) keeps A as (experts · r, in), expert after
expert, and B as (out, r · experts), with the expert fastest. The file doesn't name the parameter: several of one module
are wrappers in one another, `experts.base_layer.lora_A` inside `experts.lora_A`. A base may hold all experts in one
tensor or each in its own, whichever the adapter has.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from lorakit.adapters.config import AdapterConfig
from lorakit.errors import UnsupportedAdapter, WrongBase
from lorakit.files.safetensors import StoredTensor
from lorakit.merge.expert_layout import check_layout, has_input_first, is_grouped_by_expert
from lorakit.merge.families import EXPERT_LAYERS, EXPERT_PARAMETERS, EXPERT_PARTS
from lorakit.merge.resolve import Resolver
from lorakit.merge.steps import AddProduct, Matrix, Picked

_ONE_EXPERT = re.compile(r"^(?P<experts>.+)\.(?P<index>\d+)\.(?P<layer>[^.]+)$")


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a parameter: of each expert, the tensor that holds them and the first of them in it."""

    rows: int
    columns: int
    places: tuple[tuple[StoredTensor, int], ...]


@dataclass(frozen=True, slots=True)
class Stacked:
    """A parameter with the weights of all experts, each of `shape`, and its parts on disk from the top."""

    path: str
    parts: tuple[Part, ...]
    flat: bool = False  # a parameter of two axes, for which PEFT has one way only

    @property
    def experts(self) -> int:
        return len(self.parts[0].places)

    @property
    def tensors(self) -> frozenset[str]:
        return frozenset(stored.name for part in self.parts for stored, _ in part.places)

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.rows for part in self.parts), self.parts[0].columns


@dataclass(frozen=True, slots=True)
class Pair:
    """The factors of one wrapper; `depth` is how many others are around it."""

    module: str
    depth: int
    A: StoredTensor
    B: StoredTensor


@dataclass(frozen=True, slots=True)
class ExpertSlice:
    """Where one expert's weight stands in the tensor of all: from row `first_row` of its matrix on."""

    weight: str
    first_row: int
    transposed: bool


class Experts:
    """The base's experts, found by what an adapter calls them."""

    def __init__(self, tensors: Mapping[str, StoredTensor], resolver: Resolver) -> None:
        self._tensors = tensors
        self._resolver = resolver

    def stacked(self, module: str, parameter: str) -> Stacked | None:
        path = f"{module}.{parameter}"
        stored = self._tensor(path)
        if stored is not None and len(stored.shape) == 2:
            return Stacked(path, (Part(*stored.shape, ((stored, 0),)),), flat=True)
        whole = self._in_one(stored)
        if whole is not None:
            return Stacked(path, (whole,))
        parts = []
        for layer in EXPERT_PARTS.get(parameter, (parameter,)):
            part = self._in_one(self._tensor(f"{module}.{layer}")) or self._one_by_one(module, layer)
            if part is None:
                return None
            parts.append(part)
        if len({(part.columns, len(part.places)) for part in parts}) > 1:
            raise WrongBase(f"the base does not have the same experts in every tensor of '{module}'")
        return Stacked(path, tuple(parts))

    def targeted(self, module: str, config: AdapterConfig) -> list[Stacked]:
        """The module's parameters that the adapter may have been trained on, in the order of the module."""
        targets = [target for target in config.raw.get("target_parameters") or () if isinstance(target, str)]
        leaves = (target.rpartition(".")[2] for target in targets)
        named = {leaf for leaf in leaves if any(f".{module}.{leaf}".endswith(f".{target}") for target in targets)}
        known = [leaf for leaf in EXPERT_PARAMETERS if not named or leaf in named]
        found: dict[str, Stacked] = {}
        for leaf in (*known, *sorted(named.difference(known))):
            stack = self.stacked(module, leaf)
            # the halves of a parameter, and other names for it, are the same tensors again
            if stack is not None and not any(stack.tensors & other.tensors for other in found.values()):
                found[leaf] = stack
        return list(found.values())

    def stores_input_first(self, module: str) -> bool | None:
        """Whether the base has (in, out) rather than (out, in), as the shapes of both parameters tell together."""
        upper, lower = self.stacked(module, "gate_up_proj"), self.stacked(module, "down_proj")
        if upper is None or lower is None:
            return None
        is_out_in = upper.shape == (2 * lower.shape[1], lower.shape[0])
        is_in_out = upper.shape == (lower.shape[1], 2 * lower.shape[0])
        return is_in_out if is_out_in != is_in_out else None

    def alternates(self, module: str) -> bool:
        """Whether gate and up stand in turns in one parameter, as in GPT-OSS, whose experts alone have biases."""
        return self._tensor(f"{module}.gate_up_proj_bias") is not None

    def is_transposed(self, module: str) -> bool:
        """Whether the class of the module says `is_transposed` of itself: GPT-OSS and Aria."""
        upper = self._tensor(f"{module}.gate_up_proj")
        return self.alternates(module) or (upper is not None and upper.name.endswith(".experts.fc1.weight"))

    def _tensor(self, path: str) -> StoredTensor | None:
        found = self._resolver.tensor_of(path)
        return None if found is None else self._tensors[found]

    def _in_one(self, stored: StoredTensor | None) -> Part | None:
        if stored is None or len(stored.shape) != 3:
            return None
        count, rows, columns = stored.shape
        return Part(rows, columns, tuple((stored, index * rows) for index in range(count)))

    def _one_by_one(self, module: str, layer: str) -> Part | None:
        first = self._tensor(f"{module}.0.{layer}.weight")
        if first is None or len(first.shape) != 2:
            return None
        head, _, tail = first.name.rpartition(".0.")
        names = itertools.takewhile(
            self._tensors.__contains__, (f"{head}.{index}.{tail}" for index in itertools.count())
        )
        places = tuple((self._tensors[name], 0) for name in names)
        if any(stored.shape != first.shape for stored, _ in places):
            raise WrongBase(f"the experts of '{module}' don't have the same shapes in the base")
        return Part(*first.shape, places)


def expert_products(
    config: AdapterConfig,
    pairs: Mapping[str, tuple[StoredTensor, StoredTensor]],
    tensors: Mapping[str, StoredTensor],
    resolver: Resolver,
    *,
    name: str,
    folder: Path | None = None,
    weight: float = 1.0,
    layout: str | None = None,
) -> tuple[list[tuple[str, AddProduct]], list[str]]:
    """What the factors (A, B) of `target_parameters` add to which stored weights; and the modules without a place.

    `layout` is one of `LAYOUTS`, for what neither the adapter nor the shapes say. `folder` is the adapter's: by
    default its `name` is that.

    Raises:
        WrongBase: shapes and ranks fit none of the module's parameters.
        UnsupportedAdapter: they fit in several ways, and nothing says in which.
        UsageError: there is no such layout.
    """
    check_layout(layout)
    experts = Experts(tensors, resolver)
    is_grouped = cache(lambda: is_grouped_by_expert(config, folder or Path(name), name=name, layout=layout))
    modules: dict[str, list[Pair]] = {}
    for wrapper, (a, b) in pairs.items():
        module = re.sub(r"(\.base_layer)+$", "", wrapper)
        modules.setdefault(module, []).append(Pair(wrapper, wrapper[len(module) :].count(".base_layer"), a, b))
    products: list[tuple[str, AddProduct]] = []
    without: list[str] = []
    for module, found in modules.items():
        stacks = experts.targeted(module, config)
        if not stacks:
            without += [pair.module for pair in found]
            continue
        placed = _assigned(config, found, stacks, name)
        turned = _turned(experts, module, config, placed, name, layout)
        for (pair, stack), transposed in zip(placed, turned, strict=True):
            # of one expert, or at rank 1, both orders of B are the same
            grouped = stack.experts > 1 and pair.A.shape[0] > stack.experts and is_grouped()
            factor = weight * config.scale_of(stack.path)
            products += _products(pair, stack, transposed=transposed, grouped=grouped, factor=factor)
    return products, without


def _assigned(
    config: AdapterConfig, pairs: Sequence[Pair], stacks: Sequence[Stacked], name: str
) -> list[tuple[Pair, Stacked]]:
    """Each pair with its parameter: the only one that fits, or else by PEFT's order.

    PEFT wraps in the order of the module's parameters, so the first of them is the innermost wrapper.
    """
    ways = [
        way
        for way in itertools.permutations(stacks, len(pairs))
        if all(_fits(config, pair, stack) for pair, stack in zip(pairs, way, strict=True))
    ]
    if not ways:
        found = "; ".join(f"'{p.module}' A {list(p.A.shape)}, B {list(p.B.shape)}" for p in pairs)
        wanted = "; ".join(
            f"'{s.path}' {s.experts} of {list(s.shape)} at rank {config.rank_of(s.path)}" for s in stacks
        )
        raise WrongBase(f"adapter '{name}' was made for another base: it has {found}, and the base {wanted}")
    if len(ways) > 1:
        ways = [way for way in ways if way == _by_order(config, pairs, stacks)]
    if not ways:
        raise UnsupportedAdapter(
            f"adapter '{name}': the factors of '{pairs[0].module}' fit several parameters of the base "
            f"({', '.join(stack.path for stack in stacks)}): name those it was trained on as target_parameters in its "
            f"adapter_config.json"
        )
    return list(zip(pairs, ways[0], strict=True))


def _by_order(config: AdapterConfig, pairs: Sequence[Pair], stacks: Sequence[Stacked]) -> tuple[Stacked, ...] | None:
    leaves = [stack.path.rpartition(".")[2] for stack in stacks]
    if not all(leaf in EXPERT_PARAMETERS for leaf in leaves):
        return None
    if len(pairs) != len(stacks) or any(pair.depth >= len(stacks) for pair in pairs):
        return None
    return tuple(stacks[len(stacks) - 1 - pair.depth] for pair in pairs)


def _fits(config: AdapterConfig, pair: Pair, stack: Stacked) -> bool:
    rank = config.rank_of(stack.path)
    return pair.A.shape[0] == pair.B.shape[1] == rank * stack.experts and bool(_ways(pair, stack))


def _ways(pair: Pair, stack: Stacked) -> set[bool]:
    """Whether B A is to be turned over to be of the weight's shape: may be both where that is square."""
    shape = pair.B.shape[0], pair.A.shape[1]
    ways = {False} if shape == stack.shape else set()
    return ways | {True} if shape == stack.shape[::-1] and not stack.flat else ways


def _turned(
    experts: Experts,
    module: str,
    config: AdapterConfig,
    placed: Sequence[tuple[Pair, Stacked]],
    name: str,
    layout: str | None,
) -> list[bool]:
    """Of each, whether B A is added turned over. What is square is as the other parameter of the module."""
    ways = [_ways(pair, stack) for pair, stack in placed]
    told = {way for certain in ways if len(certain) == 1 for way in certain}
    if len(told) != 1 and any(len(way) > 1 for way in ways):
        input_first = experts.stores_input_first(module)
        is_transposed = experts.is_transposed(module)
        if input_first and not is_transposed and ".feed_forward.experts" not in f".{module}":
            # Llama 4's class has the parameters as they are stored; others (Qwen3-VL-MoE) turn them over at load,
            # and did not in every version
            raise UnsupportedAdapter(
                f"adapter '{name}': the experts of '{module}' are square, and nothing says which side is the input"
            )
        told = {has_input_first(config, name=name, module=module, layout=layout, is_transposed=is_transposed)}
    return [next(iter(way)) if len(way) == 1 else next(iter(told)) for way in ways]


def _products(
    pair: Pair, stack: Stacked, *, transposed: bool, grouped: bool, factor: float
) -> Iterator[tuple[str, AddProduct]]:
    """One for each expert and part."""
    count = stack.experts
    rank = pair.A.shape[0] // count
    view_a = count, rank, pair.A.shape[1]
    view_b = (pair.B.shape[0], count, rank) if grouped else (pair.B.shape[0], rank, count)
    first = 0
    for part in stack.parts:
        rows = (first, first + part.rows) if len(stack.parts) > 1 else None
        into, out = (rows, None) if transposed else (None, rows)
        for expert, (stored, first_row) in enumerate(part.places):
            picked: tuple[Picked, ...] = (out, expert, None) if grouped else (out, None, expert)
            a, b = Matrix(pair.A, view_a, (expert, None, into)), Matrix(pair.B, view_b, picked)
            yield stored.name, AddProduct(b, a, factor, transposed, first_row)
        first += part.rows


def expert_slice(
    module: str, shape: tuple[int, int], tensors: Mapping[str, StoredTensor], resolver: Resolver
) -> ExpertSlice | None:
    """Where one expert's layer of `shape` (out, in) is, when the base holds all experts in one tensor.

    Raises:
        WrongBase: it is of another shape there, or there are fewer experts.
        UnsupportedAdapter: it is no block of rows there.
    """
    match = _ONE_EXPERT.match(module)
    if match is None:
        return None
    layer = EXPERT_LAYERS.get(match["layer"], match["layer"])
    whole = next((whole for whole, layers in EXPERT_PARTS.items() if layer in layers), layer)
    experts = Experts(tensors, resolver)
    parts: tuple[str, ...] = ()
    for parameter in (layer, whole):
        parts = EXPERT_PARTS.get(parameter, (layer,))
        name = resolver.tensor_of(f"{match['experts']}.{parameter}")
        if name is not None and len(tensors[name].shape) == 3:
            break
    else:
        return None
    count, rows, columns = tensors[name].shape
    index, wanted = int(match["index"]), (shape[0] * len(parts), shape[1])
    if index >= count or wanted not in ((rows, columns), (columns, rows)):
        raise WrongBase(
            f"'{module}' of the adapter is {list(shape)}, and '{name}' of the base is {list(tensors[name].shape)}: "
            f"the adapter was made for another base"
        )
    transposed = wanted == (columns, rows)
    if rows == columns:
        transposed = experts.stores_input_first(match["experts"]) is True
    if len(parts) > 1 and (transposed or experts.alternates(match["experts"])):
        raise UnsupportedAdapter(
            f"'{module}' is no block of rows of '{name}' {list(tensors[name].shape)}, which can't be merged yet: "
            f"name a base that has each expert in tensors of its own with --base"
        )
    return ExpertSlice(name, index * rows + parts.index(layer) * shape[0], transposed)


def trained_slices(
    path: str, stored: StoredTensor, tensors: Mapping[str, StoredTensor], resolver: Resolver
) -> list[tuple[str, StoredTensor]]:
    """The base's tensor of each expert, and the rows of a trained (experts, rows, columns) that are meant for it.

    Nothing where the base does not store those experts one by one, in that shape.
    """
    module, _, parameter = path.rpartition(".")
    stack = Experts(tensors, resolver).stacked(module, parameter) if len(stored.shape) == 3 else None
    if stack is None or stored.shape != (stack.experts, *stack.shape):
        return []
    if any(len(target.shape) != 2 for part in stack.parts for target, _ in part.places):
        return []
    rows, columns = stack.shape
    width = stored.nbytes // max(1, stack.experts * rows)
    found: list[tuple[str, StoredTensor]] = []
    above = 0
    for part in stack.parts:
        for expert, (target, _) in enumerate(part.places):
            start = stored.start + (expert * rows + above) * width
            piece = replace(stored, shape=(part.rows, columns), start=start, end=start + part.rows * width)
            found.append((target.name, piece))
        above += part.rows
    return found
