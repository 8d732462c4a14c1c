"""A few rows of each merged weight, computed apart from the executor: in float64, straight from the plan's steps.

A row on disk is right when it lies no further from the float64 sum than one rounding to its dtype and the error bound
of the float32 arithmetic, (r + 4) · 2^-24 · (|W| + Σ |factor| |B| |A|) for rank r (Higham, Accuracy and Stability of
Numerical Algorithms, §3.1), allow.
"""

from __future__ import annotations

import torch

from lorakit.files.safetensors import DTYPE_BITS, StoredTensor
from lorakit.files.tensors import load_tensor, torch_dtype
from lorakit.merge.plan import ComputeTensor
from lorakit.merge.steps import AddProduct

ROWS = 3
_BITS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}  # of a significand
_SMALLEST = {"F64": -1074, "F32": -149, "F16": -24, "BF16": -133}  # the exponent of the smallest number above zero


def is_simple(tensor: ComputeTensor) -> bool:
    """Whether the weight is what its formula says, W + Σ factor · B A, and no more."""
    return (
        bool(tensor.steps)
        and len(tensor.source.shape) == 2
        and tensor.source.dtype in _BITS
        and tensor.target.dtype in _BITS
        and all(
            isinstance(step, AddProduct)
            and step.first_row == 0
            and step.shape == tensor.matrix
            and not (step.A.picked or step.B.picked)
            and step.A.repeat == step.B.repeat == 1
            for step in tensor.steps
        )
    )


def sampled_rows(rows: int) -> list[int]:
    """The first, the last, and some between."""
    return sorted({rows * index // ROWS for index in range(ROWS)} | {rows - 1}) if rows else []


def wrong_rows(tensor: ComputeTensor, on_disk: StoredTensor, *, stochastic: bool = False) -> list[int]:
    """Those of the sampled rows that are not what the formula says."""
    rows, columns = tensor.matrix
    chosen = sampled_rows(rows)
    exact = _rows(tensor.source, chosen, columns)
    size = exact.abs()
    products = [step for step in tensor.steps if isinstance(step, AddProduct)]
    for step in products:
        b, a = (load_tensor(part.stored).double().reshape(part.view) for part in (step.B, step.A))
        left, right = (a.T[chosen], b.T) if step.transposed else (b[chosen], a)
        exact = exact + step.factor * (left @ right)
        size = size + abs(step.factor) * (left.abs() @ right.abs())
    wide = _BITS["F64" if tensor.source.dtype == "F64" else "F32"]
    slack = (sum(step.rank for step in products) + 4) * 2.0**-wide * size
    found = _rows(on_disk, chosen, columns)
    spacing = _spacing(torch.maximum(found.abs(), exact.abs()), on_disk.dtype)
    allowed = (spacing if stochastic else spacing / 2) + slack
    off = ((found - exact).abs() <= allowed).logical_not().any(dim=1)  # NaN is wrong
    return [row for row, is_off in zip(chosen, off.tolist(), strict=True) if is_off]


def _rows(stored: StoredTensor, chosen: list[int], columns: int) -> torch.Tensor:
    width = columns * DTYPE_BITS[stored.dtype] // 8
    read = []
    for row in chosen:
        start = stored.start + row * width
        read.append(load_tensor(StoredTensor(stored.name, stored.file, stored.dtype, (columns,), start, start + width)))
    return torch.stack(read).double() if read else torch.empty(0, columns, dtype=torch_dtype("F64"))


def _spacing(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """How far apart the numbers of a dtype lie around these."""
    exponent = torch.frexp(values).exponent
    return torch.ldexp(torch.ones_like(values), (exponent - _BITS[dtype]).clamp(min=_SMALLEST[dtype]))
