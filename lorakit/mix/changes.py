"""What became of a tensor from one file to another: bit for bit, and in numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import TYPE_CHECKING, Any, Literal

from lorakit.checkpoints.tensors import Stored, blocks, nbytes
from lorakit.errors import UsageError
from lorakit.files.tensors import TORCH_NAMES
from lorakit.mix.compare import cosine

if TYPE_CHECKING:
    import torch

RTOL, ATOL = 1e-5, 1e-8  # what numpy's and torch's allclose take for close
_BLOCK = 1 << 18  # elements: in float64 they fit into the cache
_LOW = (1 << 32) - 1

State = Literal["equal", "close", "different", "reshaped", "only_before", "only_after"]


@dataclass(frozen=True, slots=True)
class Closeness:
    """|after - before| <= atol + rtol |before| everywhere; without both, what isn't equal is different.

    Raises:
        UsageError: one is negative, infinite or no number.
    """

    rtol: float | None = RTOL
    atol: float | None = ATOL

    def __post_init__(self) -> None:
        if not all(0 <= one < inf for one in (self.rtol or 0.0, self.atol or 0.0)):
            raise UsageError(f"rtol {self.rtol} and atol {self.atol}: both have to be finite numbers, none below 0")


@dataclass(frozen=True, slots=True)
class Change:
    """How far something is from what it was. What it holds are sums, which add up over modules or tensors: ‖A‖², ‖B‖²,
    ‖A - B‖² and ⟨A, B⟩.
    """

    before: float
    after: float
    difference: float
    product: float = 0.0

    @property
    def lost(self) -> float | None:
        """‖A - B‖ / ‖A‖; None where there was nothing to lose."""
        return sqrt(self.difference / self.before) if self.before else None

    @property
    def cosine(self) -> float | None:
        return cosine(self.product, sqrt(self.before), sqrt(self.after))

    @property
    def is_finite(self) -> bool:
        return all(map(isfinite, (self.before, self.after, self.difference, self.product)))

    def plus(self, other: Change) -> Change:
        return Change(
            self.before + other.before,
            self.after + other.after,
            self.difference + other.difference,
            self.product + other.product,
        )


@dataclass(frozen=True, slots=True)
class TensorChange:
    """One tensor in two files; `before` and `after` are its dtype and shape, `group` what it belongs to.

    equal: dtype, shape and every bit; close: as `Closeness` says. `largest` is max |after - before|. It and `change`
    are None where the two can't be subtracted, or the result is no number.
    """

    name: str
    state: State
    before: str | None = None
    after: str | None = None
    largest: float | None = None
    change: Change | None = None
    group: str = ""

    def as_dict(self) -> dict[str, Any]:
        change = self.change
        return {
            "tensor": self.name,
            "state": self.state,
            "before": self.before,
            "after": self.after,
            "largest": self.largest,
            "norms": change and [sqrt(change.before), sqrt(change.after)],
            "difference": change and sqrt(change.difference),
            "lost": change and change.lost,
            "cosine": change and change.cosine,
        }


def tensor_changes(
    before: Mapping[str, Stored],
    after: Mapping[str, Stored],
    closeness: Closeness | None = None,
    groups: Mapping[str, str] | None = None,
) -> tuple[TensorChange, ...]:
    """Of every tensor of either, those of the first before those that the second alone has."""
    asked, known = closeness or Closeness(), groups or {}
    return tuple(
        _tensor_change(name, before.get(name), after.get(name), asked, known.get(name, ""))
        for name in {**before, **after}
    )


def _tensor_change(
    name: str, before: Stored | None, after: Stored | None, closeness: Closeness, group: str
) -> TensorChange:
    was, is_now = (None if one is None else f"{one.dtype} {list(one.shape)}" for one in (before, after))
    if before is None or after is None:
        return TensorChange(name, "only_after" if before is None else "only_before", was, is_now, group=group)
    if before.shape != after.shape:
        return TensorChange(name, "reshaped", was, is_now, group=group)
    sums = _Sums(closeness, same_dtype=before.dtype == after.dtype)
    if {before.dtype, after.dtype} <= TORCH_NAMES.keys():
        for old, new in _side_by_side(name, before, after):
            sums.add(old, new)
    else:
        sums.compare_bytes(name, before, after)
    state: State = "equal" if sums.equal else "close" if sums.close else "different"
    change = sums.change if sums.change is not None and sums.change.is_finite else None
    largest = sums.largest if change is not None else None
    return TensorChange(name, state, was, is_now, largest, change, group)


def _side_by_side(name: str, before: Stored, after: Stored) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(blocks(name, before, _BLOCK), blocks(name, after, _BLOCK), strict=True)


class _Sums:
    """What two tensors differ in, as far as they have been looked at."""

    def __init__(self, closeness: Closeness, *, same_dtype: bool) -> None:
        self._closeness = closeness
        self.equal = same_dtype
        self.close = closeness.rtol is not None or closeness.atol is not None
        self.largest = 0.0
        self.change: Change | None = Change(0.0, 0.0, 0.0)

    def add(self, old: torch.Tensor, new: torch.Tensor) -> None:
        same = old.dtype == new.dtype and bool(_bytes(old).equal(_bytes(new)))
        before = _numbers(old)
        if same:
            square = float(before.dot(before))
            self._plus(Change(square, square, 0.0, square))
            return
        self.equal = False
        after = _numbers(new)
        difference = _exact_difference(old, new) if _are_wide(old, new) else after - before
        square = float(difference.dot(difference))
        if not isfinite(square):
            alike = (before == after) | (before.isnan() & after.isnan())
            difference.masked_fill_(alike, 0.0)  # infinity less itself would be no number
            square = float(difference.dot(difference))
        self._plus(Change(float(before.dot(before)), float(after.dot(after)), square, float(before.dot(after))))
        distance = difference.abs_()
        self.largest = max(self.largest, float(distance.max()))
        if self.close:
            allowed = before.abs().mul_(self._closeness.rtol or 0.0).add_(self._closeness.atol or 0.0)
            near = (distance <= allowed) | (distance == 0)  # where both are infinite, none is allowed
            self.close = bool(near.all()) and (isfinite(square) or bool(distance.isfinite().all()))

    def compare_bytes(self, name: str, before: Stored, after: Stored) -> None:
        """Of dtypes that torch has no numbers for."""
        self.change, self.close = None, False
        if self.equal:
            self.equal = nbytes(before) == nbytes(after) and all(
                bool(_bytes(old).equal(_bytes(new))) for old, new in _side_by_side(name, before, after)
            )

    def _plus(self, change: Change) -> None:
        self.change = change if self.change is None else self.change.plus(change)


def _bytes(block: torch.Tensor) -> torch.Tensor:
    import torch

    return block.contiguous().view(torch.uint8)


def _numbers(block: torch.Tensor) -> torch.Tensor:
    """In float64; a complex number as two."""
    import torch

    return torch.view_as_real(block).reshape(-1).double() if block.is_complex() else block.double()


def _are_wide(*pair: torch.Tensor) -> bool:
    """Whether they are integers beyond what float64 tells apart."""
    whole = not any(block.is_floating_point() or block.is_complex() for block in pair)
    return whole and any(block.dtype.itemsize == 8 for block in pair)


def _exact_difference(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """In float64, rounded once: halves of integers fit into it."""
    (old_high, old_low), (new_high, new_low) = _halves(old), _halves(new)
    return (new_high - old_high).mul_(2.0**32).add_(new_low - old_low)


def _halves(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    unsigned = block.dtype == torch.uint64
    bits = block.view(torch.int64) if unsigned else block.long()
    high = bits >> 32
    return (high & _LOW if unsigned else high).double(), (bits & _LOW).double()
