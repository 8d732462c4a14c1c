"""What is known of a checkpoint: from its trainer's log, its own files, and the store."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lorakit.adapters.config import AdapterConfig, canonical, read_config
from lorakit.adapters.reading import UNFINISHED, WEIGHTS
from lorakit.checkpoints.finished import CHECKPOINT, MARKERS, PICKLED, is_adapter, look_at
from lorakit.checkpoints.runs import Candidate, candidates_of
from lorakit.checkpoints.trainer_state import FILE as TRAINER_STATE
from lorakit.checkpoints.trainer_state import read_facts
from lorakit.errors import InvalidFile, NotFound
from lorakit.files.digests import file_digest
from lorakit.files.folders import read_json
from lorakit.files.provenance import FILE as PROVENANCE
from lorakit.files.safetensors import read_header
from lorakit.store.catalog import Run
from lorakit.store.store import Store, bases_in, open_store

CONFIG = "adapter_config.json"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# What a whole model is in, by its writer; of several the first counts.
MODELS = (
    INDEXES[0], "model.safetensors", INDEXES[1], "pytorch_model.bin", "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin",
    ".metadata", "latest", "lit_model.pth",
)  # fmt: skip

State = Literal["finished", "incomplete", "refused"]


@dataclass(frozen=True, slots=True)
class Metadata:
    """One checkpoint; None is not known.

    `train_loss` is the newest one logged up to its step. `eval_loss` is of `eval_step`, which may be an earlier step
    than its own; `metrics` are of its own. `size` is in bytes, `created` the time of its weights in seconds since 1970.
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
    kind: Literal["adapter", "regular"] | None = None
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


def checkpoints_in(folder: Path) -> list[Candidate]:
    """What a person means by a folder: the checkpoints of a run or of a folder of runs, or the folder itself.

    Raises:
        NotFound: it is not there.
    """
    if not folder.is_dir():
        raise NotFound(f"there is no folder '{folder}'")
    return _named(folder) or [found for child in _folders(folder) for found in _of_child(child)]


def checkpoints_of(run: Path) -> list[Candidate]:
    """The checkpoints of one run, or the one that was named, the newest last.

    Raises:
        NotFound: it is not there, or holds none of its own; names the runs in it.
    """
    found = _named(run) if run.is_dir() else []
    if found:
        return found
    if others := sorted({candidate.run for candidate in checkpoints_in(run)}):
        raise NotFound(f"'{run}' is no run but holds some: name one of {', '.join(others)}")
    raise NotFound(f"there is no checkpoint in '{run}'")


def newest_finished(run: Path) -> Candidate:
    """The finished checkpoint of the largest step; the run's own root is newer than all.

    Raises:
        NotFound: as `checkpoints_of`, or none is finished; says why the newest is not.
    """
    found = checkpoints_of(run)
    for candidate in reversed(found):
        if look_into(candidate)[0].state == "finished":
            return candidate
    newest, _ = look_into(found[-1])
    raise NotFound(
        f"none of the {len(found)} checkpoints in '{run}' is finished: the newest is {newest.state}: {newest.reason}"
    )


def _named(folder: Path) -> list[Candidate]:
    absolute = Path(os.path.abspath(folder))
    if CHECKPOINT.fullmatch(absolute.name):
        return candidates_of(folder if folder.name else absolute, absolute.parent.name)
    return _of_one(folder, absolute.name)


def _of_one(folder: Path, run: str) -> list[Candidate]:
    found = [candidate for candidate in candidates_of(folder, run) if candidate.kind == "step" or is_adapter(folder)]
    if not is_adapter(folder) and holds_model(folder):
        found.append(Candidate(folder, run, "final" if found else "plain"))
    return found


