"""`Accelerator.save_state`: the weights, optimizers, schedulers, samplers, scaler, and each rank's
`random_states_K.pkl` last. What a program registered itself (`custom_checkpoint_K.pkl`) comes after.
"""

from __future__ import annotations

import re

from lorakit.checkpoints.places import Place
from lorakit.checkpoints.whole import what_is_cut_short
from lorakit.checkpoints.writers import dcp, deepspeed
from lorakit.checkpoints.writers.layout import LastWord, Layout, all_inside, folders, parts, plain_files
from lorakit.checkpoints.writers.model_files import model_files

_LAST = "random_states_0.pkl"
_OF_DIFFUSERS = "pytorch_lora_weights.safetensors"
_RANDOM = re.compile(r"random_states_(\d+)\.pkl")
_STATES = re.compile(r"(optimizer|scheduler|sampler|dl_state_dict|custom_checkpoint)(_\d+)?\.(bin|pkl)|scaler\.pt")
_WEIGHTS = re.compile(r"(model|pytorch_model)(_\d+)?\.(safetensors|bin)")
_SHARDED = re.compile(r"(pytorch_model_fsdp|optimizer)_\d+")


def layout(place: Place) -> Layout | None:
    files = plain_files(place)
    random = {name: int(match[1]) for name in files if (match := _RANDOM.fullmatch(name))}
    states = tuple(name for name in files if _STATES.fullmatch(name))
    if not random and not any(name.startswith(("optimizer", "scheduler")) for name in states):
        return None
    sharded = [name for name in folders(place) if _SHARDED.fullmatch(name) or name == "pytorch_model"]
    model = model_files(place)
    weights = tuple(dict.fromkeys((*model.names, *(name for name in files if _WEIGHTS.fullmatch(name)))))
    nested = tuple(name for folder in sharded for name in all_inside(place, folder))
    fsdp = next((name for name in sharded if name.startswith("pytorch_model_fsdp")), None)
    kind = model.kind or (dcp.kind_of(place.inside(fsdp)) if fsdp else None)
    kind = kind or (deepspeed.kind_of(place.inside("pytorch_model")) if "pytorch_model" in sharded else None)
    of_diffusers = kind is None and _OF_DIFFUSERS in files
    if of_diffusers:
        kind, weights = "adapter", (_OF_DIFFUSERS,)
    return Layout(
        "accelerate",
        kind,
        parts(
            model=kind,
            optimizer=any(name.startswith("optimizer") for name in (*states, *sharded)) or "pytorch_model" in sharded,
            scheduler=any(name.startswith("scheduler") for name in states),
            scaler="scaler.pt" in files,
            rng=random,
        ),
        covered=(
            *weights, *nested, *model.companions,
            *(name for name in states if not name.startswith("custom_checkpoint")),
        ),
        weights=weights or nested,
        late=tuple(name for name in files if name.startswith("custom_checkpoint") or random.get(name)),
        missing=tuple(name for name in model.missing if name != "config.json"),
        refusal=f"{_OF_DIFFUSERS} is an adapter as diffusers keeps it, not PEFT's, and is not read here"
        if of_diffusers
        else model.refusal,
    )  # fmt: skip


def last_word(place: Place, layout: Layout) -> LastWord | None:
    last = place.entries.get(_LAST)
    if last is None:
        return None
    against = what_is_cut_short(place, _LAST)
    return LastWord(_LAST, last.written, against, partly=bool(against))
