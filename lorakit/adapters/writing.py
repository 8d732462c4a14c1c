"""Write an adapter as a PEFT folder that PEFT and every vLLM load.

One rank for all modules (vLLM before 0.32 ignores rank and alpha patterns), alpha = rank, each term's scale and weight
in its B, rows of zeros where a module has a smaller rank: the deltas stay exactly what they were.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.adapters.adapter import WEIGHTS, Adapter
from lorakit.adapters.delta import Delta
from lorakit.adapters.keys import Part, factor_name
from lorakit.files.digests import file_digest
from lorakit.files.folders import copy_range, whole_folder, write_all, write_json
from lorakit.files.provenance import write_provenance
from lorakit.files.safetensors import planned_header
from lorakit.files.tensors import tensor_bytes

if TYPE_CHECKING:
    import torch


def save_adapter(adapter: Adapter, folder: Path, *, rename: Mapping[str, str] | None = None) -> Path:
    """Write `adapter` to `folder`, whole or not at all; `rename` gives modules other paths.

    Raises:
        UnsupportedAdapter: there is more in it than low-rank factors.
        Conflict: `folder` exists, or a source was written again meanwhile.
    """
    adapter.require_plain(work="written")
    with whole_folder(folder) as beside:
        write_adapter_files(adapter, beside, rename=rename)
        write_provenance(
            beside,
            "mix" if adapter.report or len(adapter.sources) > 1 else "save",
            parents=[
                {"path": str(source.folder), "sha256": file_digest(source.file), "weight": source.weight}
                for source in adapter.sources
            ],
            settings={"method": "linear", "rank": "exact"},
            rank=adapter.rank,
            truncation_error=0.0,
            **({"report": adapter.report.as_dict()} if adapter.report else {}),
        )
        adapter.ensure_unchanged()
    return folder


def write_adapter_files(adapter: Adapter, folder: Path, *, rename: Mapping[str, str] | None = None) -> None:
    """`adapter_model.safetensors` and `adapter_config.json` into a folder that is there."""
    names = rename or {}
    rank = adapter.rank
    deltas = {names.get(module, module): delta for module, delta in adapter.deltas.items()}
    plan: list[tuple[str, str, tuple[int, ...]]] = [
        (factor_name(module, part), "F32", shape)
        for module, delta in deltas.items()
        for part, shape in _shapes(delta, rank)
    ]
    plan += [(stored.name, stored.dtype, stored.shape) for stored in adapter.others]
    head, header = planned_header(folder / WEIGHTS, plan, {"format": "pt"})
    with (folder / WEIGHTS).open("xb") as stream:
        os.truncate(stream.fileno(), header.size)
        write_all(stream.fileno(), head, 0)
        for name, tensor in _tensors(deltas, rank):
            write_all(stream.fileno(), tensor_bytes(tensor), header.tensors[name].start)
        for stored in adapter.others:
            with stored.file.open("rb") as source:
                place = header.tensors[stored.name].start
                copy_range(source.fileno(), stream.fileno(), stored.start, place, stored.nbytes)
    write_json(folder / "adapter_config.json", _config(adapter, sorted(deltas), rank))


def _parts(delta: Delta) -> tuple[Part, Part]:
    return ("lora_embedding_A", "lora_embedding_B") if delta.kind == "embedding" else ("lora_A", "lora_B")


def _shapes(delta: Delta, rank: int) -> Iterator[tuple[Part, tuple[int, int]]]:
    part_a, part_b = _parts(delta)
    yield part_a, (rank, delta.terms[0].A.shape[1])
    yield part_b, (delta.terms[0].B.shape[0], rank)


def _tensors(deltas: Mapping[str, Delta], rank: int) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    for module, delta in deltas.items():
        part_a, part_b = _parts(delta)
        missing = rank - delta.rank
        a = torch.nn.functional.pad(delta.A.float(), (0, 0, 0, missing))
        # scale · B in float64, rounded once: delta.scale is 1 where B holds the scales already
        b = torch.nn.functional.pad((delta.B.double() * delta.scale).float(), (0, missing))
        yield factor_name(module, part_a), a.contiguous()
        yield factor_name(module, part_b), b.contiguous()


def _config(adapter: Adapter, modules: list[str], rank: int) -> dict[str, Any]:
    raw = adapter.config.raw
    return {
        "base_model_name_or_path": adapter.base,
        "bias": "none",
        "fan_in_fan_out": adapter.config.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "revision": raw.get("revision"),
        "target_modules": modules,
        "task_type": raw.get("task_type"),
        "use_dora": False,
        "use_rslora": False,
    }
