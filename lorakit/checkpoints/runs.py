"""Where in a watched folder there are runs and adapters, and what they are called; and for commands, the checkpoints of
a run, whoever wrote them.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from lorakit.checkpoints.finished import CHECKPOINT, is_adapter
from lorakit.checkpoints.places import LocalPlace
from lorakit.checkpoints.writers import accelerate, folder_written_by, litgpt, written_by
from lorakit.checkpoints.writers.torch_keys import keys_in, step_in
from lorakit.errors import NotFound
from lorakit.files.provenance import FILE as PROVENANCE
from lorakit.store.catalog import Label

FILES = (".ckpt", ".pt", ".pth")
_TEMPORARY = (".", "tmp-checkpoint-")
_COPY = re.compile(r"([A-Za-z][\w,+]*)_checkpoint-(\d{1,18})")  # of some states of a checkpoint: model_checkpoint-500
_STEP = re.compile(r"(?:^|[^A-Za-z])(?:global_)?(?:step|iter|iteration|checkpoint|ckpt)s?[-_=]?(\d{1,18})(?!\d)", re.I)
_EPOCH = re.compile(r"(?:^|[^A-Za-z])epoch[-_=]?(\d{1,18})(?!\d)", re.I)
_FOLDER = re.compile(  # a whole name: what follows the number of a copy is somebody's own
    r"(?:epoch[-_=]?\d{1,18}[-_]?)?(?:(?:global_)?(?:step|iter|iteration|checkpoint|ckpt)s?[-_=]?\d{1,18})?"
    r"(?:_universal)?|.*\.ckpt",
    re.I,
)
_PARTS = re.compile(
    r"(optimizer|scheduler|scaler|rng|random|training_args|adapter_model|recipe|lit_model|trainer).*|.*_states"
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A folder, or a file, that may hold a checkpoint: the run it belongs to, and what it is in that run.

    `name` is what it is called there, where its step alone does not say which it is. A `copy` holds what another holds
    too, or what was made of one: it is listed, and chosen only where there is no other.
    """

    folder: Path
    run: str
    kind: Label
    step: int | None = None
    name: str = ""
    copy: bool = False

    @property
    def place(self) -> tuple[str, Path]:
        """What tells it from all others: one folder may be in two runs."""
        return self.run, self.folder


def find_candidates(root: Path) -> list[Candidate]:
    """Every candidate under a watched folder, each run's in the order of steps, its root last.

    A folder that holds `checkpoint-*` is a run of its name; one that is itself an adapter is an adapter of its name;
    a watched folder that holds `checkpoint-*` itself is the run.

    Raises:
        OSError: the watched folder is not there.
    """
    return [candidate for run in runs_in(root, candidates_in_run) for candidate in run]


def runs_in(root: Path, listed: Callable[[Path, str], list[Candidate]]) -> list[list[Candidate]]:
    """The runs and adapters under a watched folder, as `find_candidates` tells them apart; `listed` gives the
    candidates of a folder under a name.

    Raises:
        OSError: the watched folder is not there.
    """
    own = listed(root, os.path.basename(os.path.abspath(root)))
    if own:
        return [own]
    found: list[list[Candidate]] = []
    for folder in _folders(root):
        with suppress(OSError):  # it went away, or belongs to someone else
            found.append(listed(Path(folder), os.path.basename(folder)))
    return found


def candidates_of(folder: Path, name: str) -> list[Candidate]:
    """A folder that a person named: a run, an adapter, or one checkpoint of a run.

    Raises:
        OSError: it is not there.
    """
    own = CHECKPOINT.fullmatch(folder.name)
    if own:
        return [Candidate(folder, name, "step", int(own[1]))]
    return candidates_in_run(folder, name) or [Candidate(folder, name, "plain")]


def candidates_in_run(folder: Path, name: str) -> list[Candidate]:
    """The candidates directly in a folder, and its root; none when it is neither a run nor an adapter.

    Raises:
        OSError: it is not there.
    """
    found = [candidate for child in _folders(folder) if (candidate := _checkpoint(child, name)) is not None]
    found.sort(key=lambda candidate: candidate.step or 0)
    if is_adapter(folder):
        found.append(Candidate(folder, name, "final" if found else "plain"))
    return found


