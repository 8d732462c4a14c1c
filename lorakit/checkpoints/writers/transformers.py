"""`checkpoint-N` of transformers' Trainer, and of what is built on it: TRL, axolotl, LLaMA-Factory.

It writes the weights, then optimizer, scheduler and random states, and `trainer_state.json` last. Under FSDP the
weights may be folders of torch.distributed.checkpoint, under DeepSpeed there is a `global_stepN` beside them.
"""

from __future__ import annotations

import re

from lorakit.checkpoints.places import Place, entry_of
from lorakit.checkpoints.trainer_state import FILE as STATE
from lorakit.checkpoints.whole import read_object
from lorakit.checkpoints.writers import dcp, deepspeed
from lorakit.checkpoints.writers.layout import (
    CHECKPOINT,
    Kind,
    LastWord,
    Layout,
    all_inside,
    folders,
    parts,
    plain_files,
)
from lorakit.checkpoints.writers.model_files import model_files
from lorakit.errors import InvalidFile

OWN = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt")
_ACCELERATES = {"random_states_0.pkl", "scheduler.bin"}  # scripts that save its state call that checkpoint-N, too
_RNG = re.compile(r"rng_state(?:_(\d+))?\.pth")
_FSDP = re.compile(r"pytorch_model_fsdp_\d+")
_FSDP_OPTIMIZER = re.compile(r"optimizer_\d+")


def layout(place: Place) -> Layout | None:
    files, inner = plain_files(place), folders(place)
    is_named = CHECKPOINT.fullmatch(place.name) and not _ACCELERATES & files.keys()
    if not (STATE in files or "training_args.bin" in files or is_named):
        return None
    model = model_files(place)
    sharded = [name for name in inner if _FSDP.fullmatch(name)]
    optimizers = [name for name in inner if _FSDP_OPTIMIZER.fullmatch(name)]
    engines = [name for name in inner if deepspeed.is_tag(name)]
    if not (STATE in files or model.kind or sharded or engines or any(name in files for name in OWN)):
        return None
    random = {name: int(match[1] or 0) for name in files if (match := _RNG.fullmatch(name))}
    nested = [name for folder in (*sharded, *optimizers, *engines) for name in all_inside(place, folder)]
    kind, missing = _of_model(place, sharded, engines)
    engine = deepspeed.layout(place.inside(engines[0])) if engines else None  # it keeps the scheduler, too
    own = [name for name in OWN if name in files]
    return Layout(
        "transformers",
        kind,
        parts(
            model=kind,
            optimizer={"optimizer.pt", "optimizer.bin"} & files.keys() or optimizers or engines,
            scheduler="scheduler.pt" in files or (engine and "scheduler" in engine.holds),
            scaler="scaler.pt" in files,
            rng=random,
            trainer_state=STATE in files,
        ),
        covered=(*model.names, *model.companions, *own, *(name for name, rank in random.items() if not rank), *nested),
        weights=model.names or tuple(name for folder in sharded for name in all_inside(place, folder)),
        late=tuple(name for name, rank in random.items() if rank),
        missing=(*missing, *(f"{engines[0]}/{name}" for name in (engine.missing if engine else ()))),
        refusal=model.refusal,
    )


def _of_model(place: Place, sharded: list[str], engines: list[str]) -> tuple[Kind | None, tuple[str, ...]]:
    model = model_files(place)
    if model.kind and not (sharded and model.missing):
        return model.kind, model.missing
    if sharded:
        unfinished = [f"{folder}/{dcp.LAST}" for folder in sharded if entry_of(place, f"{folder}/{dcp.LAST}") is None]
        return dcp.kind_of(place.inside(sharded[0])), tuple(unfinished)
    if engines:  # ZeRO 3 gathers no model unless it is told to
        return deepspeed.kind_of(place.inside(engines[0])), ()
    return None, ()


def last_word(place: Place, layout: Layout) -> LastWord | None:
    state = place.entries.get(STATE)
    if state is None:
        return None
    try:
        step = read_object(place, STATE).get("global_step")
    except InvalidFile:
        return LastWord(STATE, state.written, f"{STATE} is only partly there", partly=True)
    named = CHECKPOINT.fullmatch(place.name)
    against = f"{STATE} is of step {step}" if named and step != int(named[1]) else None
    return LastWord(STATE, state.written, against)
