"""Write an adapter as a PEFT folder that PEFT and every vLLM load.

alpha = rank, and each term's scale and weight in its B: the deltas stay exactly what they were. One rank for all
modules, with rows of zeros where a module has a smaller one (vLLM before 0.32 ignores rank and alpha patterns), unless
the adapter is to keep each module's own.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.delta import Delta, made
from lorakit.adapters.keys import Part, factor_name
from lorakit.adapters.naming import ensure_named_alike
from lorakit.adapters.reading import WEIGHTS
from lorakit.adapters.source import Source, Stage
from lorakit.adapters.trained import Trained
from lorakit.adapters.truncation import product_spectrum
from lorakit.errors import UnsupportedAdapter, UsageError
from lorakit.files.folders import copy_range, whole_folder, write_all, write_json
from lorakit.files.provenance import write_provenance
from lorakit.files.safetensors import planned_header
from lorakit.files.tensors import tensor_bytes

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."
SAME = 1e-5  # of the norm: two changes that differ by no more are one, rounded twice

Planned = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def save_adapter(adapter: Adapter, folder: Path, *, rename: Mapping[str, str] | None = None) -> Path:
    """Write `adapter` to `folder`, whole or not at all; `rename` gives modules other paths.

    Raises:
        UnsupportedAdapter: there is more in it than can be written as LoRA.
        Conflict: `folder` exists, or a source was written again meanwhile.
    """
    if adapter.reported is None and len(adapter.files()) > 1:
        ensure_named_alike(adapter)
    if not adapter.deltas and not adapter.trained:
        raise UsageError(f"nothing is left of adapter '{adapter.name}' to write: no module")
    adapter = replace(replace(adapter, trained=Trained()).plain(work="written"), trained=adapter.trained)
    with whole_folder(folder) as beside:
        report = adapter.report  # which computes all factors, on all cores
        write_adapter_files(adapter, beside, rename=rename)
        operation, settings, parents = _made_by(adapter)
        measured: dict[str, Any] = {"truncation_error": 0.0}
        if report:
            measured = {"truncation_error": report.truncation_error, "report": report.as_dict()}
        elif any(isinstance(source, Stage) for source in adapter.sources):
            measured = {}  # each stage says its own
        write_provenance(
            beside, operation, parents=parents, settings=settings, rank=adapter.rank, **measured
        )  # fmt: skip
        adapter.ensure_unchanged()
    return folder


def _made_by(adapter: Adapter) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """The last operation, its settings, and what it was done to."""
    match adapter.sources:
        case (Stage(operation=operation, settings=settings, sources=sources, weight=1.0, parts=()),):
            return operation, dict(settings), [source.as_parent() for source in sources]
        case (Source(weight=1.0, parts=()),) if adapter.report is None:
            operation = "save"
        case _:
            operation = "mix"
    return operation, {"method": "linear", "rank": "exact"}, [source.as_parent() for source in adapter.sources]


def write_adapter_files(adapter: Adapter, folder: Path, *, rename: Mapping[str, str] | None = None) -> None:
    """`adapter_model.safetensors` and `adapter_config.json` into a folder that is there."""
    names = rename or {}
    deltas = {names.get(module, module): delta for module, delta in adapter.deltas.items()}
    biases = {names.get(module, module): bias for module, bias in adapter.biases.items()}
    if biases and any(delta.kind == "embedding" for delta in deltas.values()):
        raise UnsupportedAdapter(
            f"adapter '{adapter.name}' has biases of lora_B and changes an embedding: PEFT has no lora_bias for "
            f"embeddings, so one adapter can't hold both"
        )
    tied = _tied(deltas) if adapter.config.raw.get("ensure_weight_tying") is True else None
    if tied is not None:
        deltas[tied[1]] = _transposed(deltas[tied[0]])
    ranks = {module: max(1, delta.rank) for module, delta in deltas.items()}
    largest = max(ranks.values(), default=1)
    if not adapter.own_ranks:
        ranks = dict.fromkeys(ranks, largest)
    plan: list[Planned] = []
    for module, delta in deltas.items():
        plan += _planned(module, delta, ranks[module], with_bias=bool(biases))
    trained = {_trained_name(path, deltas): blend for path, blend in adapter.trained.tensors.items()}
    plan += [(name, blend.dtype, blend.shape) for name, blend in trained.items()]
    plan += [(_rows_name(module), "F32", rows.shape) for module, rows in adapter.trained.rows.items()]
    plan += [(stored.name, stored.dtype, stored.shape) for stored in adapter.others]
    head, header = planned_header(folder / WEIGHTS, plan, {"format": "pt"})
    with (folder / WEIGHTS).open("xb") as stream:
        os.truncate(stream.fileno(), header.size)
        write_all(stream.fileno(), head, 0)
        for name, tensor in _tensors(deltas, ranks):
            write_all(stream.fileno(), tensor_bytes(tensor), header.tensors[name].start)
        for module, bias in biases.items():
            place = header.tensors[_bias_name(module)].start
            write_all(stream.fileno(), tensor_bytes(bias.load().float().contiguous()), place)
        for name, blend in trained.items():
            write_all(stream.fileno(), tensor_bytes(blend.load().contiguous()), header.tensors[name].start)
        for module, rows in adapter.trained.rows.items():
            write_all(stream.fileno(), tensor_bytes(rows.load()), header.tensors[_rows_name(module)].start)
        for stored in adapter.others:
            with stored.file.open("rb") as source:
                place = header.tensors[stored.name].start
                copy_range(source.fileno(), stream.fileno(), stored.start, place, stored.nbytes)
    config = _config(adapter, ranks, bool(biases)) | ({"ensure_weight_tying": True} if tied else {})
    write_json(folder / "adapter_config.json", config)


def _tied(deltas: Mapping[str, Delta]) -> tuple[str, str] | None:
    """The embedding and the head that get the same change: PEFT's `ensure_weight_tying` wants one's factors to be the
    other's, transposed, so that a tied base stays so.
    """
    import torch

    for embedding, rows in deltas.items():
        for head, delta in deltas.items():
            if rows.kind != "embedding" or delta.kind != "linear" or rows.shape != delta.shape:
                continue
            (left, right), (b, a) = delta.stacked(), rows.stacked()
            between = product_spectrum(torch.cat([left, -a.T], dim=1), torch.cat([right, b.T]))
            if float(between.norm()) <= SAME * delta.norm():
                return embedding, head
    return None


def _transposed(delta: Delta) -> Delta:
    """Of an embedding's change, that of the head which it is tied to, with the very factors that are written for it."""

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        a, b = written(delta)
        return a.T.contiguous(), b.T.contiguous()

    out, into = delta.terms[0].shape
    return Delta((made((into, out), make, delta.rank),), "linear")


