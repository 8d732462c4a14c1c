"""A file of torch.save a rank, each with that rank's part of the model, as verl writes them with FSDP:
`model_world_size_2_rank_0.pt`, beside it the optimizer's and more. None of them is written last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lorakit.checkpoints.places import Place
from lorakit.checkpoints.whole import TORCH
from lorakit.checkpoints.writers.layout import Kind, LastWord, Layout, parts, plain_files
from lorakit.checkpoints.writers.torch_keys import keys_in

_NAMED = re.compile(r"(?P<before>.*?)(?:world_size_(?P<ranks>\d{1,6})_)?rank[_-]?(?P<rank>\d{1,6})(?P<after>\.\w+)")
_MODEL = ("", "model", "pytorch_model", "state_dict", "module", "weights")
_MOST = 1 << 14  # ranks


@dataclass(frozen=True, slots=True)
class Ranked:
    """The files of the model by rank, and the names of those that are missing: the largest rank, or what the names say
    of their number, tells how many there are.
    """

    names: tuple[str, ...]
    missing: tuple[str, ...]


def ranked(names: Iterable[str]) -> Ranked | None:
    """The model's files among these; None where none, or more than one row of them, is."""
    rows: dict[tuple[str, str | None, str], dict[int, str]] = {}
    for name in names:
        match = _NAMED.fullmatch(name)
        if match and match["after"] in TORCH and match["before"].strip("_-.").lower() in _MODEL:
            rows.setdefault((match["before"], match["ranks"], match["after"]), {})[int(match["rank"])] = name
    if len(rows) != 1:
        return None
    ((_, said, _), found), *_ = rows.items()
    count = max(int(said or 0), max(found) + 1)
    if count > _MOST:
        return None
    first = found[min(found)]
    stem, end = first.rsplit(str(min(found)), 1)
    missing = tuple(f"{stem}{rank}{end}" for rank in range(count) if rank not in found)
    return Ranked(tuple(found[rank] for rank in sorted(found)), missing)


def layout(place: Place) -> Layout | None:
    files = plain_files(place)
    model = ranked(files)
    if model is None:
        return None
    others = tuple(sorted(name for name in files if _NAMED.fullmatch(name) and name not in model.names))
    return Layout(
        "fsdp",
        _kind(place, model.names[0]),
        parts(
            model=True,
            optimizer=any(name.startswith("optim") for name in others),
            scheduler=any(name.startswith("extra_state") for name in others),
            rng=any(name.startswith("extra_state") for name in others),
        ),
        covered=(*model.names, *others),
        weights=model.names,
        missing=model.missing,
    )


def _kind(place: Place, name: str) -> Kind:
    """Of sharded tensors, too, of which only the names count."""
    names = [str(key) for key in keys_in(place, name)]
    return "adapter" if names and all("lora_" in key for key in names) else "regular"


def last_word(place: Place, layout: Layout) -> LastWord | None:
    return None
