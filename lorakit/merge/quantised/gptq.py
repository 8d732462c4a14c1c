"""GPTQ (arXiv:2210.17323), as AutoGPTQ and gptqmodel store it, of 2, 3, 4 or 8 bits.

As gptqmodel's `TorchLinear.dequantize_weight` does (7.7): scale of the column's group times (code - zero), both in the
model's dtype, which the scales are rounded to as they are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.errors import InvalidFile, Refused
from lorakit.files.tensors import torch_dtype
from lorakit.merge.quantised.finding import INSTEAD, Tensors, modules_with, parts_of, two_sizes, weight_of
from lorakit.merge.quantised.packing import packed, unpacked
from lorakit.merge.quantised.weight import QuantisedWeight, Scales

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Gptq:
    """`v1`: the zeros are stored less one. Without a `g_idx`, groups are `group` columns in a row."""

    bits: int
    group: int
    v1: bool
    dtype: str
    rewritten: tuple[str, ...] = ("qweight",)

    @property
    def name(self) -> str:
        return f"GPTQ {self.bits} bit"

    def read(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scales, zeros = self._groups(parts)
        return (scales * (unpacked(parts["qweight"], self.bits, 0) - zeros)).float().T.contiguous()

    def packed(
        self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor, scales: Scales
    ) -> dict[str, torch.Tensor]:
        """With the stored scales and zeros always: they are half of what GPTQ's calibration found."""
        scale, zeros = self._groups(parts)
        codes = unpacked(parts["qweight"], self.bits, 0)
        unchanged = (scale * (codes - zeros)).float() == weight.T
        return {"qweight": packed(rounded(weight.T, scale, zeros, codes, unchanged, self.bits), self.bits, 0)}

    def _groups(self, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of each (column of the weight, output)."""
        import torch

        scales = parts["scales"].to(torch_dtype(self.dtype))
        zeros = self._zeros(parts["qzeros"])[:, : scales.shape[1]]
        if "g_idx" in parts:
            index = parts["g_idx"].long()
        else:
            index = torch.arange(parts["qweight"].shape[0] * 32 // self.bits) // self.group
        return scales[index], zeros[index]

    def _zeros(self, words: torch.Tensor) -> torch.Tensor:
        """One is added as gptqmodel adds it: to whole words, where numbers do not straddle them, so that a zero of 0
        carries into its neighbour as it was borrowed from it.
        """
        import torch

        if not self.v1:
            return unpacked(words, self.bits, 1)
        if 32 % self.bits:
            return (unpacked(words, self.bits, 1) + 1) & ((1 << self.bits) - 1)
        ones = sum(1 << shift for shift in range(0, 32, self.bits))
        total = (words.long() + ones) & 0xFFFFFFFF
        return unpacked(torch.where(total >= 1 << 31, total - (1 << 32), total).int(), self.bits, 1)


def rounded(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor,
    codes: torch.Tensor,
    unchanged: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """The nearest code of each element; the stored one where the weight is unchanged or its scale is 0."""
    import torch

    scale = scale.float()
    fresh = torch.round(weight / scale + zeros).clamp(0, (1 << bits) - 1)
    return torch.where(unchanged | (scale == 0), codes, fresh.nan_to_num().int())


def find_gptq(method: str, settings: Mapping[str, Any], tensors: Tensors, dtype: str) -> dict[str, QuantisedWeight]:
    layout = str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise Refused(f"the base is quantised by GPTQ and packed for {layout}, which can't be read here: {INSTEAD}")
    if settings.get("pack_dtype", "int32") != "int32":
        raise Refused(f"the base is quantised by GPTQ in words of {settings['pack_dtype']}, not int32: {INSTEAD}")
    found = {}
    for module in modules_with(tensors, "qweight"):
        parts = parts_of(module, tensors, ("qweight", "qzeros", "scales"), ("g_idx",))
        rows, out = two_sizes(parts["qweight"].shape, module)
        into = parts["g_idx"].shape[0] if "g_idx" in parts else rows * 32 // int(settings["bits"])
        bits, groups = (rows * 32 // into if into else 0), parts["scales"].shape[0]
        if bits not in (2, 3, 4, 8) or bits * into != rows * 32 or parts["scales"].shape != (groups, out):
            raise InvalidFile(f"'{module}.qweight' {[rows, out]} has no whole number of bits for {into} inputs")
        scheme = Gptq(bits, -(-into // groups), layout == "gptq", dtype)
        found[f"{module}.weight"] = weight_of(module, scheme, (out, into), dtype, parts)
    return found
