"""bitsandbytes' 8 bit (LLM.int8(), arXiv:2208.07339): one scale a row.

As `bitsandbytes.functional.int8_vectorwise_dequant` does (0.50): int8 times the row's absmax over 127, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.merge.quantised.tiles import nearer
from lorakit.merge.quantised.weight import Scales

if TYPE_CHECKING:
    import torch

_ONE_127TH = 7.874015718698502e-3  # of a float32, as there


@dataclass(frozen=True, slots=True)
class Bnb8:
    name: str = "bitsandbytes int8"
    rewritten: tuple[str, ...] = ("weight", "SCB")

    def read(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return _values(parts["weight"], parts["SCB"].float())

    def packed(
        self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor, scales: Scales
    ) -> dict[str, torch.Tensor]:
        import torch

        before, absmax = self.read(parts), parts["SCB"].float()
        changed = (weight != before).any(-1)
        if scales != "stored":
            fresh = torch.where(changed, weight.abs().amax(-1), absmax)
            if scales == "best":
                stored_values, fresh_values = (_values(_codes(weight, scale), scale) for scale in (absmax, fresh))
                better = nearer(weight, stored_values, fresh_values, (1, weight.shape[1])).flatten()
                fresh = torch.where(better, fresh, absmax)
            absmax = fresh
        codes = torch.where(changed.unsqueeze(-1), _codes(weight, absmax), parts["weight"])
        return {"weight": codes, "SCB": absmax}


def _values(codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    return codes * absmax.view(-1, 1) * _ONE_127TH


def _codes(weight: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    import torch

    step = torch.where(absmax > 0, 127.0 / absmax, 0.0)
    return torch.round(weight * step.unsqueeze(-1)).clamp(-127, 127).to(torch.int8)
