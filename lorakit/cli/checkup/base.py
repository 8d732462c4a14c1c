"""Whether a base fits this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakit.cli.checkup.finding import Finding
from lorakit.cli.checkup.gpu import Gpu
from lorakit.cli.tables import size_in_words
from lorakit.errors import LorakitError


@dataclass(frozen=True, slots=True)
class Base:
    """`size` of its weights in bytes."""

    name: str
    kind: str
    quantised: str | None
    size: int


def of_base(base: Base, gpus: Sequence[Gpu], memory: int, disk: int) -> Finding:
    """`memory` and `disk` that are free, in bytes."""
    quantised = f", quantised with {base.quantised}" if base.quantised else ""
    what = f"{base.name}: {base.kind or 'a model of no type'}{quantised}, {size_in_words(base.size)} of weights"
    room = sum(gpu.total for gpu in gpus) * 2**20 if gpus else memory
    where = "all GPUs together have" if gpus else "of memory are free, there is no GPU, and"
    if base.size > room:
        why = f"{size_in_words(room)} {where}: it can't be served here" if not gpus else (
            f"{where} {size_in_words(room)}: it can't be served here"
        )  # fmt: skip
        return Finding("base", "problem", what, why, "take a smaller or a quantised one; merging needs no more memory")
    if base.size > disk:
        why = f"{size_in_words(disk)} are free here: a merged copy does not fit"
        return Finding("base", "warning", what, why, "lorakit merge --out a folder on another disk")
    return Finding("base", "ok", f"{what}; it can be served, and a merged copy fits")


def base_here(reference: str, gpus: Sequence[Gpu], memory: int, disk: int) -> Finding:
    """A folder, or a hub id of which the cache has the weights: nothing is fetched."""
    from lorakit.merge.base import read_base

    try:
        folder = reference if Path(reference).is_dir() else _in_cache(reference)
        model = read_base(folder)
    except LorakitError as error:
        return Finding("base", "problem", reference, str(error), "name a folder, or a hub id")
    size = sum(stored.nbytes for stored in model.tensors.values())
    return of_base(Base(reference, model.model_type, model.quantised, size), gpus, memory, disk)


def _in_cache(reference: str) -> str:
    """Raises NotFound when the cache has it not."""
    from huggingface_hub import try_to_load_from_cache

    from lorakit.errors import NotFound
    from lorakit.files.hub import looks_like_hub_id

    name, _, revision = reference.partition("@")
    if not looks_like_hub_id(reference):
        raise NotFound(f"there is no folder '{reference}'")
    found = try_to_load_from_cache(name, "config.json", revision=revision or None)
    if not isinstance(found, str):
        raise NotFound(
            f"'{reference}' is neither a folder nor in the cache of the Hub: fetch it with `hf download {name}`"
        )
    return str(Path(found).parent)
