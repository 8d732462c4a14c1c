"""The tensors of an adapter that are no plain low-rank factors: magnitudes, biases, trained copies, rows, experts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.keys import Key, base_path, parse_key
from lorakit.adapters.trained import rows_of, spellings_of
from lorakit.errors import InvalidFile, UnsupportedAdapter
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import load_tensor, same_bytes
from lorakit.merge.copies import equal_values
from lorakit.merge.layers import EMBEDDINGS, HEADS, layer_of
from lorakit.merge.steps import AddStored, Take, TakeRows

if TYPE_CHECKING:
    from lorakit.merge.placing import Placer

_ORIGINAL = ".original_module."
_BELOW = re.compile(r"\.(?:base_layer|original_module)\.")


class OtherTensors:
    """Sorts them at once, places them when asked."""

    def __init__(self, placer: Placer, adapter: Adapter) -> None:
        self.placer = placer
        self.adapter = adapter
        self.source = adapter.files()[0]
        self.magnitudes: dict[str, StoredTensor] = {}
        self._factors: dict[str, dict[str, StoredTensor]] = {}
        self._rest: list[tuple[Key, StoredTensor]] = []
        self._used: set[str] = set()
        for stored in adapter.others:
            key = parse_key(stored.name)
            if adapter.config.peft_type != "LORA":
                self._rest.append((key, stored))
            elif key.part == "lora_magnitude_vector":
                self.magnitudes[key.module] = stored
            elif key.part in ("lora_A", "lora_B"):
                self._factors.setdefault(key.module, {})[key.part] = stored
            else:
                self._rest.append((key, stored))

    def place(self) -> None:
        if self.adapter.config.peft_type == "LORA":
            self._look_for_missing()
        else:
            self._place_by_peft()
        self._place_factors()
        for key, stored in self._rest:
            if stored.name in self._used:
                continue
            if key.part == "lora_B_bias":  # of a convolution
                self._place_lora_bias(key.module, stored, self.adapter.config.scale_of(key.module) * self._weight)
            elif key.part == "token_rows":
                self._place_rows(key, stored)
            else:
                self._place_trained(stored)
        for module, bias in self.adapter.biases.items():
            for stored, factor in bias.parts:
                self._place_lora_bias(module, stored, factor)
        for module, stored in self.magnitudes.items():
            if (stored.file, stored.name) not in self.placer.placements:
                self.placer.leave_out(stored, self.placer.reason_for(module))

    def _look_for_missing(self) -> None:
        """What the config speaks of has to be in the file: without it the sum would be another one, silently."""
        raw = self.adapter.config.raw
        linear = [module for module, delta in self.adapter.deltas.items() if delta.kind == "linear"]
        biased = {*self.adapter.biases, *(key.module for key, _ in self._rest if key.part == "lora_B_bias")}
        names = [f".{stored.name}." for _, stored in self._rest]
        missing: list[str] = []
        if raw.get("use_dora"):
            bare = (module for module in (*self.adapter.deltas, *self._factors) if module not in self.magnitudes)
            missing += [f"use_dora, and no lora_magnitude_vector for '{module}'" for module in bare]
        if raw.get("lora_bias"):
            missing += [f"lora_bias, and no bias of lora_B for '{module}'" for module in linear if module not in biased]
        if raw.get("trainable_token_indices") and not any(key.part == "token_rows" for key, _ in self._rest):
            missing.append("trainable_token_indices, and no rows")
        missing += [
            f"modules_to_save, and no tensor of '{module}'"
            for module in raw.get("modules_to_save") or ()
            if not any(f".{other}." in name for other in spellings_of(module) for name in names)
        ]
        missing += self._missing_parameters(raw.get("target_parameters") or ())
        if missing:
            more = f", and {len(missing) - 1} more such" if len(missing) > 1 else ""
            self.placer.missing.append(
                f"adapter '{self.adapter.name}' is incomplete: its config says {missing[0]} is in its file{more}"
            )

    def _missing_parameters(self, targets: Sequence[str]) -> list[str]:
        """PEFT nests a wrapper for each parameter of a module, so a module has as many factors as parameters."""
        from lorakit.merge.experts import Experts

        found: dict[str, int] = {}
        for path in (*self.adapter.deltas, *self._factors):
            module = path.replace(".base_layer", "")
            found[module] = found.get(module, 0) + 1
        experts = Experts(self.placer.model.tensors, self.placer.resolver)
        missing = []
        for module, count in found.items():
            leaves = {target.rpartition(".")[2] for target in targets if _names(target, module)}
            there = [leaf for leaf in leaves if experts.stacked(module, leaf) is not None]
            if count < len(there):
                missing.append(f"target_parameters {', '.join(sorted(there))}, and only {count} of them for '{module}'")
        if targets and not any(_names(target, module) for target in targets for module in found):
            missing.append("target_parameters, and no factors for any")
        return missing

    @property
    def _weight(self) -> float:
        return self.source.weight

    # factors of more than two axes, and of experts

    def _place_factors(self) -> None:
        experts: dict[str, tuple[StoredTensor, StoredTensor]] = {}
        for module, parts in self._factors.items():
            if parts.keys() != {"lora_A", "lora_B"}:
                missing = ({"lora_A", "lora_B"} - parts.keys()).pop()
                raise InvalidFile(f"'{self.adapter.name}': '{module}' has no {missing}")
            pair = parts["lora_A"], parts["lora_B"]
            name = self.placer.resolver.weight_of(module)
            if len(pair[0].shape) == 2:
                experts[module] = pair
            elif name is None:
                for stored in pair:
                    self.placer.leave_out(stored, self.placer.reason_for(module))
            else:
                self.placer.add_convolution(self.adapter, module, name, *pair, self.magnitudes.get(module))
        if experts:
            self._place_experts(experts)

    def _place_experts(self, pairs: Mapping[str, tuple[StoredTensor, StoredTensor]]) -> None:
        from lorakit.merge.experts import expert_products

        placer = self.placer
        products, nowhere = expert_products(
            self.adapter.config, pairs, placer.model.tensors, placer.resolver,
            name=self.adapter.name, folder=self.source.folder, weight=self._weight, layout=placer.expert_layout,
        )  # fmt: skip
        for target, product in products:
            placer.require_floats(self.adapter, placer.model.tensors[target], iter(product.stored))
            placer.add_step(target, product)
            for stored, role in ((product.A.stored, "A"), (product.B.stored, "B")):
                placer.enter(stored, target, role)
        for module in nowhere:
            for stored in pairs[module]:
                placer.leave_out(stored, placer.reason_for(module))

    # what is added to, or stands in place of, a stored tensor

    def _place_lora_bias(self, module: str, stored: StoredTensor, factor: float) -> None:
        name = self.placer.resolver.tensor_of(f"{module}.bias")
        if name is not None and self.placer.model.tensors[name].shape == stored.shape:
            self.placer.add_step(name, AddStored(stored, factor))
            self.placer.enter(stored, name, "bias of B")
        elif load_tensor(stored).any():
            self.placer.leave_out(stored, "the base has no such bias to add it to")
        else:  # PEFT's `lora_bias` gives every module one, also those that nothing is added to
            self.placer.enter(stored, f"{module}.bias", "bias of zeros")

    def _place_rows(self, key: Key, stored: StoredTensor) -> None:
        placer = self.placer
        name = placer.resolver.weight_of(key.module)
        if name is None:
            placer.leave_out(stored, placer.reason_for(key.module))
            return
        rows = rows_of(self.adapter.config, key.module)
        weight = placer.model.tensors[name]
        if rows is None or (len(rows), *weight.shape[1:]) != stored.shape:
            raise InvalidFile(
                f"'{self.adapter.name}': '{stored.name}' is {list(stored.shape)}, and trainable_token_indices names "
                f"{'no' if rows is None else len(rows)} rows of '{name}' {list(weight.shape)}"
            )
        outside = [row for row in rows if not 0 <= row < weight.shape[0]]
        if outside:
            raise InvalidFile(
                f"'{self.adapter.name}': trainable_token_indices names row {outside[0]} of '{name}', "
                f"which has {weight.shape[0]}: it was made for another base, or for a resized vocabulary"
            )
        placer.require_floats(self.adapter, weight, iter((stored,)))
        # a tied head follows the rows of its embedding
        follows = name == placer.model.embedding and not self._head_rows_are_apart()
        sides = self._both_sides(name) if follows else {name}
        for side in sides:
            placer.add_step(side, TakeRows(stored, rows, self._weight))
        placer.enter(stored, name, "rows")

    def _head_rows_are_apart(self) -> bool:
        return sum(key.part == "token_rows" for key, _ in self._rest) > 1

    def _both_sides(self, name: str) -> set[str]:
        model = self.placer.model
        if model.embedding is not None and model.head is not None and name in (model.embedding, model.head):
            return {model.embedding, model.head}
        return {name}

    def place_bases(self) -> None:
        """What lies below the deltas, before them: PEFT's copies of the base, as they are or resized."""
        below = [stored for key, stored in self._rest if key.part == "other" and _BELOW.search(stored.name)]
        for stored in below:
            self._place_trained(stored)
            self._used.add(stored.name)

    def _place_trained(self, stored: StoredTensor) -> None:
        """A whole tensor that was trained, or is PEFT's copy of the base's."""
        placer, model = self.placer, self.placer.model
        path = base_path(stored.name.replace(_ORIGINAL, "."))
        name = placer.resolver.tensor_of(path)
        if name is None:
            if not self._place_trained_experts(stored, path):
                placer.leave_out(stored, placer.reason_for(path.removesuffix(".weight")))
            return
        weight = model.tensors[name]
        if weight.shape != stored.shape:
            self._place_resized(stored, name)
            return
        if equal_values(stored, weight):
            placer.enter(stored, name, "copy")
            return
        if _ORIGINAL in stored.name:
            raise UnsupportedAdapter(
                f"adapter '{self.adapter.name}' was made for another base: '{stored.name}' is its copy of "
                f"'{name}', and has other values"
            )
        placer.require_floats(self.adapter, weight, iter((stored,)))
        placer.add_step(name, Take(stored, self._weight))
        self._agree_with_other_side(name)
        placer.enter(stored, name, "trained")

    def _place_trained_experts(self, stored: StoredTensor, path: str) -> bool:
        """All experts of a layer, trained as one tensor, where the base stores them one by one."""
        from lorakit.merge.experts import trained_slices

        slices = trained_slices(path, stored, self.placer.model.tensors, self.placer.resolver)
        for name, part in slices:
            self.placer.require_floats(self.adapter, self.placer.model.tensors[name], iter((stored,)))
            self.placer.add_step(name, Take(part, self._weight))
            self.placer.enter(stored, name, "trained")
        return bool(slices)

    def _agree_with_other_side(self, name: str) -> None:
        """Two equal copies, one for each side of a tied base, are one weight still."""
        model, steps = self.placer.model, self.placer.steps
        if name not in (model.embedding, model.head) or model.embedding is None or model.head is None:
            return
        mine, theirs = steps.get(model.embedding, []), steps.get(model.head, [])
        match mine, theirs:
            case [Take() as one], [Take() as other] if same_bytes(one.tensor, other.tensor):
                steps[model.head] = list(mine)

    def _place_resized(self, stored: StoredTensor, name: str) -> None:
        """An embedding or a head of another vocabulary: it stands in the place of the base's.

        The other side of a tied base goes with it, unless the file has that one too.
        """
        placer, model = self.placer, self.placer.model
        weight = model.tensors[name]
        table = layer_of(name) in HEADS | EMBEDDINGS and len(stored.shape) == 2
        if not table or stored.shape[1:] != weight.shape[1:]:
            placer.require_shape(self.adapter, stored.name, stored.shape, weight, weight.shape)
        if self._weight != 1 or len(self.adapter.files()) > 1:
            raise UnsupportedAdapter(
                f"adapter '{self.adapter.name}' resized the vocabulary ('{stored.name}' has {stored.shape[0]} rows, "
                f"the base {weight.shape[0]}): it can be merged with the weight 1 alone"
            )
        for side in self._both_sides(name) | {name}:
            if side == name or model.tensors[side] == weight:
                placer.dtypes[side] = weight.dtype
                placer.homes[side] = weight.file
                model.tensors[side] = stored
        model.config |= _resized(model.base.config, weight.shape[0], stored.shape[0])
        placer.enter(stored, name, "resized")

    # other methods of PEFT

    def _place_by_peft(self) -> None:
        from lorakit.merge.by_peft import place_by_peft

        self._used |= place_by_peft(self.placer, self.adapter, [stored for _, stored in self._rest])


def _names(target: str, module: str) -> bool:
    """Whether a parameter's path, or its end, is of this module."""
    return f".{module}".endswith(f".{target.rpartition('.')[0]}")


def _resized(config: Mapping[str, object], old: int, new: int) -> dict[str, object]:
    changed: dict[str, object] = {}
    for key, value in config.items():
        if key == "vocab_size" and value == old:
            changed[key] = new
        elif isinstance(value, dict) and (inner := _resized(value, old, new)):
            changed[key] = {**value, **inner}
    return changed