@lru_cache(maxsize=1 << 17)
def _checkpoint(path: str, run: str) -> Candidate | None:
    """By its name alone; the same one each time, as a watcher asks for thousands every second."""
    match = CHECKPOINT.fullmatch(os.path.basename(path))
    return Candidate(Path(path), run, "step", int(match[1])) if match else None


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.path for entry in entries if not entry.name.startswith(_TEMPORARY) and _is_folder(entry))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle, or where nobody may look
        return False


# what commands call a run


def checkpoints_in(folder: Path) -> list[Candidate]:
    """What a person means by a path: the checkpoints of a run or of a folder of runs, or the folder or file itself.

    Raises:
        NotFound: it is not there.
    """
    if folder.is_file():
        return [_of_named_file(folder)]
    if not folder.is_dir():
        raise NotFound(f"there is no folder '{folder}'")
    return _named(folder) or [
        *_told_apart(files_below(folder, Path(os.path.abspath(folder)).name)),
        *(found for child in _folders(folder) for found in _of_child(Path(child))),
    ]


def checkpoints_of(run: Path) -> list[Candidate]:
    """The checkpoints of one run, or the one that was named, the newest last.

    Raises:
        NotFound: it is not there, or holds none of its own; names the runs in it.
    """
    if run.is_file():
        return checkpoints_in(run)
    found = (_named(run) or _in_run(run, Path(os.path.abspath(run)).name)) if run.is_dir() else []
    if found:
        return found
    if others := sorted({candidate.run for candidate in checkpoints_in(run)}):
        raise NotFound(f"'{run}' is no run but holds some: name one of {', '.join(others)}")
    raise NotFound(f"there is no checkpoint in '{run}'")


def _named(folder: Path) -> list[Candidate]:
    absolute = Path(os.path.abspath(folder))
    one = one_named(absolute)
    if one is None:
        return checkpoints_below(folder, absolute.name)
    return [replace(one, folder=folder) if folder.name else one]


