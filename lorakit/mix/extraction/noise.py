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

# significant bits, and the exponent of the smallest unit
_PRECISION = {"bfloat16": (8, -133), "float16": (11, -24), "float32": (24, -149), "float64": (53, -1074)}


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

        for index, squares in enumerate((unit_variance(tuned), delta.square())):
            self._rows[index, first : first + len(squares)] = squares.sum(1, dtype=torch.float64).cpu()
            self._columns[index] += squares.sum(0, dtype=torch.float64).cpu()

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
    """ulp²/12 of each element's dtype, in float32, or in float64 for it."""
    import torch

    bits, smallest = _PRECISION[str(stored.dtype).removeprefix("torch.")]
    wide = stored if stored.dtype == torch.float64 else stored.float()
    units = torch.frexp(wide).exponent.sub_(bits).masked_fill_(wide == 0, smallest).clamp_(min=smallest)
    return torch.exp2(units.mul_(2).to(wide.dtype)).div_(12)


def narrowest(stored: torch.Tensor) -> torch.dtype:
    """The dtype that tells how its values were rounded: a 16-bit one where all of them fit into it."""
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        if stored.dtype == dtype:
            return dtype
        if all(torch.equal(rows.to(dtype).to(rows.dtype), rows) for rows in row_blocks(stored)):
            return dtype
    return stored.dtype
