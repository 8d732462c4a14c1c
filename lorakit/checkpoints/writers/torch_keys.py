"""What a file of torch.save holds, by the names in it; read without running its pickle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorakit.checkpoints.places import Place, within
from lorakit.checkpoints.writers.layout import Kind, Part, parts
from lorakit.errors import LorakitError

MODEL = ("state_dict", "model", "model_state_dict", "module", "model_state", "net", "params", "weights")
OPTIMIZER = ("optimizer_states", "optimizer", "optimizer_state_dict", "optimizer_state", "optim", "opt")
SCHEDULER = ("lr_schedulers", "lr_scheduler", "scheduler", "scheduler_state_dict", "lr_scheduler_state_dict")
SCALER = ("scaler", "grad_scaler", "scaler_state_dict", "amp", "MixedPrecision", "native_amp_scaling_state")
TRAINER_STATE = ("loops", "global_step", "epoch", "step", "iteration", "iter_num", "epochs_run", "train_state")


def keys_in(place: Place, name: str) -> Mapping[str, Any]:
    """The mapping that a torch file holds; an empty one where it holds another thing, is not on this machine, or can't
    be read (yet)."""
    holder, last = within(place, name)
    file, entry = holder.local(last), holder.entries.get(last)
    return {} if file is None or entry is None else _keys(file, entry.stamp)


@lru_cache(maxsize=8)
def _keys(file: Path, _stamp: str) -> Mapping[str, Any]:
    """One look asks for the same file several times."""
    from lorakit.files.torch_file import read_torch_file

    try:
        found = read_torch_file(file)
    except (LorakitError, OSError):
        return {}
    return found if isinstance(found, Mapping) else {}


def kind_of_model(tensors: object) -> Kind | None:
    """An adapter when every tensor's name says that it is a LoRA's; None when there are no tensors."""
    names = [str(name) for name, value in tensors.items() if is_tensor(value)] if isinstance(tensors, Mapping) else []
    if not names:
        return None
    return "adapter" if all("lora_" in name for name in names) else "regular"


def model_in(said: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The state dict of the model: under one of its usual names, or the whole file."""
    for name in MODEL:
        if isinstance(said.get(name), Mapping) and kind_of_model(said[name]):
            return said[name]  # type: ignore[no-any-return]
    values = list(said.values())
    return said if values and sum(map(is_tensor, values)) > len(values) / 2 else None


def parts_in(said: Mapping[str, Any]) -> tuple[Part, ...]:
    return parts(
        model=model_in(said) is not None,
        optimizer=_any(said, OPTIMIZER),
        scheduler=_any(said, SCHEDULER),
        scaler=_any(said, SCALER),
        rng=any("rng" in str(key).lower() for key in said),
        trainer_state=any(key in said for key in TRAINER_STATE),
    )


def _any(said: Mapping[str, Any], names: Iterable[str]) -> bool:
    return any(bool(said.get(name)) for name in names)


def is_tensor(value: object) -> bool:
    from lorakit.files.torch_file import StoredTorchTensor

    return isinstance(value, StoredTorchTensor)


def step_in(said: Mapping[str, Any]) -> int | None:
    """The number of optimizer steps, where a file says it under one of its usual names."""
    found = (said.get(name) for name in ("global_step", "global_steps", "step", "iteration", "iter_num"))
    return next((step for step in found if isinstance(step, int) and 0 <= step < 2**63 and step is not True), None)


def epoch_in(said: Mapping[str, Any]) -> float | None:
    found = (said.get(name) for name in ("epoch", "epochs_run"))
    return next((float(epoch) for epoch in found if isinstance(epoch, int | float) and 0 <= epoch < 2**53), None)