def written(delta: Delta, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B in float32, with the scale in B: scale · B in float64, rounded once. With zeros up to that rank."""
    import torch

    # asked for once: they may be made, and large
    b, a = delta.terms[0].load() if len(delta.terms) == 1 else (delta.B, delta.A)
    a, b = a.float(), b.float() if delta.scale == 1 else (b.double() * delta.scale).float()
    missing = (rank or 0) - delta.rank
    if missing > 0:
        a, b = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
    return a, b


def ensure_finite(module: str, *factors: torch.Tensor) -> None:
    """Raises UnsupportedAdapter for what float32 does not hold; without a copy of them."""
    if not all(bound.isfinite() for factor in factors if factor.numel() for bound in factor.aminmax()):
        raise UnsupportedAdapter(f"the factors of '{module}' are too large for float32: give smaller weights")


def _parts(delta: Delta) -> tuple[Part, Part]:
    return ("lora_embedding_A", "lora_embedding_B") if delta.kind == "embedding" else ("lora_A", "lora_B")


def _bias_name(module: str) -> str:
    return f"{_PREFIX}{module}.lora_B.bias"


def _planned(module: str, delta: Delta, rank: int, *, with_bias: bool) -> Iterator[Planned]:
    part_a, part_b = _parts(delta)
    out, into = delta.terms[0].shape
    yield factor_name(module, part_a), "F32", (rank, into)
    yield factor_name(module, part_b), "F32", (out, rank)
    if with_bias:  # PEFT gives every module one: zeros, which a truncated file holds already
        yield _bias_name(module), "F32", (out,)


def _tensors(deltas: Mapping[str, Delta], ranks: Mapping[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
    for module, delta in deltas.items():
        part_a, part_b = _parts(delta)
        a, b = written(delta, ranks[module])
        ensure_finite(module, a, b)
        yield factor_name(module, part_a), a.contiguous()
        yield factor_name(module, part_b), b.contiguous()


def _trained_name(path: str, targets: Collection[str]) -> str:
    """PEFT wraps a module that it changes, and finds the module's own bias below the wrapping."""
    module, _, leaf = path.rpartition(".")
    return f"{_PREFIX}{module}.base_layer.{leaf}" if module in targets else f"{_PREFIX}{path}"


def _rows_name(module: str) -> str:
    return f"{_PREFIX}{module}.token_adapter.trainable_tokens_delta"


def _config(adapter: Adapter, ranks: Mapping[str, int], has_biases: bool) -> dict[str, Any]:
    raw, trained = adapter.config.raw, adapter.trained
    rank = max(ranks.values(), default=1)
    # a path may be the end of another: PEFT takes the first pattern that fits, so the longest stand first
    patterns = dict(sorted(ranks.items(), key=lambda item: -len(item[0])))
    patterns = patterns if len(set(ranks.values())) > 1 else {}
    return {
        "alpha_pattern": patterns,
        "base_model_name_or_path": adapter.base,
        "bias": trained.bias,
        "fan_in_fan_out": adapter.config.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_bias": has_biases,
        "lora_dropout": 0.0,
        "modules_to_save": list(trained.modules) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": patterns,
        "revision": raw.get("revision"),
        "target_modules": sorted(ranks),
        "task_type": raw.get("task_type"),
        "trainable_token_indices": {module: list(rows.indices) for module, rows in trained.rows.items()} or None,
        "use_dora": False,
        "use_rslora": False,
    }
