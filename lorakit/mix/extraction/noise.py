"""How large the singular values are that rounding alone gives to the difference of two stored weights.

A fine-tuned weight was rounded to its dtype when it was stored: each element is off by up to half a unit in its last
place, evenly, which is a variance of ulp²/12. Such noise has full rank, and no adapter can carry it; what of a
difference lies below it was not learnt, or can't be told from what was not.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

from lorakit.adapters.randomised import row_blocks

if TYPE_CHECKING:
    import torch

# as which whole number its bits are read, bits of the fraction, and the exponent's bias
_LAYOUT = {
    "bfloat16": ("int16", 7, 127), "float16": ("int16", 10, 15), "float32": ("int32", 23, 127),
    "float64": ("int64", 52, 1023),
}  # fmt: skip


class RoundingNoise:
    """Collects, from blocks of rows, the noise in a difference Δ (m, n) of weights that were rounded when stored.

    Where most elements did not change at all (a change far below one ulp), the difference is mostly noise too, but of
    less than ulp²/12: so of a row and of a column it is never more than what is there of Δ.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        import torch

        rows, columns = shape
        self._rows = torch.zeros(2, rows, dtype=torch.float64)  # Σ ulp²/12, and Σ Δ²
        self._columns = torch.zeros(2, columns, dtype=torch.float64)

    def add(self, tuned: torch.Tensor, delta: torch.Tensor, first: int) -> None:
        """Take in the rows from `first` on: as stored in `tuned`, and Δ."""
        import torch

        wide = torch.float64
        for index, (squares, exact) in enumerate(((unit_variance(tuned), None), (delta.square(), wide))):
            self._rows[index, first : first + len(squares)] = squares.sum(1, dtype=exact).cpu().to(wide)
            self._columns[index] += squares.sum(0).cpu().to(wide)

    @property
    def norm(self) -> float:
        """‖Δ‖, summed in float64."""
        return sqrt(float(self._rows[1].sum()))

    def floor(self) -> float:
        """The singular value from which on components bring more noise than signal.

        Gavish and Donoho's threshold for known noise (arXiv:1305.5870, eq. 11), which is a little above the spectral
        edge σ(√m + √n). Where rows or columns have noise of different strength, √n σ and √m σ are those of the strong.
        """
        by_row, by_column = (sums.min(dim=0).values for sums in (self._rows, self._columns))
        total = min(float(by_row.sum()), float(by_column.sum()))
        if not total:
            return 0.0
        strengths = sorted(float(sums.square().sum() / sums.sum().square()) * total for sums in (by_row, by_column))
        beta = strengths[0] / strengths[1]
        threshold = sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + sqrt(beta**2 + 14 * beta + 1)))
        return threshold * sqrt(strengths[1])


def unit_variance(stored: torch.Tensor) -> torch.Tensor:
    """ulp²/12 of each element's dtype, in float32, or in float64 for it.

    A power of two is made from the bits of the exponent alone, at a third of the price of `frexp` and `exp2`.
    """
    import torch

    whole, fraction, bias = _LAYOUT[str(stored.dtype).removeprefix("torch.")]
    bits = stored.contiguous().view(getattr(torch, whole))
    wide, point, middle = (torch.int64, 52, 1023) if whole == "int64" else (torch.int32, 23, 127)
    exponent = bits.to(wide).bitwise_right_shift_(fraction).bitwise_and_(2 * bias + 1).clamp_(min=1)
    # of the square of 2^(exponent - bias - fraction), where a float of that width has such a one
    exponent.mul_(2).add_(middle - 2 * (bias + fraction)).clamp_(0, 2 * middle + 1)
    return exponent.bitwise_left_shift_(point).view(torch.float64 if whole == "int64" else torch.float32).div_(12)


def narrowest(stored: torch.Tensor) -> torch.dtype:
    """The dtype that tells how its values were rounded: a 16-bit one where all of them fit into it."""
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        if stored.dtype == dtype:
            return dtype
        if all(torch.equal(rows.to(dtype).to(rows.dtype), rows) for rows in row_blocks(stored)):
            return dtype
    return stored.dtype
