"""bitsandbytes' 4 bit: nf4 and fp4, the scales quantised once more or not.

As `bitsandbytes.functional.dequantize_4bit` does (0.50): code times absmax in float32, rounded to the dtype that the
weight had before. That rounding is kept: it is the weight that QLoRA trains on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.merge.quantised.weight import Scales

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Bnb4:
    """`state` is the JSON that bitsandbytes keeps beside the weight."""

    kind: str
    shape: tuple[int, int]
    block: int
    dtype: str
    nested_block: int = 0
    nested_offset: float = 0.0

    @property
    def name(self) -> str:
        return f"bitsandbytes {self.kind}{' with double quantisation' if self.nested_block else ''}"

    @property
    def rewritten(self) -> tuple[str, ...]:
        return ("weight", "absmax", "nested_absmax") if self.nested_block else ("weight", "absmax")

    def read(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._values(parts, self._codes(parts), self._absmax(parts))

    def packed(
        self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor, scales: Scales
    ) -> dict[str, torch.Tensor]:
        import torch

        codes, absmax = self._codes(parts), self._absmax(parts)
        changed = self._blocks(weight != self._values(parts, codes, absmax)).any(-1)
        blocks = self._blocks(weight)
        written: dict[str, torch.Tensor] = {}
        if scales != "stored":
            wanted = blocks.abs().amax(-1)
            if scales == "best":
                stored_error, fresh_error = (_error(parts["quant_map"], blocks, scale) for scale in (absmax, wanted))
                wanted = torch.where(fresh_error < stored_error, wanted, absmax)
            written, absmax = self._written_absmax(parts, torch.where(changed, wanted, absmax), changed)
        fresh = _nearest_in(parts["quant_map"], blocks, absmax)
        codes = torch.where(changed.unsqueeze(-1), fresh, self._blocks(codes)).flatten()[: codes.numel()]
        pairs = torch.nn.functional.pad(codes.flatten(), (0, codes.numel() % 2)).reshape(-1, 2).to(torch.uint8)
        written["weight"] = ((pairs[:, 0] << 4) | pairs[:, 1]).view(parts["weight"].dtype)
        return {role: written.get(role, parts[role]) for role in self.rewritten}

    def _blocks(self, values: torch.Tensor) -> torch.Tensor:
        """In blocks of as many as share a scale, along the rows of the weight."""
        import torch

        flat = values.flatten()
        return torch.nn.functional.pad(flat, (0, -flat.numel() % self.block)).reshape(-1, self.block)

    def _codes(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch

        raw = parts["weight"].flatten().view(torch.uint8)
        return torch.stack((raw >> 4, raw & 0xF), -1).flatten()[: self.shape[0] * self.shape[1]].long()

    def _absmax(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if not self.nested_block:
            return parts["absmax"].float()
        return self._nested(parts, parts["absmax"].long(), parts["nested_absmax"])

    def _nested(self, parts: Mapping[str, torch.Tensor], codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        spread = absmax.repeat_interleave(self.nested_block)[: codes.numel()]
        values: torch.Tensor = parts["nested_quant_map"][codes] * spread + self.nested_offset
        return values

    def _values(self, parts: Mapping[str, torch.Tensor], codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        import torch

        spread = absmax.repeat_interleave(self.block)[: codes.numel()]
        rounded = (parts["quant_map"][codes] * spread).to(getattr(torch, self.dtype))
        return rounded.float().reshape(self.shape)

    def _written_absmax(
        self, parts: Mapping[str, torch.Tensor], wanted: torch.Tensor, changed: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What to store for these absmax, and what it will be read as.

        The offset stays as it is: it stands in JSON whose length is planned before, and is a mere centre. So does the
        scale of the scales, while it suffices: those of unchanged blocks are then read as before.
        """
        import torch

        if not self.nested_block:
            return {"absmax": wanted}, wanted
        pad = -wanted.numel() % self.nested_block
        centred = torch.nn.functional.pad(wanted - self.nested_offset, (0, pad)).reshape(-1, self.nested_block)
        touched = torch.nn.functional.pad(changed, (0, pad)).reshape(-1, self.nested_block).any(-1)
        nested = torch.where(touched, centred.abs().amax(-1).maximum(parts["nested_absmax"]), parts["nested_absmax"])
        fresh = nearest(parts["nested_quant_map"], centred * (1 / nested.clamp(min=1e-38)).unsqueeze(-1))
        kept = torch.nn.functional.pad(parts["absmax"].long(), (0, pad)).reshape(-1, self.nested_block)
        codes = torch.where(touched.unsqueeze(-1), fresh, kept).flatten()[: wanted.numel()]
        return {"absmax": codes, "nested_absmax": nested}, self._nested(parts, codes, nested)


def _nearest_in(code: torch.Tensor, blocks: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    return nearest(code, (blocks * (1 / absmax.clamp(min=1e-38)).unsqueeze(-1)).clamp(-1, 1))


def _error(code: torch.Tensor, blocks: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    return (code[_nearest_in(code, blocks, absmax)] * absmax.unsqueeze(-1) - blocks).square().sum(-1)


def nearest(code: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The index of the nearest entry of a code book; of two at the same distance, the lower value's."""
    import torch

    ordered, order = code.sort(stable=True)
    return order[torch.bucketize(values, (ordered[:-1] + ordered[1:]) / 2)]


def parse_state(text: bytes) -> Bnb4:
    """Raises ValueError, KeyError or TypeError when it is not what bitsandbytes writes."""
    state: dict[str, Any] = json.loads(text)
    rows, columns = (int(size) for size in state["shape"])
    if state["dtype"] not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"a dtype {state['dtype']!r}")
    block = int(state["blocksize"])
    if block <= 0:
        raise ValueError(f"a block of {block}")
    nested = int(state.get("nested_blocksize") or 0)
    return Bnb4(
        str(state["quant_type"]), (rows, columns), block, state["dtype"], nested, float(state.get("nested_offset", 0.0))
    )
