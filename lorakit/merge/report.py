"""What a merge did, or would do: as a value, as data, and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.adapters.adapter import Adapter
from lorakit.merge.companions import Companion
from lorakit.merge.journal import SurvivalSums
from lorakit.merge.plan import ComputeTensor, MergePlan
from lorakit.merge.steps import AddProduct, Dora, Step

LOW_SURVIVAL = 0.9

_WORDS = {
    "AddProduct": "low-rank", "AddStored": "bias of lora_B", "Take": "trained copy", "TakeRows": "trained rows",
    "Dora": "DoRA", "SubtractInit": "its start taken out", "ByPeft": "by PEFT",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was done, or with `dry_run` what would be.

    `survivals`: per weight, what rounding left of its change. `resumed`: the shards that were there already.
    `residual`: the adapter of what rounding lost: its path, its weights, and those left out. `undo`: how many bytes
    are kept to make the base again. `pushed`: the address that the result was uploaded to.
    """

    out: Path | None
    plan: MergePlan
    adapters: tuple[Adapter, ...]
    companions: tuple[Companion, ...]
    device: str
    dry_run: bool
    seconds: float = 0.0
    survivals: Mapping[str, SurvivalSums] = field(default_factory=dict)
    resumed: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    residual: Mapping[str, Any] | None = None
    undo: int | None = None
    pushed: str | None = None

    @property
    def unplaced(self) -> tuple[str, ...]:
        """Adapter tensors that were left out, each with the reason; only with `strict=False`."""
        return self.plan.unplaced

    @property
    def survival(self) -> float | None:
        """⟨W′-W, Δ⟩ / ‖Δ‖² over all weights that were rounded: 1 when their change is all there, on the whole."""
        norm = sum(sums.norm for sums in self.survivals.values())
        return sum(sums.kept for sums in self.survivals.values()) / norm if norm else None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know: a base that was untied, a change that rounding mostly lost."""
        return (*self.plan.notes, *self._warning(), *self._of_residual())

    def _warning(self) -> tuple[str, ...]:
        low = [sums for sums in self.survivals.values() if sums.ratio is not None and sums.ratio < LOW_SURVIVAL]
        if not low or self.survival is None:
            return ()
        if self.plan.quantised_again:
            return (
                f"the base's format lost part of the fine-tune: {self.survival:.0%} of the change is left on the "
                f"whole; --onto dequantised writes it in 16 bit",
            )
        change = (sum(sums.norm for sums in low) / (sum(sums.weight for sums in low) or 1.0)) ** 0.5
        return (
            f"rounding lost part of the fine-tune: {self.survival:.0%} of the change is left on the whole, and less "
            f"than {LOW_SURVIVAL:.0%} in {len(low)} of {len(self.survivals)} weights (their change is {change:.3%} of "
            f"the weights){self._remedies()}",
        )

    def _remedies(self) -> str:
        if self.residual is not None:
            return ""
        remedies = ["--residual DIR writes what was lost as a small adapter"]
        if self.settings.get("rounding") != "stochastic":
            remedies.insert(0, "--rounding stochastic keeps the mean")
        if any(tensor.target.dtype == "BF16" for tensor in self.plan.computed):
            remedies.insert(0, "--dtype fp16 is finer")
        return f"; {', '.join(remedies)}"

    def _of_residual(self) -> tuple[str, ...]:
        if self.residual is None:
            return ()
        left_out = list(self.residual["left_out"])
        said = f"; without {len(left_out)} others (the first: {left_out[0]})" if left_out else ""
        return (
            f"what rounding lost of {self.residual['weights']} weights is in '{self.residual['path']}': load it beside "
            f"the result{said}",
        )

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for `--json` and `lorakit.json`."""
        changed = [tensor for tensor in self.plan.computed if tensor.steps]
        return {
            "out": None if self.out is None else str(self.out),
            "base": str(self.plan.base.folder),
            "adapters": [
                {"path": str(source.folder), "weight": source.weight, "rank": adapter.rank}
                for adapter in self.adapters
                for source in adapter.files()
            ],
            "dry_run": self.dry_run,
            "device": self.device,
            "dtype": self.plan.dtype,
            **self.settings,
            "bytes": self.plan.nbytes,
            "seconds": round(self.seconds, 3),
            "tensors": sum(len(shard.target.tensors) for shard in self.plan.shards),
            "survival": self.survival,
            "merged": [
                {
                    **_described(tensor),
                    "survival": self.survivals[tensor.target.name].ratio
                    if tensor.target.name in self.survivals
                    else None,
                }
                for tensor in changed
            ],
            "placements": [
                {"adapter": placed.adapter, "tensor": placed.tensor, "weight": placed.weight, "role": placed.role}
                for placed in self.plan.placements
            ],
            "unplaced": list(self.unplaced),
            "notes": list(self.notes),
            "resumed": list(self.resumed),
            "residual": None if self.residual is None else dict(self.residual),
            "undo_bytes": self.undo,
            "pushed": self.pushed,
            "companions": {companion.name: str(companion.source) for companion in self.companions},
        }


def _described(tensor: ComputeTensor) -> dict[str, Any]:
    products = [step for step in tensor.steps if isinstance(step, AddProduct)]
    return {
        "weight": tensor.target.name,
        "shard": tensor.target.file.name,
        "dtype": tensor.target.dtype,
        "shape": list(tensor.target.shape),
        "transposed": any(product.transposed for product in products),
        "steps": list(dict.fromkeys(step_in_words(step) for step in tensor.steps)),
        "terms": [
            {"adapter": str(product.B.stored.file.parent), "rank": product.rank, "factor": product.factor}
            for product in products
        ],
    }


def step_in_words(step: Step) -> str:
    if isinstance(step, Dora):
        return f"DoRA {step.product.factor:g}·BA(r={step.product.rank})"
    if isinstance(step, AddProduct):
        return f"+ {step.factor:g}·BA(r={step.rank})"
    return _WORDS[type(step).__name__]
