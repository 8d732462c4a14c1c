"""8 bit floats with a scale for the whole weight, for each row, or for each block (DeepSeek-V3, arXiv:2412.19437).

The weight is code times scale in float32, as transformers' `Fp8Dequantize` and DeepSeek's `weight_dequant` compute it
before they round to the dtype that is asked of them. `weight_scale_inv` is a scale as well, whatever its name says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.errors import InvalidFile, Refused
from lorakit.files.safetensors import StoredTensor
from lorakit.merge.quantised.finding import ACTIVATIONS, INSTEAD, Tensors, modules_with, parts_of, two_sizes, weight_of
from lorakit.merge.quantised.tiles import Tile, grid, nearer, spread, tiles, unchanged_tiles
from lorakit.merge.quantised.weight import QuantisedWeight, Scales

if TYPE_CHECKING:
    import torch


_DTYPES = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True)
class Fp8:
    """`scale` is the role of the scales; `tile` is how many rows and columns share one."""

    scale: str
    tile: Tile
    kind: str

    @property
    def name(self) -> str:
        return f"fp8 by {self.kind}"

    @property
    def rewritten(self) -> tuple[str, ...]:
        return ("weight", self.scale)

    def read(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        weight, scales = parts["weight"], parts[self.scale]
        return self._values(weight, self._grid(weight, scales))

    def packed(
        self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor, scales: Scales
    ) -> dict[str, torch.Tensor]:
        import torch

        codes, stored = parts["weight"], parts[self.scale]
        old = self._grid(codes, stored)
        before = self._values(codes, old)
        new = old
        if scales != "stored":
            fresh = tiles(weight, self.tile).abs().amax((2, 3)) / torch.finfo(codes.dtype).max
            fresh = _storable(fresh, stored.dtype)
            new = torch.where(fresh == 0, old, fresh)  # any scale does for a tile of zeros
            if scales == "best":
                both = (self._values(self._codes(weight, scale, codes.dtype), scale) for scale in (old, new))
                new = torch.where(nearer(weight, next(both), next(both), self.tile), new, old)
            new = torch.where(unchanged_tiles(before, weight, self.tile), old, new)
        fresh_codes = self._codes(weight, new, codes.dtype)
        keep = spread(unchanged_tiles(before, weight, self.tile), self.tile, (weight.shape[0], weight.shape[1]))
        mixed = torch.where(keep, codes.view(torch.uint8), fresh_codes.view(torch.uint8)).view(codes.dtype)
        return {"weight": mixed, self.scale: new.to(stored.dtype)}

    def _codes(self, weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        import torch

        highest = torch.finfo(dtype).max
        spread_scales = spread(scales, self.tile, (weight.shape[0], weight.shape[1]))
        quotient = torch.where(spread_scales == 0, 0.0, weight / spread_scales)
        return quotient.clamp(-highest, highest).to(dtype)

    def _grid(self, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return scales.float().reshape(grid((weight.shape[0], weight.shape[1]), self.tile))

    def _values(self, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return weight.float() * spread(scales, self.tile, (weight.shape[0], weight.shape[1]))


def _storable(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What will be read; powers of two are rounded up, so that nothing is clamped."""
    import torch

    if dtype == torch.float8_e8m0fnu:
        return torch.where(scales > 0, torch.exp2(torch.ceil(torch.log2(scales))), scales)
    return scales.to(dtype).float()


def find_fp8(method: str, settings: Mapping[str, Any], tensors: Tensors, dtype: str) -> dict[str, QuantisedWeight]:
    algorithm = settings.get("quant_algo", "FP8")
    if method == "modelopt" and algorithm != "FP8":
        raise Refused(f"the base is quantised by modelopt as {algorithm}, which can't be read here: {INSTEAD}")
    found = {}
    for role in ("weight_scale_inv", "weight_scale"):
        for module in modules_with(tensors, role):
            parts = parts_of(module, tensors, ("weight", role), ACTIVATIONS)
            weight = parts["weight"]
            if weight.dtype not in _DTYPES:
                raise Refused(f"'{weight.name}' has scales, and is stored as {weight.dtype}: {INSTEAD}")
            shape = two_sizes(weight.shape, module)
            tile, kind = _tile(parts[role], shape, settings.get("weight_block_size"))
            found[weight.name] = weight_of(module, Fp8(role, tile, kind), shape, dtype, parts)
    return found


def _tile(scales: StoredTensor, shape: tuple[int, int], block: Any) -> tuple[Tile, str]:
    """How many rows and columns share a scale, by the shape of the scales."""
    if scales.dtype not in ("F32", "BF16", "F16", "F8_E8M0"):
        raise Refused(f"'{scales.name}' are scales stored as {scales.dtype}, which can't be read here: {INSTEAD}")
    if scales.shape in ((), (1,), (1, 1)) and (block is None or grid(shape, (block[0], block[1])) != (1, 1)):
        return shape, "tensor"
    if scales.shape in ((shape[0],), (shape[0], 1)) and block is None:
        return (1, shape[1]), "channel"
    if block is not None and scales.shape == grid(shape, (int(block[0]), int(block[1]))):
        return (int(block[0]), int(block[1])), "block"
    raise InvalidFile(
        f"'{scales.name}' {list(scales.shape)} fits no way to scale a weight {list(shape)}; the config's "
        f"weight_block_size is {block}"
    )
