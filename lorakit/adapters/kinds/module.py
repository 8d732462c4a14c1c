"""One module's tensors, taken one by one with their shapes checked, so that none is left over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.adapters.config import AdapterConfig
from lorakit.errors import InvalidFile, UnsupportedAdapter, WrongBase
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import load_tensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Source:
    """What all modules of an adapter share: its config, its common tensors, the shapes (out, in) of the base."""

    config: AdapterConfig
    folder: Path
    modules: frozenset[str]
    shared: Mapping[str, StoredTensor]
    shapes: Mapping[str, tuple[int, int]]

    def refusal(self, reason: str) -> UnsupportedAdapter:
        return UnsupportedAdapter(
            f"adapter '{self.folder}' ({self.config.peft_type}) can't be made into LoRA factors exactly: {reason}; "
            f"`lorakit extract {self.folder} --base BASE --rank N` approximates it, `lorakit merge` is exact"
        )

    def number(self, field: str, default: float) -> float:
        """A field of the config, or PEFT's default. Raises InvalidFile when it is no finite number."""
        value = self.config.raw.get(field)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InvalidFile(f"'{self.folder}/adapter_config.json': {field} is {value!r}")
        return value

    def count(self, field: str, default: int, *, least: int = 1) -> int:
        """A whole number of the config. Raises InvalidFile when it is none, or below `least`."""
        value = self.number(field, default)
        if value != int(value) or value < least:
            raise InvalidFile(f"'{self.folder}/adapter_config.json': {field} is {value!r}")
        return int(value)

    def shared_tensor(self, name: str, *sizes: int | None) -> StoredTensor:
        """One that all modules share. Raises InvalidFile when it is missing or of another shape."""
        if name not in self.shared:
            raise InvalidFile(f"'{self.folder}' lacks the tensor 'base_model.{name}'")
        return self.checked(self.shared[name], sizes)

    def checked(self, stored: StoredTensor, sizes: tuple[int | None, ...]) -> StoredTensor:
        if len(stored.shape) != len(sizes) or any(
            wanted not in (None, size) for size, wanted in zip(stored.shape, sizes, strict=True)
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in sizes)
            raise InvalidFile(
                f"'{self.folder}': '{stored.name}' is {list(stored.shape)}, "
                f"and by its config and its other tensors would be [{wanted}]"
            )
        return stored

    def base_shape(self, module: str) -> tuple[int, int]:
        """(out, in) of the base's layer, where the file doesn't say it. Raises UnsupportedAdapter when unknown."""
        if module not in self.shapes:
            raise self.refusal(f"how many inputs '{module}' has is not in its file, and the base's shapes are not here")
        return self.shapes[module]


@dataclass(frozen=True, slots=True)
class Module:
    """The tensors of one module that are not taken yet, by what its path is followed by: `hada_w1_a`."""

    path: str
    parts: dict[str, StoredTensor]
    source: Source

    def take(self, part: str, *sizes: int | None) -> StoredTensor:
        """The tensor, which has as many axes as `sizes`, each of that size where it is not None.

        Raises:
            InvalidFile: it is missing, or its shape contradicts the config or the other tensors.
        """
        if part not in self.parts:
            raise InvalidFile(f"'{self.source.folder}': '{self.path}' lacks the tensor '{part}'")
        return self.source.checked(self.parts.pop(part), sizes)

    def refuse_convolution(self, *parts: str) -> None:
        """Raises UnsupportedAdapter when one of these is there, with more axes than two."""
        for part in parts:
            if len(self.parts[part].shape if part in self.parts else ()) > 2:
                raise self.source.refusal(f"'{self.path}' is a convolution")

    def base_shape(self, out: int) -> tuple[int, int]:
        """Raises WrongBase when the base's layer has not `out` outputs, UnsupportedAdapter when it is unknown."""
        shape = self.source.base_shape(self.path)
        if shape[0] != out:
            raise WrongBase(
                f"adapter '{self.source.folder}' has {out} outputs for '{self.path}', the base has {shape[0]}: "
                f"it was made for another base"
            )
        return shape


def wide(stored: StoredTensor) -> torch.Tensor:
    return load_tensor(stored).double()
