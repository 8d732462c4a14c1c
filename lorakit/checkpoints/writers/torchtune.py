"""torchtune's `epoch_N` or `step_N`: the model, the adapter beside it, and `recipe_state.pt` last: in the folder, or,
in 0.6, in `recipe_state` beside it, which each epoch but the last writes over.
"""

from __future__ import annotations

import re
from dataclasses import replace

from lorakit.checkpoints.places import Place, entry_of
from lorakit.checkpoints.whole import what_is_cut_short
from lorakit.checkpoints.writers.layout import LastWord, Layout, parts, plain_files, written
from lorakit.checkpoints.writers.model_files import MODELS, ModelFiles, model_files

NAME = re.compile(r"(epoch|step)_(\d{1,18})")
_STATE = "recipe_state.pt"
_BESIDE = f"../recipe_state/{_STATE}"
OWN_STATES = (_STATE, f"recipe_state/{_STATE}")
_PLACES = (*OWN_STATES, _BESIDE)
_OWN = "adapter_model.pt"
_SHARD = re.compile(r"model-\d{5}-of-(\d{5})\.bin")  # of a model in torchtune's names or Meta's, which no index joins


def layout(place: Place) -> Layout | None:
    files = plain_files(place)
    state = _state(place)
    model = _in_its_own_names(model_files(place))
    its_own = _OWN in files or any(map(_SHARD.fullmatch, model.names))
    if not its_own and not (state and (state != _BESIDE or NAME.fullmatch(place.name))):
        return None
    kind = model.kind or ("adapter" if _OWN in files else None)
    if kind is None:
        return None
    own = (_OWN,) if _OWN in files else ()
    merged = tuple(name for name in files if name.endswith((".safetensors", ".bin")) or name in MODELS)
    in_it = state is not None and state != _BESIDE
    return Layout(
        "torchtune",
        kind,
        parts(model=True, optimizer=in_it, trainer_state=in_it),
        covered=tuple(dict.fromkeys((*model.names, *merged, *own, *model.companions))),
        weights=model.names or own,
        missing=model.missing or (() if model.names else ("adapter_model.safetensors",)),
        refusal=model.refusal,
    )


def _in_its_own_names(model: ModelFiles) -> ModelFiles:
    shards = [match for name in model.names if (match := _SHARD.fullmatch(name))]
    if not shards or len(shards) < len(model.names):
        return model
    wanted = (f"model-{number:05}-of-{shards[0][1]}.bin" for number in range(1, int(shards[0][1]) + 1))
    return replace(model, missing=tuple(name for name in wanted if name not in model.names))


def _state(place: Place) -> str | None:
    return next((name for name in _PLACES if entry_of(place, name) is not None), None)


def last_word(place: Place, layout: Layout) -> LastWord | None:
    state = _state(place)
    entry = entry_of(place, state) if state else None
    if state is None or entry is None:
        return None
    if state == _BESIDE and entry.written < written(place, layout.covered):  # of an earlier epoch: the last has none
        return None
    against = what_is_cut_short(place, state)
    return LastWord(state, entry.written, against, partly=bool(against) and state != _BESIDE)
