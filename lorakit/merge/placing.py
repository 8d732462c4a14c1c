"""From an adapter's tensors to steps on the base's weights: each tensor is entered once, placed or not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.config import AdapterConfig
from lorakit.adapters.delta import Delta
from lorakit.errors import InvalidFile, Refused, UnplacedTensors, UnsupportedAdapter, WrongBase
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import FLOATS
from lorakit.merge.features import changed_start, require_mergeable_lora
from lorakit.merge.layers import is_transposed
from lorakit.merge.model import Model
from lorakit.merge.plan import SHOWN, Placement
from lorakit.merge.resolve import Resolver
from lorakit.merge.steps import AddProduct, Dora, Matrix, Step, SubtractInit, matrix, product_of


class Placer:
    """Collects the steps of every weight, in the order of the adapters.

    `dtypes`, `homes` and `columns` are for weights that are not simply the base's: what they are written as, in which
    of the base's shards they stand, and how many columns they have as a matrix.
    """

    def __init__(self, model: Model, *, expert_layout: str | None = None) -> None:
        self.model = model
        self.expert_layout = expert_layout
        self.resolver = Resolver(model.tensors)
        self.steps: dict[str, list[Step]] = {}
        self.dtypes: dict[str, str] = {}
        self.homes: dict[str, Path] = {}
        self.columns: dict[str, int] = {}
        self.notes: list[str] = list(model.notes)
        self.ensured_tied = False
        self.missing: list[str] = []  # what an adapter's config speaks of and its file lacks
        self.placements: dict[tuple[Path, str], Placement] = {}
        self._weights_of: dict[tuple[Path, str], list[str]] = {}
        self._unplaced: dict[tuple[Path, str], str] = {}

    def place(self, adapter: Adapter) -> None:
        """Enter every tensor of an adapter.

        Raises:
            UnsupportedAdapter, WrongBase, UnplacedTensors, InvalidFile, Refused: see `plan_merge`.
        """
        from lorakit.merge.others import OtherTensors

        for source in adapter.files():
            if source.config.peft_type == "LORA":
                require_mergeable_lora(source.config, str(source.folder))
        self.ensured_tied |= any(source.config.raw.get("ensure_weight_tying") is True for source in adapter.files())
        others = OtherTensors(self, adapter)
        others.place_bases()
        taken: dict[str, str] = {}
        for module, delta in adapter.deltas.items():
            self._place_delta(adapter, module, delta, others.magnitudes, taken)
        others.place()

    # what every kind of tensor needs

    def add_step(self, weight: str, step: Step) -> None:
        self.steps.setdefault(weight, []).append(step)

    def enter(self, stored: StoredTensor, weight: str, role: str) -> None:
        """Say where a tensor went: into one weight, or, with the factors of all experts of a layer, into several."""
        key = stored.file, stored.name
        weights = self._weights_of.setdefault(key, [])
        if weight not in weights:
            weights.append(weight)
        where = weight if len(weights) == 1 else f"{weights[0]} and {len(weights) - 1} more"
        self.placements[key] = Placement(str(stored.file.parent), stored.name, where, role)

    def leave_out(self, stored: StoredTensor, reason: str) -> None:
        self._unplaced[stored.file, stored.name] = reason

    def unplaced_lines(self) -> tuple[str, ...]:
        several = len({file for file, _ in self._unplaced}) > 1
        return tuple(
            f"{f'{file.parent}: ' if several else ''}{name}: {reason}"
            for (file, name), reason in self._unplaced.items()
        )

    def reason_for(self, module: str) -> str:
        """Why there is no place for it. Looking for near names takes long, and a reader needs few of them."""
        if otherwise := self.resolver.stored_otherwise(module):
            return otherwise
        nearest = self.resolver.nearest(module) if len(self._unplaced) < SHOWN else []
        return f"nearest in the base: {', '.join(nearest)}" if nearest else "no weight of the base takes it"

    def require_floats(self, adapter: Adapter, weight: StoredTensor, tensors: Iterator[StoredTensor]) -> None:
        """Raises where arithmetic on the stored numbers makes no sense."""
        odd = next((stored for stored in tensors if stored.dtype not in FLOATS), None)
        if odd is not None:
            raise UnsupportedAdapter(f"'{odd.name}' is stored as {odd.dtype}: save the adapter in bf16, fp16 or fp32")
        base = self.model.base
        if weight.name in self.model.quantised and self.model.onto not in ("dequantised", "same"):
            raise Refused(
                f"'{weight.name}' of base '{base.reference}' is quantised (by {base.quantised}): name the original "
                f"model with --base, or say --onto dequantised (what the adapter was trained on, written in 16 bit) "
                f"or --onto same (written quantised again)"
            )
        if weight.dtype not in FLOATS:
            said = f" (quantised by {base.quantised})" if base.quantised else ""
            raise Refused(
                f"'{weight.name}' of base '{base.reference}' is stored as {weight.dtype}{said}: "
                f"merge onto the model before it was quantised"
            )

    # low-rank factors

    def _place_delta(
        self, adapter: Adapter, module: str, delta: Delta, magnitudes: Mapping[str, StoredTensor], taken: dict[str, str]
    ) -> None:
        name = self.resolver.weight_of(module)
        if name is None and self._place_in_stack(adapter, module, delta, module in magnitudes):
            return
        if name is None:
            reason = self.reason_for(module)
            for stored in _stored(delta):
                self.leave_out(stored, reason)
            return
        if name in taken and len(adapter.files()) == 1:
            raise UnplacedTensors(f"adapter '{adapter.name}': '{module}' and '{taken[name]}' both mean '{name}'")
        taken[name] = module
        weight = self.model.tensors[name]
        self.require_floats(adapter, weight, _stored(delta))
        transposed = delta.kind == "embedding" or is_transposed(name, self.model.base)
        products = [product_of(term, transposed=transposed) for term in delta.stored]
        if adapter.config.raw.get("use_qalora") and products[0].shape != weight.shape:
            products = [_pooled(product, adapter.config, weight, transposed) for product in products]
        for product in products:
            self.require_shape(adapter, module, product.shape, weight, weight.shape)
        config = adapter.config
        method = changed_start(config)
        if method is not None:
            if self.steps.get(name):
                raise UnsupportedAdapter(
                    f"adapter '{adapter.name}' was started from the base itself (init_lora_weights "
                    f"'{config.raw['init_lora_weights']}'): merge it alone, or first"
                )
            (term,) = delta.stored
            self.add_step(name, SubtractInit(method, term.rank, config.scale_of(module), term.weight, transposed))
        magnitude = magnitudes.get(module)
        for term, product in zip(delta.stored, products, strict=True):
            if magnitude is None:
                self._add_product(name, product)
            else:
                whole = AddProduct(product.B, product.A, term.scale, transposed)
                self.add_dora(adapter, module, name, whole, magnitude, term.weight)
            self.enter(term.B, name, "B")
            self.enter(term.A, name, "A")

    def _place_in_stack(self, adapter: Adapter, module: str, delta: Delta, is_dora: bool) -> bool:
        """One expert's layer, where the base stores those of all experts as one tensor."""
        from lorakit.merge.experts import expert_slice

        part = expert_slice(module, delta.shape, self.model.tensors, self.resolver)
        if part is None:
            return False
        if is_dora or changed_start(adapter.config):
            raise UnsupportedAdapter(
                f"adapter '{adapter.name}' has more than low-rank factors for '{module}', which the base stores as a "
                f"part of '{part.weight}': use a base that stores its experts one by one"
            )
        self.require_floats(adapter, self.model.tensors[part.weight], _stored(delta))
        for term in delta.stored:
            product = AddProduct(matrix(term.B), matrix(term.A), term.factor, part.transposed, part.first_row)
            self._add_product(part.weight, product)
            self.enter(term.B, part.weight, "B")
            self.enter(term.A, part.weight, "A")
        return True

    def require_shape(
        self, adapter: Adapter, module: str, mine: tuple[int, ...], weight: StoredTensor, theirs: tuple[int, ...]
    ) -> None:
        """Raises WrongBase when what is added is not of the weight's shape."""
        if mine != theirs:
            raise WrongBase(
                f"adapter '{adapter.name}' was made for another base: its '{module}' is {list(mine)}, "
                f"and '{weight.name}' of '{self.model.base.reference}' is {list(theirs)}"
            )

    def add_dora(
        self, adapter: Adapter, module: str, name: str, product: AddProduct, magnitude: StoredTensor, weight: float
    ) -> None:
        outputs = product.B.shape[0]
        if math.prod(magnitude.shape) != outputs:
            raise InvalidFile(
                f"'{adapter.name}': '{magnitude.name}' has the shape {list(magnitude.shape)}, "
                f"and '{module}' has {outputs} outputs"
            )
        self.add_step(name, Dora(magnitude, product, by_column=product.transposed, weight=weight))
        self.enter(magnitude, name, "magnitude")

    def _add_product(self, name: str, product: AddProduct) -> None:
        """The same factors again become one step with the weights added up: an adapter that is named twice."""
        steps = self.steps.setdefault(name, [])
        for index, step in enumerate(steps):
            if isinstance(step, AddProduct) and (step.B, step.A) == (product.B, product.A):
                steps[index] = AddProduct(step.B, step.A, step.factor + product.factor, step.transposed, step.first_row)
                return
        steps.append(product)

    def add_convolution(
        self, adapter: Adapter, module: str, name: str, A: StoredTensor, B: StoredTensor, magnitude: StoredTensor | None
    ) -> None:
        """A (r, in, *kernel) and B (out, r, 1, …): the product of both as matrices, in the weight's own shape."""
        weight = self.model.tensors[name]
        source = adapter.files()[0]
        self.require_floats(adapter, weight, iter((A, B)))
        self.require_shape(adapter, module, (B.shape[0], *A.shape[1:]), weight, weight.shape)
        scale = source.config.scale_of(module)
        self.columns[name] = math.prod(weight.shape[1:])
        if magnitude is None:
            self._add_product(name, AddProduct(matrix(B), matrix(A), scale * source.weight))
        else:
            self.add_dora(adapter, module, name, AddProduct(matrix(B), matrix(A), scale), magnitude, source.weight)
        self.enter(A, name, "A")
        self.enter(B, name, "B")


def _stored(delta: Delta) -> Iterator[StoredTensor]:
    for term in delta.stored:
        yield from (term.A, term.B)


def _pooled(product: AddProduct, config: AdapterConfig, weight: StoredTensor, transposed: bool) -> AddProduct:
    """QA-LoRA (arXiv:2309.14717) as PEFT computes it (peft/tuners/lora/variants.py, `QALoraLinearVariant.forward`):
    inputs are averaged over groups of g and multiplied by the number of groups, so each column of A stands g times,
    with the factor (in / g) / g.
    """
    group = config.raw.get("qalora_group_size", 16)
    into = weight.shape[0] if transposed else weight.shape[-1]
    groups = product.A.shape[1]
    if not isinstance(group, int) or group < 1 or groups * group != into:
        raise InvalidFile(f"qalora_group_size is {group!r}: A has {groups} columns, and '{weight.name}' {into} inputs")
    repeated = Matrix(product.A.stored, product.A.view, product.A.picked, repeat=group)
    return AddProduct(product.B, repeated, product.factor * (groups / group), product.transposed)
