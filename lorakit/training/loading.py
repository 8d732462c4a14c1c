"""One state of a checkpoint, read and checked, and ready for what a Trainer trains with. Torch files are read with
`weights_only=True` alone.
"""

from __future__ import annotations

import random
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorakit.checkpoints.trainer_state import FILE as TRAINER_STATE
from lorakit.errors import Refused
from lorakit.files.folders import read_json
from lorakit.training.loading_optimizer import what_does_not_fit
from lorakit.training.loading_weights import prepare_model
from lorakit.training.prepared import Into, Loaded, Prepared, misfit

_STEPS = ("global_step", "log_history", "best_metric", "best_global_step", "total_flos", "num_input_tokens_seen")
# What a Trainer's loop counts from, in its own attributes: the loss that it logs is divided by the steps since.
_COUNTED_FROM = {
    "_globalstep_last_logged": "global_step",
    "_initial_global_step": "global_step",
    "_initial_num_input_tokens_seen": "num_input_tokens_seen",
}


def prepare_state(state: str, checkpoint: Path, into: Into) -> Prepared:
    """Read and check one state; nothing is loaded yet.

    Raises:
        Refused: it does not fit, and `into.strict` says that it has to; or it can't be loaded safely.
    """
    return _READERS[state](checkpoint, into)


def _optimizer(checkpoint: Path, into: Into) -> Prepared:
    optimizer = into.parts["optimizer"]
    stored = _torch_file(checkpoint, ("optimizer.pt", "optimizer.bin"))
    if reason := what_does_not_fit(stored, optimizer):
        return misfit("optimizer", checkpoint, reason, into)

    def apply() -> None:
        rates = [{key: group[key] for key in ("lr", "initial_lr") if key in group} for group in optimizer.param_groups]
        optimizer.load_state_dict(stored)
        if into.keeps_rates:
            for group, kept in zip(optimizer.param_groups, rates, strict=True):
                group.update(kept)

    whose = "this training's" if into.keeps_rates else "its own"
    return Prepared(Loaded("optimizer", f"with {whose} learning rates"), apply)


def _scheduler(checkpoint: Path, into: Into) -> Prepared:
    scheduler, stored = into.parts["scheduler"], _torch_file(checkpoint, ("scheduler.pt", "scheduler.bin"))
    if not isinstance(stored, dict) or _public(stored) != _public(scheduler.state_dict()):
        return misfit("scheduler", checkpoint, "it is of another kind", into)
    return Prepared(
        Loaded("scheduler", f"after {stored.get('last_epoch', '?')} steps"), lambda: scheduler.load_state_dict(stored)
    )


def _public(state: Mapping[Any, Any]) -> set[str]:
    """Without what differs from one torch to the next."""
    return {str(name) for name in state if not str(name).startswith("_")}


def _scaler(checkpoint: Path, into: Into) -> Prepared:
    scaler = getattr(into.parts["optimizer"], "scaler", None)
    if scaler is None:
        return misfit("scaler", checkpoint, "this training scales no gradients", into)
    stored = _torch_file(checkpoint, ("scaler.pt",))
    if not isinstance(stored, dict) or stored.keys() != scaler.state_dict().keys():
        return misfit("scaler", checkpoint, "it is of another kind", into)
    return Prepared(Loaded("scaler", "of mixed precision"), lambda: scaler.load_state_dict(stored))


def _rng(checkpoint: Path, into: Into) -> Prepared:
    """Each rank its own."""
    import numpy
    import torch

    name = f"rng_state_{into.rank}.pth" if into.ranks > 1 else "rng_state.pth"
    if not (checkpoint / name).is_file():
        return misfit("rng", checkpoint, f"there is no {name}, as it was written by another number of ranks", into)
    stored = _torch_file(checkpoint, (name,))
    try:
        random.Random().setstate(stored["python"])
        numpy.random.RandomState().set_state(stored["numpy"])
        torch.Generator().set_state(stored["cpu"])
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        return misfit("rng", checkpoint, f"{name} holds no states of these generators: {error}", into)

    def apply() -> None:
        random.setstate(stored["python"])
        numpy.random.set_state(stored["numpy"])
        torch.random.set_rng_state(stored["cpu"])
        if "cuda" in stored and torch.cuda.is_available():
            if isinstance(stored["cuda"], list):
                torch.cuda.random.set_rng_state_all(stored["cuda"])
            else:
                torch.cuda.random.set_rng_state(stored["cuda"])

    return Prepared(Loaded("rng", name), apply)


def _trainer_state(checkpoint: Path, into: Into) -> Prepared:
    state, loop = into.parts["trainer_state"], into.parts["loop"]
    stored = read_json(checkpoint / TRAINER_STATE)
    step = stored.get("global_step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise Refused(f"'{checkpoint / TRAINER_STATE}' says no step")
    if step >= state.max_steps:
        reason = f"it is at step {step}, and this training ends at {state.max_steps}: raise max_steps"
        return misfit("trainer_state", checkpoint, reason, into)
    if not all(hasattr(loop, name) for name in _COUNTED_FROM):
        reason = "this Trainer counts in a way of its own; trainer.train(resume_from_checkpoint=…) goes on with it"
        return misfit("trainer_state", checkpoint, reason, into)

    def apply() -> None:
        for name in _STEPS:
            if stored.get(name) is not None and hasattr(state, name):
                setattr(state, name, stored[name])
        for name, source in _COUNTED_FROM.items():
            setattr(loop, name, getattr(state, source))

    return Prepared(Loaded("trainer_state", f"step {step}"), apply)


def _torch_file(checkpoint: Path, names: tuple[str, ...]) -> Any:
    """
    Raises:
        Refused: there is none of these files, or it holds more than tensors, plain containers and numpy's arrays.
    """
    import torch

    file = next((checkpoint / name for name in names if (checkpoint / name).is_file()), None)
    if file is None:
        raise Refused(f"'{checkpoint}' has no {' or '.join(names)}, as one process writes them")
    if not zipfile.is_zipfile(file):
        raise Refused(f"'{file}' can't be read safely: it is cut short, or no file of torch.save since version 1.6")
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a malformed pickle ends in any of them
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise Refused(f"'{file}' can't be read safely: {said}") from None


def _numpy_globals() -> list[Any]:
    """What the state of numpy's generator is made of."""
    import numpy
    from numpy._core.multiarray import _reconstruct

    return [_reconstruct, numpy.ndarray, numpy.dtype, type(numpy.dtype(numpy.uint32))]


_READERS: Mapping[str, Callable[[Path, Into], Prepared]] = {
    "model": prepare_model,
    "optimizer": _optimizer,
    "scheduler": _scheduler,
    "scaler": _scaler,
    "rng": _rng,
    "trainer_state": _trainer_state,
}
