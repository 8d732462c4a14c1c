"""compressed-tensors: packed integers, int8 and fp8, a scale a tensor, channel, group or block; by its own functions.

It computes in the scales' dtype. What it guesses from shapes (the size of a block, where the last one is ragged) it is
told here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lorakit.merge.quantised.library import compressed_tensors, library_arguments
from lorakit.merge.quantised.tiles import Tile, grid, nearer, spread, tiles, unchanged_tiles
from lorakit.merge.quantised.weight import Scales

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Compressed:
    """`arguments` is the `weights` section of the group of the config that the weight belongs to."""

    arguments: Mapping[str, Any]
    shape: tuple[int, int]
    packed_: bool

    @property
    def name(self) -> str:
        kind = "W" if self.arguments.get("type") == "int" else "fp"
        return f"compressed-tensors {kind}{self.bits} by {self.arguments['strategy']}"

    @property
    def bits(self) -> int:
        return int(self.arguments["num_bits"])

    @property
    def symmetric(self) -> bool:
        return bool(self.arguments.get("symmetric", True))

    @property
    def rewritten(self) -> tuple[str, ...]:
        codes = "weight_packed" if self.packed_ else "weight"
        return (codes, "weight_scale") if self.symmetric else (codes, "weight_scale", "weight_zero_point")

    @property
    def tile(self) -> Tile:
        strategy = self.arguments["strategy"]
        if strategy == "tensor":
            return self.shape
        if strategy == "channel":
            return 1, self.shape[1]
        if strategy == "group":
            return 1, int(self.arguments["group_size"])
        height, width = self.arguments["block_structure"]
        return int(height), int(width)

    @cached_property
    def args(self) -> Any:
        return library_arguments(self.arguments)

    def read(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._values(parts, self._codes(parts), parts["weight_scale"], self._zeros(parts))

    def packed(
        self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor, scales: Scales
    ) -> dict[str, torch.Tensor]:
        import torch

        codes, scale, zeros = self._codes(parts), parts["weight_scale"], self._zeros(parts)
        order = self._order(parts)
        before = self._values(parts, codes, scale, zeros)
        unchanged = unchanged_tiles(before[:, order], weight[:, order], self.tile)
        if scales != "stored":
            fresh, fresh_zeros = self._fresh(weight[:, order], scale, zeros)
            keep = unchanged
            if scales == "best":
                as_stored = self._rounded(parts, weight, scale, zeros, codes.dtype)
                as_fresh = self._rounded(parts, weight, fresh, fresh_zeros, codes.dtype)
                values = (
                    self._values(parts, as_stored, scale, zeros)[:, order],
                    self._values(parts, as_fresh, fresh, fresh_zeros)[:, order],
                )
                keep = keep | ~nearer(weight[:, order], *values, self.tile)
            scale = torch.where(keep.reshape(scale.shape), scale, fresh)
            if zeros is not None and fresh_zeros is not None:
                zeros = torch.where(keep.reshape(zeros.shape), zeros, fresh_zeros)
        rounded = self._rounded(parts, weight, scale, zeros, codes.dtype)
        same = spread(unchanged, self.tile, self.shape)[:, order.argsort()]
        codes = torch.where(same, codes.view(torch.uint8), rounded.view(torch.uint8)).view(codes.dtype)
        return self._written(codes, scale, zeros)

    def _rounded(
        self,
        parts: Mapping[str, torch.Tensor],
        weight: torch.Tensor,
        scale: torch.Tensor,
        zeros: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        codes: torch.Tensor = compressed_tensors().quantize(
            x=weight, scale=scale, zero_point=zeros, args=self.args, dtype=dtype, g_idx=parts.get("weight_g_idx")
        )
        return codes

    def _fresh(
        self, weight: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A scale (and a zero) from the extremes of each tile."""
        cut = tiles(weight, self.tile)
        fresh, fresh_zeros = compressed_tensors().calculate_qparams(cut.amin((2, 3)), cut.amax((2, 3)), self.args)
        return fresh.reshape(scale.shape).to(scale.dtype), (
            None if zeros is None else fresh_zeros.reshape(zeros.shape).to(zeros.dtype)
        )

    def _order(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The columns, those of a group side by side."""
        import torch

        index = parts.get("weight_g_idx")
        if index is None or (index < 0).any():
            return torch.arange(self.shape[1])
        return torch.argsort(index)

    def _codes(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch

        if not self.packed_:
            return parts["weight"]
        codes: torch.Tensor = compressed_tensors().unpack_from_int32(
            parts["weight_packed"], self.bits, torch.Size(self.shape)
        )
        return codes

    def _zeros(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        import torch

        zeros = parts.get("weight_zero_point")
        if zeros is None or not self.packed_:
            return zeros
        shape = torch.Size(grid(self.shape, self.tile))
        unpacked: torch.Tensor = compressed_tensors().unpack_from_int32(zeros, self.bits, shape, packed_dim=0)
        return unpacked

    def _values(
        self,
        parts: Mapping[str, torch.Tensor],
        codes: torch.Tensor,
        scale: torch.Tensor,
        zeros: torch.Tensor | None,
    ) -> torch.Tensor:
        values: torch.Tensor = compressed_tensors().dequantize(
            x_q=codes, scale=scale, zero_point=zeros, args=self.args, dtype=scale.dtype, g_idx=parts.get("weight_g_idx")
        )
        return values.float()

    def _written(self, codes: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None) -> dict[str, torch.Tensor]:
        pack = compressed_tensors().pack_to_int32
        written = {"weight_packed" if self.packed_ else "weight": codes, "weight_scale": scale}
        if self.packed_:
            written["weight_packed"] = pack(codes, self.bits)
        if zeros is not None and not self.symmetric:
            written["weight_zero_point"] = pack(zeros, self.bits, packed_dim=0) if self.packed_ else zeros
        return written
