"""One weight's steps, applied to a block of its rows."""

from __future__ import annotations

import math
import threading

import torch

from lorakit.errors import InvalidFile
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import load_tensor, torch_dtype
from lorakit.merge.plan import ComputeTensor
from lorakit.merge.steps import AddProduct, AddStored, ByPeft, Dora, Matrix, Step, SubtractInit, Take, TakeRows

# Seen on MKL (AVX-512): the bits of a float32 product depend on how it is cut and on the number of threads when one of
# its sides is 11 or less, and never above; those of a float64 product always do. Such a product is made whole, with
# the threads that PEFT would have; but a large one in float64 is cut, and may differ from PEFT's in its last bit.
THIN = 32
LARGE = 1 << 22  # elements
ONE_GO = 128  # the ranks up to which MKL sums a product up before it adds it to what is there


class Memory(threading.local):
    """Buffers that a thread uses again for each block."""

    def __init__(self) -> None:
        self.held: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, int], dtype: torch.dtype, device: str, pinned: bool) -> torch.Tensor:
        count = shape[0] * shape[1]
        held = self.held.get(name)
        if held is None or held.dtype != dtype or len(held) < count:
            held = self.held[name] = torch.empty(count, dtype=dtype, device=device, pin_memory=pinned)
        return held[:count].view(shape)


