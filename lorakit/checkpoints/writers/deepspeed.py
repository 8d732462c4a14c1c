"""DeepSpeed's `global_stepN`: each rank's `*_model_states.pt` and `*_optim_states.pt`, and above it `latest`, which
rank 0 writes last. Other ranks may still write then, so every rank's file has to be there, whole.

A universal checkpoint has a folder for each parameter under `zero/`, and `latest_universal` above; ds_to_universal
lets its user name it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorakit.checkpoints.places import Place, entry_of
from lorakit.checkpoints.writers.layout import Kind, LastWord, Layout, all_inside, folders, parts, plain_files
from lorakit.checkpoints.writers.torch_keys import keys_in, kind_of_model

_TAG = re.compile(r"global_step(\d{1,18})(_universal)?")
_STATES = re.compile(r".*_(model|optim)_states\.pt")
_FIRST = re.compile(r"(mp_rank_00|zero_pp_rank_0_mp_rank_00)_model_states\.pt")
_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_(model|optim)_states\.pt")


def is_tag(name: str) -> bool:
    return _TAG.fullmatch(name) is not None


def layout(place: Place) -> Layout | None:
    files = plain_files(place)
    has_states = any(_STATES.fullmatch(name) for name in files)
    if (has_states or is_tag(place.name)) and _is_universal(place):
        return _universal(place)
    if has_states:
        return _of_tag(place, "")
    tag = _named(place, "latest") or _named(place, "latest_universal")
    if tag and entry_of(place, tag) is not None:
        inner = place.inside(tag)
        return _of_tag(place, tag) if any(_STATES.fullmatch(name) for name in inner.entries) else None
    return None


def _of_tag(place: Place, tag: str) -> Layout:
    folder = place.inside(tag) if tag else place
    before = f"{tag}/" if tag else ""
    names = sorted(name for name in plain_files(folder) if _STATES.fullmatch(name))
    late = [name for name in names if (match := _RANK.search(name)) and int(match[1])]
    keys = _said(folder)
    return Layout(
        "deepspeed",
        kind_of(folder),
        parts(
            model=True,
            optimizer=any("optim_states" in name for name in names),
            scheduler=keys.get("lr_scheduler"),
            rng=any("rng" in key for key in keys),
            trainer_state="global_steps" in keys,
        ),
        covered=tuple(f"{before}{name}" for name in names if name not in late),
        weights=tuple(f"{before}{name}" for name in names),
        late=tuple(f"{before}{name}" for name in late),
        missing=tuple(f"{before}{name}" for name in _missing(names, keys)),
    )


def _is_universal(place: Place) -> bool:
    return "zero" in folders(place)


def _universal(place: Place) -> Layout:
    states = tuple(name for name in plain_files(place) if _STATES.fullmatch(name))
    names, keys = (*all_inside(place, "zero"), *states), _said(place)
    missing = () if states else ("mp_rank_00_model_states.pt",)
    return Layout(
        "deepspeed", kind_of(place), parts(
            model=True, optimizer=any("exp_avg" in name for name in names), scheduler=keys.get("lr_scheduler"),
            trainer_state="global_steps" in keys,
        ),
        covered=names, weights=names, missing=missing,
    )  # fmt: skip


def _missing(names: list[str], keys: Mapping[str, object]) -> list[str]:
    """The ranks' files that have to be there: of what one wrote, all did, and rank 0 says how many there are."""
    if not any(_FIRST.fullmatch(name) for name in names):
        return ["mp_rank_00_model_states.pt"]
    if _shares_optimizer(names, keys) and not any("optim_states" in name for name in names):
        return [f"{'bf16_' if _in_config(keys, 'bf16', 'enabled') else ''}zero_pp_rank_0_mp_rank_00_optim_states.pt"]
    ranks, there = keys.get("dp_world_size"), set(names)
    if not (isinstance(ranks, int) and 0 < ranks < 100_000):
        return []
    own = ((name, match[1]) for name in names if (match := _RANK.search(name)))
    patterns = sorted({name.replace(f"zero_pp_rank_{rank}_", "zero_pp_rank_{}_", 1) for name, rank in own})
    expected = (pattern.format(rank) for pattern in patterns for rank in range(ranks))
    return [name for name in expected if name not in there]


def _shares_optimizer(names: list[str], keys: Mapping[str, object]) -> bool:
    """Whether each rank has a part of the optimizer, and with ZeRO 3 the weights in it: in files of their own."""
    if any("model_states" in name and _RANK.search(name) for name in names):
        return True
    stage = _in_config(keys, "zero_optimization", "stage")
    return isinstance(stage, int) and stage > 0


def _in_config(keys: Mapping[str, object], section: str, field: str) -> object:
    """Of DeepSpeed's own configuration, which rank 0 saves."""
    config = keys.get("ds_config")
    inner = config.get(section) if isinstance(config, Mapping) else None
    return inner.get(field) if isinstance(inner, Mapping) else None


def last_word(place: Place, layout: Layout) -> LastWord | None:
    if entry_of(place, "latest") is not None or entry_of(place, "latest_universal") is not None:
        name = "latest" if entry_of(place, "latest") is not None else "latest_universal"
        entry = entry_of(place, name)
        return LastWord(name, entry.written) if entry else None
    name = "latest_universal" if _is_universal(place) else "latest"
    entry, tag = entry_of(place.above, name), _named(place.above, name)
    if entry is None:
        return None
    own, later = _TAG.fullmatch(place.name), _TAG.fullmatch(tag or "")
    vouches = tag == place.name or bool(own and later and int(later[1]) > int(own[1]))
    return LastWord(
        name, entry.written, None if vouches else f"{name} in the folder above names {tag or 'nothing yet'}"
    )


def kind_of(place: Place) -> Kind | None:
    """By the names of the parameters in rank 0's file; a regular one while that can't be read."""
    return kind_of_model(_said(place).get("module")) or "regular"


def _said(place: Place) -> Mapping[str, object]:
    first = next((name for name in sorted(place.entries) if _FIRST.fullmatch(name)), None)
    return keys_in(place, first) if first else {}


def said_in(place: Place, layout: Layout) -> Mapping[str, object]:
    """What rank 0's file says of the training."""
    first = next((name for name in layout.covered if _FIRST.fullmatch(name.rpartition("/")[2])), None)
    return keys_in(place, first) if first else {}


def _named(place: Place, file: str) -> str | None:
    """The folder that `latest` names, if it is one beside it."""
    entry = entry_of(place, file)
    if entry is None or entry.is_folder or entry.size > 1000:
        return None
    tag = place.read(file).decode("utf-8", "replace").strip()
    return tag if tag and "/" not in tag and not tag.startswith(".") else None
