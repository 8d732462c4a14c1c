"""What runs inside a trainer: saving when asked, going on after an interruption, keeping and loading what is wanted.

The callbacks are transformers' own kind, for `transformers.Trainer`, TRL and axolotl; each name loads its module on
first use, so that `import lorakit.training` costs neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.training.interruptible import Interruptible as Interruptible
    from lorakit.training.keep_checkpoints import KeepCheckpoints as KeepCheckpoints
    from lorakit.training.load_states import LoadStates as LoadStates
    from lorakit.training.resuming import resume as resume
    from lorakit.training.save_on_request import SaveOnRequest as SaveOnRequest
    from lorakit.training.save_state import SaveState as SaveState

_HOME = {
    "Interruptible": "lorakit.training.interruptible",
    "KeepCheckpoints": "lorakit.training.keep_checkpoints",
    "LoadStates": "lorakit.training.load_states",
    "resume": "lorakit.training.resuming",
    "SaveOnRequest": "lorakit.training.save_on_request",
    "SaveState": "lorakit.training.save_state",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lorakit.training' has no attribute '{name}'")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