def originals(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that the latest and the best are chosen from."""
    return [candidate for candidate in candidates if not candidate.copy] or list(candidates)


def _of_named_file(file: Path) -> Candidate:
    """Raises NotFound when it is a part of a checkpoint."""
    folder = Path(os.path.abspath(file)).parent
    try:
        layout = folder_written_by(LocalPlace(folder))
    except OSError:
        layout = None
    if layout is not None and file.name in layout.files:
        raise NotFound(f"'{file}' is a part of the checkpoint '{folder}': name that")
    return of_file(file, folder.name)


def _of_child(folder: Path) -> list[Candidate]:
    try:
        return _in_run(folder, folder.name)
    except OSError:  # it went away, or belongs to someone else
        return []


def _in_run(folder: Path, run: str) -> list[Candidate]:
    """Lightning's `version_0` has them in a folder of their own. Raises OSError."""
    found = checkpoints_below(folder, run) or _told_apart(files_below(folder, run))
    inner = folder / "checkpoints"
    return found or (_in_run(inner, run) if os.path.isdir(inner) and not inner.is_symlink() else [])


def checkpoints_below(folder: Path, run: str) -> list[Candidate]:
    """The checkpoints of a run, whoever wrote them, in the order of steps, its own root last. Those of an unknown step
    come first, by epoch and by time. None where there are but files, as those may lie beside runs.

    Raises:
        OSError: it is not there.
    """
    found = [*_in_folders(folder, run)]
    root = _root(folder, run, bool(found))
    if found:
        found = sorted(_told_apart([*found, *files_below(folder, run)]), key=_by_step)
    return [*found, *([root] if root else [])]


def _told_apart(candidates: list[Candidate]) -> list[Candidate]:
    """Where two would have one id, each but a `checkpoint-N` has its own file's name."""
    times = Counter((one.kind, one.step, one.name) for one in candidates)
    return [
        replace(one, name=one.folder.name.removesuffix(".ckpt"))
        if times[one.kind, one.step, one.name] > 1 and not CHECKPOINT.fullmatch(one.folder.name)
        else one
        for one in candidates
    ]


def files_below(folder: Path, run: str) -> list[Candidate]:
    """Files that are a checkpoint each, in a folder that is none itself. Raises OSError."""
    names = [name for name in sorted(os.listdir(folder)) if _is_checkpoint_file(name)]
    if not names or folder_written_by(LocalPlace(folder)) is not None:
        return []
    files = [Path(folder, name) for name in names]
    return sorted((of_file(file, run) for file in files if file.is_file() and not _leads_beside(file)), key=_by_step)


def of_file(file: Path, run: str) -> Candidate:
    """A file that is a checkpoint of its own, as `epoch=1-step=16.ckpt`: its step by its name, else by what it says."""
    named = _STEP.search(file.stem)
    step = int(named[1]) if named else step_in(keys_in(LocalPlace(file), file.name))
    return Candidate(file, run, "step", step, "" if named else file.stem)


def one_named(folder: Path) -> Candidate | None:
    """A folder that is one checkpoint of the run above it, by its name and by what is in it."""
    above = folder.parent.name
    match = CHECKPOINT.fullmatch(folder.name)
    return Candidate(folder, above, "step", int(match[1])) if match else _of_folder(folder, above)


def _in_folders(folder: Path, run: str) -> Iterator[Candidate]:
    for path in _folders(folder):
        if _leads_beside(Path(path)):  # a name that somebody gave to one of them
            continue
        if found := _checkpoint(path, run) or _of_folder(Path(path), run):
            yield found


def _of_folder(folder: Path, run: str) -> Candidate | None:
    name = folder.name
    copy = _COPY.fullmatch(name)
    is_whole = _FOLDER.fullmatch(name) is not None
    step, epoch = (_STEP.search(name), _EPOCH.search(name)) if is_whole else (None, None)
    if not (copy or step or epoch or name == "final"):
        return None
    try:
        found = written_by(LocalPlace(folder))
    except OSError:
        return None
    if found is None:
        return None
    if copy:
        return Candidate(folder, run, "step", int(copy[2]), f"{copy[1]}-step-{copy[2]}", copy=True)
    if name == "final":
        return Candidate(folder, run, "final") if found[0] is litgpt else None
    made = (folder / PROVENANCE).is_file()  # by lorakit, of another
    if step is None or (found[0] is accelerate and name.startswith("checkpoint_")):  # which counts what it saved
        return Candidate(folder, run, "step", None, name, copy=made)
    universal = f"universal-step-{step[1]}" if "universal" in name else ""
    return Candidate(folder, run, "step", int(step[1]), universal, copy=made)


def _root(folder: Path, run: str, has_steps: bool) -> Candidate | None:
    kind: Label = "final" if has_steps else "plain"
    if is_adapter(folder):
        return Candidate(folder, run, kind)
    layout = folder_written_by(LocalPlace(folder))
    if layout is None or layout.kind is None or (layout.writer == "deepspeed" and has_steps):
        return None
    return Candidate(folder, run, kind)


def _is_checkpoint_file(name: str) -> bool:
    stem, ending = os.path.splitext(name)
    return ending in FILES and not name.startswith(".") and not _PARTS.fullmatch(stem)


def _leads_beside(path: Path) -> bool:
    """Whether it is a link to another one of the same folder, as Lightning's `last.ckpt` may be."""
    return path.is_symlink() and os.path.dirname(os.path.realpath(path)) == os.path.realpath(path.parent)


def _by_step(candidate: Candidate) -> tuple[bool, int, int, float, bool, str]:
    """Of one step, the checkpoint itself comes after the copies of its parts."""
    folder, step = candidate.folder, candidate.step
    epoch = _EPOCH.search(folder.name)
    if step is not None:
        return candidate.kind == "final", step, 0, 0.0, not candidate.name, folder.name
    try:
        written = folder.stat().st_mtime
    except OSError:
        written = 0.0
    return candidate.kind == "final", -1, int(epoch[1]) if epoch else -1, written, False, folder.name
