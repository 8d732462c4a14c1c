"""One weight that a file holds in several tensors, none of which is the weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from lorakit.errors import InvalidFile, Refused
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import load_tensor, torch_dtype

if TYPE_CHECKING:
    import torch

Scales = Literal["best", "fresh", "stored"]


class Scheme(Protocol):
    """A format. `rewritten` are the roles that `packed` gives; all other parts keep their bytes."""

    @property
    def name(self) -> str: ...

    @property
    def rewritten(self) -> tuple[str, ...]: ...

    def read(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight in float32, of the values that the format's own library gives."""

    def packed(
        self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor, scales: Scales
    ) -> dict[str, torch.Tensor]:
        """The parts that hold `weight`, rounded to nearest; what is unchanged keeps its codes and its scale."""


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """`shape` (out, in) and `dtype` are those of the weight that is meant; `parts` are what stands in the file.

    A part that is in no way needed to read the weight (`input_scale`) is still one of its parts: it goes with it.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    parts: Mapping[str, StoredTensor]
    scheme: Scheme

    @property
    def rewritten(self) -> tuple[StoredTensor, ...]:
        """The stored tensors that `packed` writes anew."""
        return tuple(self.parts[role] for role in self.scheme.rewritten)

    def read(self) -> torch.Tensor:
        """The whole weight in float32, (out, in).

        Raises:
            InvalidFile: the parts do not fit together.
        """
        return self.unpacked({})

    def unpacked(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight that these parts mean, those left out being the stored ones."""
        weight = self.scheme.read({**self._stored(parts), **parts})
        if tuple(weight.shape) != self.shape:
            raise InvalidFile(f"'{self.name}' is {list(weight.shape)} in its file, and should be {list(self.shape)}")
        return weight

    def packed(self, weight: torch.Tensor, *, scales: Scales = "best") -> dict[str, torch.Tensor]:
        """Role -> tensor, each of the stored part's dtype and shape. A weight as it was read gives the stored bytes.

        `scales`, where the weight changed: fresh ones; the stored ones, beyond whose range values are clamped; or
        whichever of the two has the smaller error: a small change is nearer to the old grid, on which most of the
        weight still stands, and a large one needs the new range.
        Raises:
            Refused: the weight has values that are no finite numbers.
        """
        if not weight.isfinite().all():
            raise Refused(f"'{self.name}' has values that are not finite: they can't be quantised")
        packed = self.scheme.packed(self._stored({}), weight.float(), scales)
        for role, tensor in packed.items():
            stored = self.parts[role]
            if stored.dtype in _WITHOUT_NAME:
                tensor = packed[role] = tensor.view(_raw(stored.dtype))
            elif tensor.dtype != torch_dtype(stored.dtype):
                tensor = packed[role] = tensor.to(torch_dtype(stored.dtype))
            packed[role] = tensor.reshape(stored.shape).contiguous()
        return packed

    def _stored(self, known: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {role: _load(stored) for role, stored in self.parts.items() if role not in known}


_WITHOUT_NAME = {"F8_E8M0": "float8_e8m0fnu"}  # dtypes that only a scale has


def _raw(dtype: str) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, _WITHOUT_NAME[dtype])
    return found


def _load(stored: StoredTensor) -> torch.Tensor:
    if stored.dtype not in _WITHOUT_NAME:
        return load_tensor(stored)
    from dataclasses import replace

    return load_tensor(replace(stored, dtype="U8")).view(_raw(stored.dtype))


@dataclass(frozen=True, slots=True)
class Rounding:
    """What writing a merged weight in its old format cost: the error over the weight, and over the change that was
    merged (Frobenius norms); and what is `kept` of the change, its coefficient in what was written: 1 all, 0 nothing.
    """

    of_weight: float
    of_change: float
    kept: float


def rounding(before: torch.Tensor, wanted: torch.Tensor, written: torch.Tensor) -> Rounding:
    change = wanted.double() - before.double()
    error, weight, square = (
        float((written.double() - wanted).norm()),
        float(wanted.norm()),
        float(change.square().sum()),
    )
    return Rounding(
        error / weight if weight else 0.0,
        error / square**0.5 if square else 0.0,
        float(((written.double() - before) * change).sum()) / square if square else 1.0,
    )
