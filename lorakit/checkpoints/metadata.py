"""What is known of a checkpoint: from its trainer's log, its own files, and the store."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lorakit.adapters.config import AdapterConfig, canonical, read_config
from lorakit.adapters.reading import WEIGHTS
from lorakit.checkpoints.facts import facts_at, rank_in
from lorakit.checkpoints.finished import NO_PERMISSION, STALLED, Look, examine, last_change, look_once, settled
from lorakit.checkpoints.retention import in_words
from lorakit.checkpoints.runs import Candidate, originals
from lorakit.checkpoints.runs import checkpoints_in as checkpoints_in
from lorakit.checkpoints.runs import checkpoints_of as checkpoints_of
from lorakit.checkpoints.writers.layout import Kind, Layout
from lorakit.errors import InvalidFile, NotFound
from lorakit.files.digests import file_digest
from lorakit.files.folders import read_json
from lorakit.store.catalog import Run
from lorakit.store.store import Store, bases_in, open_store

CONFIG = "adapter_config.json"
SAID = 3  # newer ones that are passed over

log = logging.getLogger("lorakit.checkpoints")  # the command line shows what is said here on stderr

State = Literal["finished", "incomplete", "stalled", "refused"]


@dataclass(frozen=True, slots=True)
class Metadata:
    """One checkpoint; None is not known.

    `train_loss` is the newest one logged up to its step. `eval_loss` is of `eval_step`, which may be an earlier step
    than its own; `metrics` are of its own. `size` is in bytes, `created` the time of its weights in seconds since 1970.
    `stalled` is what is incomplete, and was not written to for `STALLED` seconds.
    """

    id: str
    path: str
    run: str
    step: int | None = None
    epoch: float | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    eval_step: int | None = None
    metrics: Mapping[str, float] | None = None
    kind: Kind | None = None
    base: str | None = None
    rank: int | None = None
    size: int | None = None
    digest: str | None = None
    created: float | None = None
    state: State = "incomplete"
    reason: str | None = None
    aliases: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: null."""
        return {name: _as_json(value) for name, value in asdict(self).items()}

    def metric(self, name: str) -> float | None:
        """A metric that was measured at this very step; `train_loss` as it was logged last."""
        if name in ("eval_loss", "loss", "train_loss"):
            evaluated = self.eval_loss if self.step is not None and self.eval_step == self.step else None
            return evaluated if name == "eval_loss" else self.train_loss
        return (self.metrics or {}).get(name)


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _as_json(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, slots=True)
class Stored:
    """The revision that a folder was taken into the store as, and the folder's signature then."""

    name: str
    digest: str
    signature: str
    aliases: tuple[str, ...]


def newest_finished(run: Path) -> Candidate:
    """The finished checkpoint of the largest step; the run's own root is newer than all.

    Raises:
        NotFound: as `checkpoints_of`, or none is finished; says why the newest is not.
    """
    found = checkpoints_of(run)
    chosen_from = originals(found)
    newest = next((one for one in reversed(chosen_from) if look_once(one.folder).state == "finished"), None)
    if newest is None:
        last, _ = look_into(chosen_from[-1])
        raise NotFound(
            f"none of the {len(found)} checkpoints in '{run}' is finished: the newest is {last.state}: {last.reason}"
        )
    _say_what_is_newer(found[found.index(newest) + 1 :], newest)
    return newest


def _say_what_is_newer(passed_over: Sequence[Candidate], newest: Candidate) -> None:
    for candidate in reversed(passed_over[-SAID:]):
        row, _ = look_into(candidate)
        reason = f"{row.state}: {row.reason}" if row.reason else "a copy of one, or made of one"
        log.info("'%s' is newer than %s, but is %s", candidate.folder, newest.folder.name, reason)
    if len(passed_over) > SAID:
        log.info("and %d more are newer", len(passed_over) - SAID)


def metadata_of(
    candidate: Candidate, stored: Mapping[str, Stored] | None = None, *, with_digest: bool = False
) -> Metadata:
    """What one look shows; never waits. Reads the adapter's bytes only `with_digest`, and where the store has none."""
    row, signature = look_into(candidate)
    if with_digest and not is_stored(row, signature, stored or {}):
        row = with_content_digest(row)
    return as_stored(row, signature, stored or {})


def look_into(candidate: Candidate) -> tuple[Metadata, str]:
    """What the folder itself says, and the signature of the files that it is of."""
    try:
        return _look_into(candidate)
    except OSError as error:  # it went away meanwhile, or belongs to someone else
        reason = f"it can't be read: {NO_PERMISSION if isinstance(error, PermissionError) else error}"
        path = os.path.abspath(candidate.folder)
        return Metadata(_name(candidate), path, candidate.run, candidate.step, reason=reason), ""


