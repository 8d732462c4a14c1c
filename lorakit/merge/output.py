"""What stands beside the weights: companions, config, index, and where all of it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakit.files.digests import file_digest
from lorakit.files.folders import write_json
from lorakit.files.hub import push_folder
from lorakit.files.provenance import write_provenance
from lorakit.merge.base import INDEX
from lorakit.merge.card import CARD, card
from lorakit.merge.companions import write_config
from lorakit.merge.report import MergeReport


def write_beside(report: MergeReport, folder: Path) -> None:
    """Everything but the weights and `lorakit.json`."""
    plan = report.plan
    write_config(plan.base.folder, folder, plan.dtype, plan.config)
    for companion in report.companions:
        companion.write(folder)
    if len(plan.shards) > 1 or (plan.base.index is not None and plan.shards[0].name != "model.safetensors"):
        old = plan.base.index or {}
        metadata = old.get("metadata")
        total = sum(tensor.nbytes for shard in plan.shards for tensor in shard.target.tensors.values())
        placed = {name: shard.name for shard in plan.shards for name in shard.target.tensors}
        known = [name for name in old.get("weight_map", {}) if name in placed]
        index = {
            **old,
            "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": total},
            "weight_map": {name: placed[name] for name in dict.fromkeys([*known, *placed])},
        }
        write_json(folder / INDEX, index)


def write_lineage(report: MergeReport, folder: Path, *, arithmetic: str | None = None) -> None:
    """`lorakit.json`: parents with their digests, settings, and the whole report; and in words, the card.

    `arithmetic`: whose it was, where it was not this process's.
    """
    plan = report.plan
    base = plan.base
    parents: list[dict[str, Any]] = [
        {
            "kind": "base",
            "path": str(base.folder.absolute()),
            "reference": base.reference,
            # of a base on the hub, a resumed merge may not have needed every shard
            "identity": base.identity if all(shard.file.is_file() for shard in base.shards) else None,
            **({} if base.remote is None else {"commit": base.remote.commit}),
        }
    ]
    for adapter in report.adapters:
        for source in adapter.files():
            digest = file_digest(source.file)
            parents.append(
                {"kind": "adapter", "path": str(source.folder), "sha256": digest, "weight": source.weight}
            )  # fmt: skip
    settings = {"dtype": plan.dtype, "device": report.device, "strict": not report.unplaced, **report.settings}
    if arithmetic is not None:
        settings["arithmetic"] = arithmetic
    elif any(plan.computed):
        from lorakit.merge.blocks import arithmetic as of_this_machine

        settings["arithmetic"] = of_this_machine(report.device)
    (folder / CARD).write_text(card(report, parents[1:]), encoding="utf-8")
    write_provenance(folder, "merge", parents, settings, report=report.as_dict())


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a result; its address. `lorakit.json` and what `unmerge` needs stay: they name places on this machine.

    Raises:
        LorakitError: the hub refused, or can't be reached. The folder stays.
    """
    return push_folder(folder, repository, private=private, message="Merged by lorakit", leave=("lorakit.*",))