def _of_child(folder: Path) -> list[Candidate]:
    try:
        return _of_one(folder, folder.name)
    except OSError:  # it went away, or belongs to someone else
        return []


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a whole model, finished or not."""
    return any((folder / name).exists() for name in MODELS)


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
        reason = f"it can't be read: {error}"
        path = os.path.abspath(candidate.folder)
        return Metadata(_name(candidate), path, candidate.run, candidate.step, reason=reason), ""


def _look_into(candidate: Candidate) -> tuple[Metadata, str]:
    folder = candidate.folder
    facts = read_facts(folder, candidate.step)
    state, reason, signature = _judged(folder)
    adapter = is_adapter(folder)
    model = None if adapter else next((name for name in MODELS if (folder / name).exists()), None)
    config = _config(folder) if adapter else None
    row = Metadata(
        id=_name(candidate),
        path=os.path.abspath(folder),
        run=candidate.run,
        step=facts.step,
        epoch=facts.epoch,
        train_loss=facts.train_loss,
        eval_loss=facts.eval_loss,
        eval_step=facts.eval_step,
        metrics=facts.metrics,
        kind="adapter" if adapter else "regular" if model else None,
        base=config.base if config else _models_base(folder) if model else None,
        rank=_rank(config) if config else None,
        size=_size(folder, whole=candidate.kind == "step"),
        created=_written(folder, (WEIGHTS, *PICKLED) if adapter else (model,) if model else ()),
        state=state,
        reason=reason,
    )
    return row, signature


def _name(candidate: Candidate) -> str:
    """As a revision's name, without a digest."""
    if candidate.kind == "plain":
        return candidate.run
    return f"{candidate.run}@step-{candidate.step}" if candidate.kind == "step" else f"{candidate.run}@final"


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
    """With its digest, if it is a finished adapter: that of a whole model would take longer than anybody waits."""
    if row.digest is not None or row.kind != "adapter" or row.state != "finished":
        return row
    return replace(row, digest=content_digest(Path(row.path)))


def _judged(folder: Path) -> tuple[State, str | None, str]:
    """State, reason and signature. What only quiet time could call finished is incomplete, as one look can't."""
    look = look_at(folder)
    if not is_adapter(folder) and holds_model(folder):
        try:
            reason = _why_unfinished(folder)
        except (OSError, InvalidFile, NotFound) as error:
            reason = str(error)
        return ("incomplete", reason, "") if reason else ("finished", None, "")
    if look.state == "finished" or (look.state == "whole" and (folder / PROVENANCE).is_file()):
        return "finished", None, look.signature  # lorakit's own folders appear whole or not at all
    return "refused" if look.state == "refused" else "incomplete", look.reason, look.signature


def _why_unfinished(folder: Path) -> str | None:
    """What a whole model lacks to be finished; None when it is.

    Raises:
        InvalidFile: a file is cut short.
    """
    if (folder / UNFINISHED).exists():
        return f"the trainer is still writing it: {UNFINISHED} is there"
    covered = list(_weights(folder))
    for file in covered:
        if not file.exists():
            return f"{file.name} is not there yet"
        if file.suffix == ".safetensors":
            read_header(file)
    if (folder / ".metadata").exists() or (folder / PROVENANCE).is_file():
        return None  # torch.distributed.checkpoint renames it there last; lorakit's own folders appear whole
    marker = next((folder / name for name in MARKERS if (folder / name).exists()), None)
    if marker is None:
        return "nothing says yet that its writer is done"
    if marker.name == TRAINER_STATE:
        step, named = read_json(marker).get("global_step"), CHECKPOINT.fullmatch(folder.name)
        if named and step != int(named[1]):
            return f"{TRAINER_STATE} is of step {step}"
    written = marker.stat().st_mtime_ns
    newer = next((file.name for file in covered if file.stat().st_mtime_ns > written), None)
    return f"{newer} is newer than {marker.name}, its writer's last file" if newer else None


def _weights(folder: Path) -> Iterator[Path]:
    """The files that a whole model consists of, there or not."""
    model = next(folder / name for name in MODELS if (folder / name).exists())
    if model.name in INDEXES:
        shards = read_json(model).get("weight_map")
        if not (isinstance(shards, dict) and all(isinstance(name, str) for name in shards.values())):
            raise InvalidFile(f"'{model}' has no weight_map")
        yield from (folder / name for name in sorted(set(shards.values())))
    yield model / ".metadata" if model.is_dir() else model
    if model.name.startswith(("model.", "pytorch_model.")):
        yield folder / "config.json"


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
                with suppress(FileNotFoundError):
                    if entry.is_file():
                        total += entry.stat().st_size
                    elif whole and entry.is_dir(follow_symlinks=False):
                        total += _size(Path(entry.path), whole=True) or 0
    except OSError:
        return None
    return total


def _written(folder: Path, names: Iterable[str]) -> float | None:
    for name in names:
        with suppress(OSError):
            return (folder / name).stat().st_mtime
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
    named = {name: run.select(name or None) for name in ("", "latest", "best", "final", *sorted(run.aliases))}
    aliases: dict[int, list[str]] = {}
    for name, target in named.items():
        if target is not None:
            aliases.setdefault(target.id, []).append(name or run.name)
    found = {}
    for finish in run.finishes:
        revision = run.revisions[finish.revision]
        source = store.source(run.name, revision.source)
        if source is not None:
            found[os.path.abspath(revision.source)] = Stored(
                revision.name,
                revision.digest,
                source.signature,
                tuple(aliases.get(revision.id, ())),
            )
    return found
