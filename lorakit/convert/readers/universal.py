"""DeepSpeed's universal checkpoints: under `zero/` a folder for each parameter, in it `fp32.pt` with its master weight;
whatever the parallelism was, it is whole there.
"""

from __future__ import annotations

import math
from pathlib import Path

from lorakit.convert.readers.deepspeed import (
    add_others,
    ensure_of_one_save,
    is_cut,
    model_states,
    named,
    shapes_in,
    step_folder,
)
from lorakit.convert.readers.pieced import PiecedTensor, with_config
from lorakit.convert.readers.torch_files import without_ema
from lorakit.convert.source import Source, SourceTensor, TorchTensor
from lorakit.errors import Incomplete, InvalidFile, NotFound
from lorakit.files.folders import file_state
from lorakit.files.pieces import StoredPiece
from lorakit.files.torch_file import read_torch_file
from lorakit.files.torch_tensors import StoredTorchTensor

WEIGHT = "fp32.pt"
_LATEST = "latest_universal"


def read(path: Path, *, weights: str = "model") -> Source:
    """Open a `global_stepN_universal` folder, or the folder above, in which `latest_universal` names one.

    Raises:
        UsageError: a moving average of the weights is asked for.
        NotFound: there is none.
        Incomplete: it lacks weights, or the model's states.
        InvalidFile: a file is damaged.
    """
    without_ema(path, weights)
    folder = step_folder(path, _LATEST)
    if folder is None or not (folder / "zero").is_dir():
        raise NotFound(f"'{path}' is no universal checkpoint of DeepSpeed: name a folder with zero/ in it")
    states = model_states(folder)
    first, *_ = states.values()
    files = _weights_in(folder)
    with named(folder):
        shapes = {name: shape for group in shapes_in(first, "param_shapes") for name, shape in group.items()}
        tensors = {file.parent.name: _weight(file, shapes.get(file.parent.name)) for file in files}
        ensure_of_one_save(first, tensors)
        left_out = {} if is_cut(states) else add_others([*states.values()], tensors)
    beside, read_later = with_config(path, folder, folder.parent), (*states, *files)
    return Source(
        path, "universal", tensors, left_out, beside, {file: file_state(file) for file in read_later},
        ("the weights are the optimizer's fp32 master weights",),
    )  # fmt: skip


def _weights_in(folder: Path) -> list[Path]:
    files = [parameter / WEIGHT for parameter in sorted((folder / "zero").iterdir()) if parameter.is_dir()]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None or not files:
        raise Incomplete(f"'{folder}' has no {missing or 'weights in zero/'}: make it again with ds_to_universal")
    return files


def _weight(file: Path, shape: tuple[int, ...] | None) -> SourceTensor:
    """What is kept flat, as from ZeRO 3, gets its shape from the model's states."""
    name, held = file.parent.name, read_torch_file(file)
    stored = held.get("param") if isinstance(held, dict) else held
    if not isinstance(stored, StoredTorchTensor):
        raise InvalidFile(f"{name}/{WEIGHT} holds no weight")
    if len(stored.shape) != 1 or shape is None or math.prod(shape) != stored.shape[0]:
        return TorchTensor(name, stored)
    return PiecedTensor(name, stored.dtype, shape, (StoredPiece((0,), stored),), flat=True)
