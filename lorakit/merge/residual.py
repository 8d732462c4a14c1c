"""What rounding lost, as a small adapter of the merged model.

E = exact sum - written weight has full rank; what of it the fine-tune would miss is mostly what it does to inputs that
the adapter looks at, the row space of its A. With an orthonormal basis Q of that space as A and E Qᵀ as B, the merged
model with this adapter answers such inputs as the unrounded sum does: B A x = E Qᵀ Q x = E x.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.config import AdapterConfig
from lorakit.adapters.delta import Delta, Term
from lorakit.adapters.keys import parse_key
from lorakit.adapters.source import Source
from lorakit.adapters.writing import write_adapter_files
from lorakit.errors import UsageError
from lorakit.files.digests import file_digest
from lorakit.files.folders import file_state, whole_folder, write_all
from lorakit.files.provenance import write_provenance
from lorakit.files.safetensors import StoredTensor, planned_header
from lorakit.files.tensors import load_tensor, tensor_bytes
from lorakit.merge.plan import ComputeTensor, MergePlan
from lorakit.merge.spot_check import is_simple
from lorakit.merge.steps import AddProduct

_NARROW = frozenset({"F16", "BF16"})
_FACTORS = ".factors.safetensors"  # as they are computed, each of its own rank


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the factors of one weight's residual stand in the file of factors."""

    module: str
    A: StoredTensor
    B: StoredTensor


class Residuals:
    """The residuals of all weights of a merge, written to a file as they are computed."""

    def __init__(self, plan: MergePlan, folder: Path) -> None:
        self.folder = folder
        modules, self.left_out = modules_of(plan)
        if not modules:
            raise UsageError(
                "there is no residual to write: no linear weight of this merge is rounded to 16 bit by low-rank "
                "factors alone"
            )
        shapes = {name: _shapes(tensor) for name, (_, tensor) in modules.items()}
        planned = [(f"{name} {part}", "F32", shape) for name, both in shapes.items() for part, shape in both.items()]
        head, self._header = planned_header(folder / _FACTORS, planned, {})
        stored = self._header.tensors
        self.places = {
            name: _Place(module, stored[f"{name} A"], stored[f"{name} B"]) for name, (module, _) in modules.items()
        }
        self._file = os.open(folder / _FACTORS, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        os.truncate(self._file, self._header.size)
        write_all(self._file, head, 0)

    def of(self, tensor: ComputeTensor, device: str) -> Residual | None:
        """What takes in one weight's blocks; None where it has no residual."""
        place = self.places.get(tensor.target.name)
        return None if place is None else Residual(tensor, place, self._file, device)

    def write(self, adapters: Sequence[Adapter], out: Path) -> None:
        """The adapter's files, once all weights are done."""
        rank = max(place.A.shape[0] for place in self.places.values())
        first = adapters[0].config
        config = AdapterConfig(
            rank=rank, alpha=rank, fan_in_fan_out=first.fan_in_fan_out, base=str(out.absolute()),
            raw={"task_type": first.raw.get("task_type")},
        )  # fmt: skip
        file = self._header.file
        deltas = {place.module: Delta((Term(place.B, place.A, 1.0),)) for place in self.places.values()}
        write_adapter_files(
            Adapter(deltas, (Source(self.folder, config, file, file_state(file)),), config=config), self.folder
        )
        parents = [
            {"kind": "adapter", "path": str(source.folder), "sha256": file_digest(source.file), "weight": source.weight}
            for adapter in adapters
            for source in adapter.files()
        ]
        merged = {"kind": "base", "path": str(out.absolute())}
        write_provenance(self.folder, "residual", [merged, *parents], {}, rank=rank, left_out=list(self.left_out))
        file.unlink()

    def as_dict(self, folder: Path) -> dict[str, Any]:
        return {"path": str(folder), "weights": len(self.places), "left_out": list(self.left_out)}

    def close(self) -> None:
        os.close(self._file)


class Residual:
    """The residual of one weight, block by block."""

    def __init__(self, tensor: ComputeTensor, place: _Place, file: int, device: str) -> None:
        steps = _products(tensor)
        rows = torch.cat([load_tensor(step.A.stored).double().reshape(step.A.view) for step in steps])
        basis = torch.linalg.qr(rows.T)[0]  # (in, k), orthonormal
        self._place, self._file = place, file
        self._basis = basis.to(device=device, dtype=torch.float32)
        # of a transposed weight, each block of rows adds to all of B
        self._sum = torch.zeros(place.B.shape, device=device) if steps[0].transposed else None
        write_all(file, tensor_bytes(basis.T.float().contiguous()), place.A.start)

    def add(self, total: torch.Tensor, rounded: torch.Tensor, first: int) -> None:
        """Take in the block that begins at the row `first`."""
        lost = (total - rounded).float()
        if self._sum is not None:
            self._sum += lost.T @ self._basis[first : first + len(lost)]
            return
        rows = (lost @ self._basis).cpu()
        write_all(self._file, tensor_bytes(rows), self._place.B.start + first * rows.shape[1] * rows.element_size())

    def finish(self) -> None:
        if self._sum is not None:
            write_all(self._file, tensor_bytes(self._sum.cpu()), self._place.B.start)


@contextmanager
def residual_folder(plan: MergePlan, folder: Path) -> Iterator[Residuals]:
    """Residuals to fill and write; the folder appears at the end, whole or not at all."""
    with whole_folder(folder) as beside:
        residuals = Residuals(plan, beside)
        try:
            yield residuals
        finally:
            residuals.close()


def modules_of(plan: MergePlan) -> tuple[Mapping[str, tuple[str, ComputeTensor]], tuple[str, ...]]:
    """By weight, the module that an adapter calls it, where there can be a residual; and the weights left out."""
    found: dict[str, tuple[str, ComputeTensor]] = {}
    left_out: list[str] = []
    for shard in plan.shards:
        left_out += [f"{whole.name}: it is quantised" for whole in shard.whole if whole.computed.steps]
        for tensor in shard.computed:
            if not tensor.steps or tensor.target.dtype not in _NARROW:
                continue
            module = _module(tensor)
            if module is None or any(module == other for other, _ in found.values()):
                left_out.append(f"{tensor.target.name}: its change is not that of one linear layer's factors alone")
            else:
                found[tensor.target.name] = (module, tensor)
    return found, tuple(left_out)


def _module(tensor: ComputeTensor) -> str | None:
    if not is_simple(tensor):
        return None
    key = parse_key(_products(tensor)[0].A.stored.name)
    return key.module if key.part == "lora_A" and len(tensor.source.shape) == 2 else None


def _products(tensor: ComputeTensor) -> list[AddProduct]:
    return [step for step in tensor.steps if isinstance(step, AddProduct)]


def _shapes(tensor: ComputeTensor) -> dict[str, tuple[int, int]]:
    steps = _products(tensor)
    out, into = steps[0].B.shape[0], steps[0].A.shape[1]
    rank = min(into, sum(step.rank for step in steps))
    return {"A": (rank, into), "B": (out, rank)}
