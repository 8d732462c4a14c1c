"""AWQ (arXiv:2306.00978), packed as AutoAWQ's GEMM kernel wants it: 4 bits, outputs interleaved within a word.

As AutoAWQ's `dequantize_gemm` does: (code - zero) times scale, in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.errors import InvalidFile, Refused
from lorakit.files.tensors import torch_dtype
from lorakit.merge.quantised.finding import INSTEAD, Tensors, modules_with, parts_of, two_sizes, weight_of
from lorakit.merge.quantised.gptq import rounded
from lorakit.merge.quantised.packing import packed, unpacked
from lorakit.merge.quantised.weight import QuantisedWeight, Scales

if TYPE_CHECKING:
    import torch

BITS = 4
_IN_WORD = (0, 2, 4, 6, 1, 3, 5, 7)  # which output stands in which nibble, the lowest first


@dataclass(frozen=True, slots=True)
class Awq:
    group: int
    dtype: str
    name: str = "AWQ 4 bit"
    rewritten: tuple[str, ...] = ("qweight",)

    def read(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scales, zeros = self._groups(parts)
        return ((_outputs(parts["qweight"]) - zeros) * scales).float().T.contiguous()

    def packed(
        self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor, scales: Scales
    ) -> dict[str, torch.Tensor]:
        """With the stored scales and zeros always: AWQ's are searched for with calibration data."""
        scale, zeros = self._groups(parts)
        codes = _outputs(parts["qweight"])
        unchanged = ((codes - zeros) * scale).float() == weight.T
        return {"qweight": _words(rounded(weight.T, scale, zeros, codes, unchanged, BITS))}

    def _groups(self, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        zeros = _outputs(parts["qzeros"])
        scales = parts["scales"].to(torch_dtype(self.dtype))
        return scales.repeat_interleave(self.group, 0), zeros.repeat_interleave(self.group, 0)


def _outputs(words: torch.Tensor) -> torch.Tensor:
    nibbles = unpacked(words, BITS, 1).reshape(words.shape[0], -1, 8)
    order = [_IN_WORD.index(output) for output in range(8)]
    return nibbles[..., order].flatten(1)


def _words(codes: torch.Tensor) -> torch.Tensor:
    return packed(codes.reshape(codes.shape[0], -1, 8)[..., list(_IN_WORD)].flatten(1), BITS, 1)


def find_awq(method: str, settings: Mapping[str, Any], tensors: Tensors, dtype: str) -> dict[str, QuantisedWeight]:
    layout = str(settings.get("version") or settings.get("checkpoint_format") or settings.get("format") or "gemm")
    bits = settings.get("bits", settings.get("w_bit", 4))
    if layout.lower() != "gemm" or bits != 4:
        raise Refused(f"the base is quantised by AWQ in {bits} bits for {layout}, not 4 for gemm: {INSTEAD}")
    found = {}
    for module in modules_with(tensors, "qweight"):
        parts = parts_of(module, tensors, ("qweight", "qzeros", "scales"))
        into, words = two_sizes(parts["qweight"].shape, module)
        groups, out = parts["scales"].shape[0], words * 8
        if parts["scales"].shape != (groups, out) or parts["qzeros"].shape != (groups, words) or into % groups:
            raise InvalidFile(f"'{module}.qweight' {[into, words]} and its scales and zeros do not fit together")
        found[f"{module}.weight"] = weight_of(module, Awq(into // groups, dtype), (out, into), dtype, parts)
    return found
