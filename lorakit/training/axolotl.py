"""lorakit's callbacks as a plugin of axolotl:

plugins: [lorakit.training.axolotl.LorakitPlugin]
lorakit:
  keep: {keep_last: 3, keep_best: 2}      # or a file that says it, as `lorakit prune --config` takes one
  save_state: {states: model, every: 5}

With `auto_resume_from_checkpoints: true` the next training goes on from what Ctrl+C saved. Seen with axolotl 0.19.0.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict, Field

from lorakit.errors import UsageError
from lorakit.training import Interruptible, KeepCheckpoints, LoadStates, SaveOnRequest, SaveState


class _Section(BaseModel):
    """An unknown key is an error."""

    model_config = ConfigDict(extra="forbid")


class SaveStateSection(_Section):
    states: str | list[str] = "model"
    every: int = Field(ge=1)


class LoadStatesSection(_Section):
    states: str | list[str] = "model"
    checkpoint: str = "latest"
    strict: bool = True


class LorakitSection(_Section):
    """What the callbacks of the same names take; the first two are on unless they are turned off."""

    save_on_request: bool = True
    interruptible: bool = True
    every_steps: int = Field(default=100, ge=1)
    every_seconds: float = Field(default=1.0, ge=0)
    keep: str | dict[str, Any] | None = None
    keep_earlier: bool = False
    save_state: SaveStateSection | None = None
    load_states: LoadStatesSection | None = None


class LorakitArgs(BaseModel):
    """The section `lorakit` of axolotl's configuration."""

    lorakit: LorakitSection | None = None


class LorakitPlugin(BasePlugin):  # type: ignore[misc]
    """Adds the callbacks that the section `lorakit` asks for."""

    def register(self, cfg: Any) -> None:
        """Tells what is wrong before any data is prepared or a model loaded.

        Raises:
            ValidationError: as the model `LorakitArgs`.
            LorakitError: as the callbacks; UsageError when both `keep` and `save_total_limit` are given.
        """
        section = _section(cfg)
        if section.keep is not None and cfg.get("save_total_limit"):
            raise UsageError(
                "save_total_limit and lorakit: keep both say which checkpoints stay: leave one of them out"
            )
        _callbacks(section)

    def get_input_args(self) -> str:
        return f"{__name__}.{LorakitArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """axolotl sets a `save_total_limit` of its own when none is given, which would undo what `keep` says."""
        if _section(cfg).keep is not None:
            trainer.args.save_total_limit = None

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return _callbacks(_section(cfg))


def _section(cfg: Any) -> LorakitSection:
    return LorakitArgs.model_validate({"lorakit": cfg.get("lorakit")}).lorakit or LorakitSection()


def _callbacks(section: LorakitSection) -> list[Any]:
    steps, seconds = section.every_steps, section.every_seconds
    callbacks: list[Any] = []
    if section.load_states is not None:
        callbacks.append(LoadStates(**section.load_states.model_dump()))
    if section.save_on_request:
        callbacks.append(SaveOnRequest(every_steps=steps, every_seconds=seconds))
    if section.save_state is not None:
        callbacks.append(SaveState(**section.save_state.model_dump()))
    if section.keep is not None:
        callbacks.append(KeepCheckpoints(section.keep, earlier=section.keep_earlier))
    if section.interruptible:
        callbacks.append(Interruptible(every_steps=steps, every_seconds=seconds))
    return callbacks
