"""Is a checkpoint ready for vLLM? Adapters by the very judgement of the server, whole models by their files."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.reading import WEIGHTS, load_adapter
from lorakit.checkpoints.finished import NO_PERMISSION, QUIET, Look, look_at
from lorakit.checkpoints.places import LocalPlace
from lorakit.checkpoints.writers import folder_written_by
from lorakit.convert.adapters.convert import without_cure
from lorakit.convert.adapters.pickled import PICKLED
from lorakit.convert.check import Check, check_adapter, check_numbers
from lorakit.convert.own_tokens import same_tokens
from lorakit.convert.whole_model import check_model
from lorakit.errors import LorakitError
from lorakit.files.finite import look_at_numbers
from lorakit.files.hub import looks_like_hub_id
from lorakit.files.safetensors import read_header
from lorakit.merge.base import INDEX, SINGLE, BaseModel, base_named_by, read_base
from lorakit.merge.fetch import open_base, with_values
from lorakit.store.store import default_home

LATER = "wait for its writer; if none is running any more, use an earlier checkpoint"

Word = Literal["ready", "not ready", "unknown"]


@dataclass(frozen=True, slots=True)
class Judgement:
    """`modules` that it changes, and how many of them would apply to `base`; None is not known, or of no adapter."""

    path: Path
    kind: str | None
    writer: str | None
    checks: tuple[Check, ...]
    repairs: tuple[str, ...] = ()
    rank: int | None = None
    modules: int | None = None
    modules_applied: int | None = None
    base: str | None = None

    @property
    def word(self) -> Word:
        if any(check.ok is False for check in self.checks):
            return "not ready"
        return "ready" if all(check.ok for check in self.checks) else "unknown"

    @property
    def ready(self) -> bool:
        """What is unknown is not ready."""
        return self.word == "ready"

    @property
    def problems(self) -> tuple[str, ...]:
        return tuple(problem for check in self.checks if (problem := check.problem))

    @property
    def open_questions(self) -> tuple[str, ...]:
        """Why it is not known."""
        return tuple(question for check in self.checks if (question := check.question))

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": os.path.abspath(self.path), "kind": self.kind, "writer": self.writer, "ready": self.ready,
            "verdict": self.word, "checks": [asdict(check) for check in self.checks], "problems": list(self.problems),
            "repairs": list(self.repairs), "rank": self.rank, "modules": self.modules,
            "modules_applied": self.modules_applied, "base": self.base,
        }  # fmt: skip


def judge(
    path: Path, base: str | None = None, *, max_rank: int | None = None, quiet: float = QUIET, ask_hub: bool = True,
    sampled: bool = False,
) -> Judgement:  # fmt: skip
    """Say whether vLLM would load it, and be right; for an adapter, beside `base` or the one that its config names.

    Args:
        quiet: seconds to wait, where only that tells that its writer is done; with 0 that is not known then.
        ask_hub: whether a base that is not here is looked for on the hub.
        sampled: look at a part of a whole model's numbers alone; all take some seconds a GB.

    Raises:
        NotFound, InvalidFile: as `open_base`, for a base that is given.
    """
    began = time.monotonic()
    look = look_at(path)
    if look.reason.endswith(NO_PERMISSION):
        return Judgement(path, look.kind, look.writer, (Check("readable", False, look.reason),))
    if look.kind == "adapter" and look.state != "refused" and (path / WEIGHTS).is_file():
        judged = _adapter(look, base, max_rank, ask_hub=ask_hub)
    elif look.kind == "regular" and _is_model_folder(path):
        judged = Judgement(path, look.kind, look.writer, tuple(_model(path, sampled=sampled)))
    else:
        judged = Judgement(path, look.kind, look.writer, tuple(_of_another_format(look)))
    finished = _finished(look, began + quiet if quiet else None)
    checks = [check for check in judged.checks if finished.ok is not False or check.name != "readable"]
    return replace(judged, checks=(finished, *checks))


def _finished(look: Look, until: float | None) -> Check:
    """What nothing vouches for has to stay as it is until that moment of the monotonic clock."""
    if look.state == "finished":
        return Check("finished", True, look.reason)
    if look.state == "refused":
        return Check("finished", None, "not looked at, as it is refused")
    if look.state == "incomplete":
        return Check("finished", False, look.reason, LATER)
    if (default_home() / "revisions").resolve() in look.path.resolve().parents:
        return Check("finished", True, "lorakit put it there, which it does whole")
    if until is None:
        return Check("finished", None, look.reason, "lorakit check waits, and sees")
    waited = max(0.0, until - time.monotonic())
    time.sleep(waited)
    again = look_at(look.path)
    if (again.state, again.signature) == (look.state, look.signature) or again.state == "finished":
        return Check("finished", True, "nothing was written to it for a while")
    return Check("finished", False, "it was written to just now", LATER)


# adapters


def _adapter(look: Look, base: str | None, max_rank: int | None, *, ask_hub: bool) -> Judgement:
    path = look.path
    try:
        adapter = load_adapter(path)
        header = read_header(path / WEIGHTS)
        numbers = look_at_numbers(header)
    except LorakitError as error:
        broken = Check("readable", False, str(error), "use an earlier checkpoint")
        return Judgement(path, look.kind, look.writer, (broken,))
    model, of_base = _base_for(adapter, base, ask_hub=ask_hub)
    if model is None:
        verdict = check_adapter(adapter, None, max_rank=max_rank)
    else:
        verdict = with_values(model, lambda: check_adapter(adapter, model, max_rank=max_rank))
    checks = [
        Check("readable", True, f"{len(header.tensors)} tensors, {adapter.config.peft_type}"),
        Check("pickle-free", True, WEIGHTS),
        check_numbers(numbers),
        of_base,
        *([same_tokens(path, model.folder)] if model is not None else []),
    ]
    said = {check.name for check in verdict.checks}
    checks = [check for check in checks if check.name not in said]
    if numbers.all_zero and look.state != "finished":  # some writers make a file in its full size, and fill it then
        checks.append(Check("filled", None, "all its numbers are zero", LATER))
    return Judgement(
        path, look.kind, look.writer, (*checks, *verdict.checks), verdict.repairs, verdict.rank, verdict.modules,
        verdict.applied, adapter.base if base is None else base,
    )  # fmt: skip


def _base_for(adapter: Adapter, given: str | None, *, ask_hub: bool) -> tuple[BaseModel | None, Check]:
    """The base, and what there is to say of it."""
    if given is not None:
        return open_base(given), Check("base", True, given)
    try:
        named = base_named_by([adapter])
        found = open_base(named) if ask_hub else read_base(_here(named))
    except LorakitError as error:
        return None, Check("base", None, without_cure(error), "name it with --base")
    return found, Check("base", True, named)


def _here(base: str) -> str:
    """A base's folder, or what the cache has of it."""
    if Path(base).is_dir() or not looks_like_hub_id(base):
        return base
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = base.partition("@")
    config = try_to_load_from_cache(name, "config.json", revision=revision or None)
    if not isinstance(config, str):
        raise LorakitError(f"its base '{base}' is not here")
    return str(Path(config).parent)