def _look_into(candidate: Candidate) -> tuple[Metadata, str]:
    path = candidate.folder
    look, layout = examine(path)
    look = settled(look)
    state, reason = _judged(look)
    is_file = path.is_file()
    facts = facts_at(path, candidate.step, layout)
    config = _config(path) if look.kind == "adapter" and not is_file else None
    row = Metadata(
        id=_name(candidate),
        path=os.path.abspath(path),
        run=candidate.run,
        step=facts.step,
        epoch=facts.epoch,
        train_loss=facts.train_loss,
        eval_loss=facts.eval_loss,
        eval_step=facts.eval_step,
        metrics=facts.metrics,
        kind=look.kind,
        base=config.base if config else _models_base(path) if look.kind == "regular" and not is_file else None,
        rank=_rank(config) if config else rank_in(path, layout) if look.kind == "adapter" else None,
        size=path.stat().st_size if is_file else _size(path, whole=candidate.kind == "step"),
        created=_written(path, layout),
        state=state,
        reason=reason,
    )
    return row, look.signature


def _name(candidate: Candidate) -> str:
    """As a revision's name, without a digest."""
    if candidate.kind == "plain":
        return candidate.run
    if candidate.kind == "final":
        return f"{candidate.run}@final"
    return f"{candidate.run}@{candidate.name or f'step-{candidate.step}'}"


def is_stored(row: Metadata, signature: str, stored: Mapping[str, Stored]) -> bool:
    """Whether its files are still those that the store took in."""
    return row.path in stored and stored[row.path].signature == signature


def as_stored(row: Metadata, signature: str, stored: Mapping[str, Stored]) -> Metadata:
    """With the name, digest and aliases of its revision, where it has one."""
    if not is_stored(row, signature, stored):
        return row
    known = stored[row.path]
    return replace(row, id=known.name, digest=known.digest, aliases=known.aliases)


def with_content_digest(row: Metadata) -> Metadata:
    """With its digest, if it is a finished adapter of PEFT's: that of a whole model would take longer than anybody
    waits."""
    if row.digest is not None or row.kind != "adapter" or row.state != "finished":
        return row
    if not all((Path(row.path) / name).is_file() for name in (CONFIG, WEIGHTS)):
        return row
    return replace(row, digest=content_digest(Path(row.path)))


def _judged(look: Look) -> tuple[State, str | None]:
    """What is only whole is incomplete, as one look can't tell."""
    if look.state == "finished":
        return "finished", None
    if look.state == "refused":
        return "refused", look.reason
    if look.state == "incomplete" and look.signature:  # it was read, so it is no matter of permissions
        now = time.time()
        quiet = now - last_change(look.path, now)
        if quiet >= STALLED:
            return "stalled", f"{look.reason}; nothing was written for {in_words(quiet)}"
    return "incomplete", look.reason


def _config(folder: Path) -> AdapterConfig | None:
    try:
        return read_config(folder)
    except InvalidFile:
        return None


def _rank(config: AdapterConfig) -> int | None:
    """The largest of any module."""
    return max((config.rank, *config.rank_pattern.values())) or None


def _models_base(folder: Path) -> str | None:
    """What a model was started from, where `config.json` says so."""
    try:
        name = read_json(folder / "config.json").get("_name_or_path")
    except InvalidFile:
        return None
    return name if isinstance(name, str) and name else None


def _size(folder: Path, *, whole: bool) -> int | None:
    """Bytes of all files; in a folder that holds more than this checkpoint, of those directly in it."""
    total = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                with suppress(OSError):  # gone, or a link that leads in a circle
                    if entry.is_file():
                        total += entry.stat().st_size
                    elif whole and entry.is_dir(follow_symlinks=False):
                        total += _size(Path(entry.path), whole=True) or 0
    except OSError:
        return None
    return total


def _written(path: Path, layout: Layout | None) -> float | None:
    """Of its weights."""
    for name in layout.weights if layout else ():
        with suppress(OSError):
            return (path if path.is_file() else path / name).stat().st_mtime
    return None


def content_digest(folder: Path) -> str:
    """The digest that the store gives to this adapter, unless it has to repair it."""
    text = json.dumps(canonical(read_json(folder / CONFIG)), indent=2, ensure_ascii=False) + "\n"
    digests = {CONFIG: hashlib.sha256(text.encode()).hexdigest(), WEIGHTS: file_digest(folder / WEIGHTS)}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def stored_by_path(home: Path) -> dict[str, Stored]:
    """What the store took from each folder last, of every base."""
    found: dict[str, Stored] = {}
    for base in bases_in(home):
        with open_store(home, base) as store:
            for run in store.runs().values():
                found |= _of_run(store, run)
    return found


def _of_run(store: Store, run: Run) -> dict[str, Stored]:
    aliases = aliases_of(run)
    found = {}
    for finish in run.finishes:
        revision = run.revisions[finish.revision]
        source = store.source(run.name, revision.source)
        if source is not None:
            found[os.path.abspath(revision.source)] = Stored(
                revision.name,
                revision.digest,
                source.signature,
                aliases.get(revision.id, ()),
            )
    return found


def aliases_of(run: Run) -> dict[int, tuple[str, ...]]:
    """What points at each revision now, by its number; the default alias is the run's own name."""
    found: dict[int, tuple[str, ...]] = {}
    for alias in dict.fromkeys(("", "latest", "best", "final", *sorted(run.aliases))):
        target = run.select(alias or None)
        if target is not None:
            found[target.id] = (*found.get(target.id, ()), alias or run.name)
    return found