class Stepper:
    """Applies the steps of one tensor; holds its factors meanwhile.

    `needs_whole`: the rows can't be computed apart from one another. `needs_norms`: `add_norms` has to see every block
    once before the first is computed.
    """

    def __init__(self, tensor: ComputeTensor, memory: Memory, device: str, threads: int) -> None:
        self.tensor = tensor
        self.wide = torch.float64 if tensor.source.dtype == "F64" else torch.float32
        self._memory = memory
        self._device = device
        self._threads = threads
        self._loaded: dict[tuple[str, str], torch.Tensor] = {}
        self._matrices: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._norms = {index: torch.zeros(0) for index, step in enumerate(tensor.steps) if _by_column(step)}
        self.rows, self.columns = tensor.matrix
        products = [step.product if isinstance(step, Dora) else step for step in tensor.steps]
        self.needs_whole = any(isinstance(step, SubtractInit | ByPeft) for step in tensor.steps) or any(
            isinstance(step, AddProduct) and self._is_whole(step) for step in products
        )
        self.needs_norms = bool(self._norms)
        # whether each step changes all rows, so that some of them can stand for all
        self.is_even = all(
            not isinstance(step, TakeRows) and not (isinstance(step, AddProduct) and step.shape[0] != self.rows)
            for step in tensor.steps
        )
        self._needs_base = any(isinstance(step, Dora | Take | TakeRows | ByPeft) for step in tensor.steps)

    def add_norms(self, stored: torch.Tensor, first: int) -> None:
        """Take a block of the base into the norms of the columns."""
        base = stored.to(device=self._device, dtype=self.wide)
        for index in self._norms:
            step = self.tensor.steps[index]
            assert isinstance(step, Dora)
            squares = (base + self._delta(step.product, first, len(base))).double().square().sum(dim=0)
            known = self._norms[index]
            self._norms[index] = squares if known.numel() == 0 else known + squares

    def applied(self, total: torch.Tensor, first: int) -> torch.Tensor:
        """The block after all steps; may be `total` itself, changed in place."""
        base = total.clone() if self._needs_base else total
        for index, step in enumerate(self.tensor.steps):
            total = self._apply(index, step, total, base, first)
            if isinstance(step, SubtractInit) and self._needs_base:
                base = total.clone()  # what is left is the base that the adapter was trained on
        return total

    def _apply(self, index: int, step: Step, total: torch.Tensor, base: torch.Tensor, first: int) -> torch.Tensor:
        match step:
            case AddProduct():
                return self._add_product(step, total, first)
            case AddStored():
                return total.add_(self._rows(step.tensor, first, len(total)) * step.factor)
            case Take():
                trained = self._rows(step.tensor, first, len(total))
                return total.copy_(trained) if step.weight == 1 else total.add_((trained - base) * step.weight)
            case TakeRows():
                return self._take_rows(step, total, base, first)
            case Dora():
                return self._dora(index, step, total, base, first)
            case SubtractInit():
                return self._subtract_init(step, total)
            case ByPeft():
                return self._by_peft(step, total, base)

    # what is added

    def _is_whole(self, step: AddProduct) -> bool:
        """Whether the product has to be made in one piece to have PEFT's bits."""
        out, into = step.B.shape[0], step.A.shape[1]
        return min(out, into) < THIN or (self.wide == torch.float64 and out * into <= LARGE)

    def _add_product(self, step: AddProduct, total: torch.Tensor, first: int) -> torch.Tensor:
        rows = step.shape[0]
        begin, end = max(first, step.first_row), min(first + len(total), step.first_row + rows)
        if begin >= end:
            return total
        changed = total[begin - first : end - first]
        if self._goes_in_one(step):
            b, a = self._factors(step)
            mine = b[begin - step.first_row : end - step.first_row]
            torch.addmm(changed, mine, a, alpha=step.factor, out=changed)
        else:
            changed.add_(self._delta(step, begin - step.first_row, end - begin))
        return total

    def _goes_in_one(self, step: AddProduct) -> bool:
        """Whether product, factor and sum can be one call, a third faster, with the same bits: a factor that is a
        power of two rounds nothing, and a product that is summed up in one go is there before it is added. One of rank
        1 is not: where the processor can, each of its numbers is added as it is made, and rounded once.
        """
        is_power_of_two = abs(math.frexp(step.factor)[0]) == 0.5
        return is_power_of_two and 1 < step.rank <= ONE_GO and not step.transposed and not self._is_whole(step)

    def _delta(self, step: AddProduct, first: int, count: int) -> torch.Tensor:
        """Rows of factor · B A, or of its transpose; in a buffer that the next call uses again."""
        b, a = self._factors(step)
        if step.transposed:
            delta = self._product(step, b, a[:, first : first + count])
        else:
            delta = self._product(step, b[first : first + count], a)
        delta.mul_(step.factor)
        return delta.T if step.transposed else delta

    def _product(self, step: AddProduct, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        out = self._memory.take("delta", (left.shape[0], right.shape[1]), left.dtype, self._device, False)
        if not (self._device == "cpu" and self._is_whole(step)):
            return torch.mm(left, right, out=out)
        torch.set_num_threads(self._threads)
        try:
            return torch.mm(left, right, out=out)
        finally:
            torch.set_num_threads(1)

    def _factors(self, step: AddProduct) -> tuple[torch.Tensor, torch.Tensor]:
        known = self._matrices.get(id(step))
        if known is None:
            known = self._matrices[id(step)] = (self._matrix(step.B), self._matrix(step.A))
        return known

    def _matrix(self, matrix: Matrix) -> torch.Tensor:
        return picked_from(self._load(matrix.stored), matrix)

    def _load(self, stored: StoredTensor) -> torch.Tensor:
        """A tensor of an adapter, wide, on the device; the experts of one layer share it."""
        key = (str(stored.file), stored.name)
        if key not in self._loaded:
            self._loaded[key] = load_tensor(stored).to(device=self._device, dtype=self.wide)
        return self._loaded[key]

    # what is replaced

    def _rows(self, stored: StoredTensor, first: int, count: int) -> torch.Tensor:
        """Rows of a trained tensor, read as they are needed: it may be as large as the weight."""
        dtype = torch_dtype(stored.dtype)
        width = self.columns * dtype.itemsize
        start = stored.start + first * width
        part = StoredTensor(stored.name, stored.file, stored.dtype, (count, self.columns), start, start + count * width)
        if part.end > stored.end:
            raise InvalidFile(f"'{stored.name}' in '{stored.file}' is smaller than the weight it replaces")
        return load_tensor(part).to(device=self._device, dtype=self.wide)

    def _take_rows(self, step: TakeRows, total: torch.Tensor, base: torch.Tensor, first: int) -> torch.Tensor:
        trained = self._load(step.tensor)
        for index, row in enumerate(step.rows):
            place = row - first
            if 0 <= place < len(total):
                if step.weight == 1:
                    total[place] = trained[index]
                else:
                    total[place] += (trained[index] - base[place]) * step.weight
        return total

    # what is computed from the base

    def _dora(self, index: int, step: Dora, total: torch.Tensor, base: torch.Tensor, first: int) -> torch.Tensor:
        delta = self._delta(step.product, first, len(total))
        magnitude = self._load(step.magnitude).reshape(-1)
        if step.by_column:
            factor = magnitude / self._norms[index].sqrt().to(self.wide)
        else:
            norm = torch.linalg.norm(base + delta, dim=1)
            factor = (magnitude[first : first + len(total)] / norm)[:, None]
        changed = factor * (total + delta)
        return changed if step.weight == 1 else total + (changed - total) * step.weight

    def _subtract_init(self, step: SubtractInit, total: torch.Tensor) -> torch.Tensor:
        weight = total.T if step.transposed else total
        torch.set_num_threads(self._threads)
        try:
            if step.method == "pissa":
                left, values, right = torch.linalg.svd(weight, full_matrices=False)
                root = (values[: step.rank] / step.scale).sqrt()
                b, a = left[:, : step.rank] @ torch.diag(root), torch.diag(root) @ right[: step.rank]
            else:
                q, r = torch.linalg.qr(weight)
                b, a = q[:, : step.rank], r[: step.rank]
            rest: torch.Tensor = weight - (step.weight * step.scale) * b @ a
        finally:
            torch.set_num_threads(1)
        # the adapter was trained on this rest as the base's dtype holds it
        if step.weight == 1:
            rest = rest.to(torch_dtype(self.tensor.source.dtype)).to(self.wide)
        return rest.T.contiguous() if step.transposed else rest

    def _by_peft(self, step: ByPeft, total: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        shape = self.tensor.source.shape
        sibling = None if step.sibling is None else load_tensor(step.sibling).to(device="cpu", dtype=self.wide)
        mine = total.reshape(shape).cpu()
        weight, bias = (mine, sibling) if step.part == "weight" else (sibling, mine)
        assert weight is not None
        torch.set_num_threads(self._threads)
        try:
            merged_weight, merged_bias = step.layers.merged(step.module, weight, bias)
        finally:
            torch.set_num_threads(1)
        changed = merged_weight if step.part == "weight" else merged_bias
        assert changed is not None
        changed = changed.reshape(total.shape).to(self._device)
        return total.copy_(changed if step.weight == 1 else total + (changed - base) * step.weight)


def picked_from(tensor: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """The elements of a stored tensor that `matrix` means, with two axes."""
    index = tuple(slice(None) if pick is None else slice(*pick) if isinstance(pick, tuple) else pick
                  for pick in matrix.picked)  # fmt: skip
    tensor = tensor.reshape(matrix.view)
    tensor = tensor[index] if index else tensor
    return tensor.repeat_interleave(matrix.repeat, dim=1) if matrix.repeat > 1 else tensor


def _by_column(step: Step) -> bool:
    return isinstance(step, Dora) and step.by_column