# whole models, and what is neither


def _is_model_folder(path: Path) -> bool:
    return (path / "config.json").is_file() and any((path / name).is_file() for name in (INDEX, SINGLE))


def _model(path: Path, *, sampled: bool) -> list[Check]:
    try:
        return check_model(read_base(path), sampled=sampled)
    except LorakitError as error:
        return [Check("readable", False, str(error), "use an earlier checkpoint, or copy it again")]


def _is_part(file: Path) -> bool:
    """Whether it is one file of the checkpoint that its folder is."""
    found = folder_written_by(LocalPlace(file.parent))
    return found is not None and file.name in found.files


def _of_another_format(look: Look) -> list[Check]:
    """Refused, unknown, or a format of training that no engine loads."""
    if look.state == "refused":
        reason, _, cure = look.reason.partition(": ")
        if any((look.path / name).is_file() for name in PICKLED):
            cure = f"{cure}, or lorakit convert '{look.path}' --out DIR, which runs none"
        return [Check("pickle-free", False, reason, cure)]
    if look.path.is_file() and _is_part(look.path):
        cure = f"name its folder, '{look.path.parent}'"
        return [Check("format", False, f"'{look.path.name}' is one file of a checkpoint", cure)]
    if look.kind is None:
        reason = "no checkpoint is recognised in it" if look.writer is None else f"{look.writer} wrote no weights there"
        return [Check("format", False, reason, "name the folder, or the file, of a checkpoint")]
    what = "an adapter" if look.kind == "adapter" else "a model"
    reason = f"it is {what} in a format of training (written by {look.writer}), which vLLM does not load"
    return [Check("format", False, reason, f"lorakit convert '{look.path}' --out DIR")]
