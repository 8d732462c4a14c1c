"""Retention while training runs: the policies of `lorakit prune`, after each save."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lorakit.checkpoints.pruning import execute_prune, plan_prune
from lorakit.checkpoints.retention import Checkpoint, KeepBest, Policy, Retention
from lorakit.checkpoints.retention_file import read_retention, retention_of
from lorakit.errors import LorakitError, UsageError

_log = logging.getLogger(__name__)
Keep = Retention | Policy | Sequence[Policy] | Mapping[str, Any] | str | Path


class KeepCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Removes, after each save, the checkpoints that no policy keeps.

    Only those that this training wrote are judged and removed, unless `earlier` says that all of the run are. Those
    that an alias or a link points at stay, and so do the newest, the one that training went on from, and the best one
    that the Trainer loads at the end.

    Args:
        keep: policies, any of which keeps a checkpoint; a `Retention`; or what a YAML file says (`{"keep_last": 3}`),
            or such a file.
        home: the store whose aliases are heeded; by default the one that all use.

    Raises:
        UsageError: nothing says what to keep, or `save_total_limit` removes checkpoints, too.
    """

    def __init__(self, keep: Keep, *, earlier: bool = False, home: Path | None = None) -> None:
        self._retention = _retention(keep)
        self._earlier = earlier
        self._home = home
        self._written: set[str] = set()
        self._began: str | None = None
        self._warned: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.save_total_limit:
            raise UsageError(
                f"save_total_limit={args.save_total_limit} and KeepCheckpoints both remove checkpoints, and the "
                "Trainer heeds no policy: leave save_total_limit out"
            )
        self._written.clear()
        self._began = f"checkpoint-{state.global_step}" if state.global_step else None

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._written.add(f"checkpoint-{state.global_step}")
        if not state.is_world_process_zero:
            return
        try:
            self._prune(Path(args.output_dir), state.best_model_checkpoint)
        except (LorakitError, OSError) as error:
            self._warn(f"no checkpoint was removed: {error}")

    def _prune(self, run: Path, best: str | None) -> None:
        held = {self._began: "training went on from it"} if self._began else {}
        if best:
            held |= {Path(best).name: "the Trainer's best"}
        retention = self._retention
        inner = Chosen(retention.policies, held, None if self._earlier else frozenset(self._written))
        pruned = execute_prune(plan_prune(run, replace(retention, policies=(inner,)), home=self._home))
        if pruned.removed:
            _log.info("removed %s", ", ".join(pruned.removed))
        if pruned.left:
            self._warn(f"'{pruned.left[0]}' is out of the run, but can't be removed wholly: remove it by hand")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            _log.warning(message)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Policies that judge only some checkpoints, and keep all others and those that are held.

    Where the best are asked for and none can be told yet, it keeps all.
    """

    policies: tuple[Policy, ...]
    held: dict[str, str]
    judged: frozenset[str] | None = None

    def reasons(self, checkpoints: Sequence[Checkpoint], now: float) -> dict[str, str]:
        mine = [one for one in checkpoints if self.judged is None or one.name in self.judged]
        kept = {one.name: "this training did not write it" for one in checkpoints if one not in mine}
        if any(isinstance(policy, KeepBest) and not policy.measured(mine) for policy in self.policies):
            return kept | {one.name: "none can be called the best yet" for one in mine}
        for policy in self.policies:
            kept = policy.reasons(mine, now) | kept
        return kept | {name: reason for name, reason in self.held.items() if any(one.name == name for one in mine)}


def _retention(keep: Keep) -> Retention:
    if isinstance(keep, Retention):
        return keep
    if isinstance(keep, str | Path):
        return read_retention(Path(keep))
    if isinstance(keep, Mapping):
        return retention_of(keep)
    return Retention(tuple(keep) if isinstance(keep, Iterable) else (keep,))
