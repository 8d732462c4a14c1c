"""`lorakit.unmerge`: the base of a merged model, bit for bit, or not at all.

Subtracting the delta from rounded weights would not give it: what rounding took away can't be put back.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.errors import InvalidFile, NotFound, OutOfSpace, Refused, UsageError
from lorakit.files.folders import copy_file, copy_range, free_bytes, refuse_existing, whole_folder, write_all
from lorakit.files.provenance import write_provenance
from lorakit.files.safetensors import Header, StoredTensor, parse_header
from lorakit.merge.base import BaseModel, read_base
from lorakit.merge.execute import Meter, Progress, Sources, worker_count
from lorakit.merge.lineage import Lineage, read_lineage
from lorakit.merge.undo import UNDO, Part, Undo, beside_weights, item_bytes, read_block, read_undo, xor

_WHY = (
    "subtracting the adapter from rounded weights would not give the base back (lorakit merge --undo keeps what is "
    "needed)"
)


@dataclass(frozen=True, slots=True)
class UnmergeReport:
    """`how`: from the merged model and its "undo" file, or as a copy of the "base"."""

    out: Path | None
    merged: Path
    how: str
    identity: str
    tensors: int
    nbytes: int
    dry_run: bool = False
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "out": None if self.out is None else str(self.out),
            "merged": str(self.merged),
            "how": self.how,
            "identity": self.identity,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "dry_run": self.dry_run,
            "seconds": round(self.seconds, 3),
        }


def unmerge(
    merged: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> UnmergeReport:
    """Write the base that a merged model was made from: every shard, its config and its index, bit for bit.

    Args:
        merged: What `lorakit merge` wrote.
        out: The folder to write. Appears whole or not at all. Only a dry run goes without.
        base: Where the base is. None: it is made from the merged model and what `lorakit merge --undo` wrote beside
            it; without that, it is the one that `lorakit.json` names, if it is still the same.
        dry_run: Say how it would be done, write nothing.
        progress: Called with (bytes written, bytes in all).

    Raises:
        NotFound: there is no such folder, or it holds no lorakit.json.
        Refused: the base is gone or another, and there is no undo file; or the merged model was changed since.
        Conflict: `out` exists.
        OutOfSpace: the disk is full.
    """
    begun = time.monotonic()
    target = None if out is None else Path(out)
    if target is not None:
        refuse_existing(target)
    elif not dry_run:
        raise UsageError("no folder to write is named: give `out`, or ask for a dry run")
    lineage = read_lineage(Path(merged))
    from_undo = base is None and (lineage.folder / UNDO).is_file()
    work: _Rebuild | _Copy = _Rebuild(lineage) if from_undo else _Copy(lineage, base)
    report = UnmergeReport(
        target, lineage.folder, work.how, work.identity, work.tensors, work.nbytes, dry_run or target is None
    )  # fmt: skip
    if dry_run or target is None:
        return report
    free = free_bytes(target)
    if free < work.nbytes:
        raise OutOfSpace(f"'{target}' needs {work.nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there")
    with whole_folder(target) as beside:
        work.write(beside, Meter(work.nbytes, progress))
        found = read_base(beside).identity
        if found != work.identity:
            raise Refused(f"what was made from '{lineage.folder}' is not its base: the merged model was changed since")
        parents = [{"kind": "merged", "path": str(lineage.folder.absolute())}]
        write_provenance(beside, "unmerge", parents, {"how": work.how}, identity=found)
    return replace(report, seconds=time.monotonic() - begun)


class _Copy:
    """The base is still there: copied as it is."""

    how = "base"

    def __init__(self, lineage: Lineage, given: str | os.PathLike[str] | None) -> None:
        self.base = self._same_base(lineage, given)
        self.identity = self.base.identity
        self.tensors = len(self.base.tensors)
        self.nbytes = sum(shard.size for shard in self.base.shards)

    @staticmethod
    def _same_base(lineage: Lineage, given: str | os.PathLike[str] | None) -> BaseModel:
        try:
            base = lineage.open_base(given)
        except NotFound as error:
            raise Refused(f"{error}; '{lineage.folder}' was merged without --undo, and {_WHY}") from None
        same = lineage.same_base(base)
        if same is None:
            raise Refused(
                f"'{lineage.folder / 'lorakit.json'}' doesn't say which base it was, so no other can be known"
            )
        if not same:
            raise Refused(
                f"base '{base.folder}' is not, or no longer, the one that was merged into: name that with --base; "
                f"{_WHY}"
            )
        return base

    def write(self, folder: Path, meter: Meter) -> None:
        for shard in self.base.shards:
            copy_file(shard.file, folder / shard.file.name)
            meter.add(shard.size)
        for name in beside_weights(self.base.folder):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(self.base.folder / name, folder / name)
        self.base.ensure_unchanged()


class _Rebuild:
    """Each tensor from the merged one and what was kept of the difference."""

    how = "undo"

    def __init__(self, lineage: Lineage) -> None:
        self.undo: Undo = read_undo(lineage.folder / UNDO)
        self.merged = read_base(lineage.folder)
        self.identity = self.undo.identity
        self.shards = {name: self._shard(name) for name in self.undo.shards}
        self.tensors = sum(len(header.tensors) for header, _ in self.shards.values())
        self.nbytes = sum(header.size for header, _ in self.shards.values())

    def _shard(self, name: str) -> tuple[Header, bytes]:
        """The base's shard as its head describes it."""
        shard = self.undo.shards[name]
        head = b"".join(self.undo.blocks(f"head {name}", shard.head))
        header = parse_header(Path(name), head[8:], shard.size)
        if header.tensors.keys() != shard.parts.keys():
            raise InvalidFile(f"'{self.undo.header.file}' has other tensors than the head of '{name}' says")
        return header, head

    def write(self, folder: Path, meter: Meter) -> None:
        with ExitStack() as stack:
            sources = Sources()
            stack.callback(sources.close)
            for name, (header, head) in self.shards.items():
                file = stack.enter_context((folder / name).open("xb")).fileno()
                os.truncate(file, header.size)
                write_all(file, head, 0)
                meter.add(len(head))
                with ThreadPoolExecutor(worker_count(), thread_name_prefix="unmerge") as pool:
                    parts = self.undo.shards[name].parts
                    work = [
                        pool.submit(self._write_tensor, stored, parts[tensor], file, sources, meter)
                        for tensor, stored in header.tensors.items()
                    ]
                    try:
                        for task in work:
                            task.result()
                    except BaseException:
                        meter.stopped = True  # the others give up too
                        raise
        for name, part in self.undo.files.items():
            self._write_file(name, part, folder)
        self.merged.ensure_unchanged()

    def _write_tensor(self, stored: StoredTensor, part: Part, file: int, sources: Sources, meter: Meter) -> None:
        meter.add(0)
        now = self.merged.tensors.get(stored.name)
        if part.how == "stored":
            blocks = self.undo.blocks(f"tensor {stored.name}", stored.nbytes, item_bytes(stored))
        elif now is None or (now.dtype, now.shape) != (stored.dtype, stored.shape):
            raise Refused(self._changed(stored.name))
        elif part.how == "same":
            copy_range(sources.of(now), file, now.start, stored.start, stored.nbytes)
            meter.add(stored.nbytes)
            return
        else:
            changes = self.undo.blocks(f"tensor {stored.name}", stored.nbytes, item_bytes(stored))
            blocks = _changed_back(changes, now, sources.of(now))
        digest, position = hashlib.sha256(), stored.start
        for block in blocks:
            digest.update(block)
            write_all(file, block, position)
            position += len(block)
            meter.add(len(block))
        if digest.hexdigest() != part.sha256:
            raise Refused(self._changed(stored.name))

    def _write_file(self, name: str, part: Part, folder: Path) -> None:
        if part.how == "same":
            there = self.merged.folder / name
            content = there.read_bytes() if there.is_file() else b""
        else:
            content = b"".join(self.undo.blocks(f"file {name}", part.size))
        if hashlib.sha256(content).hexdigest() != part.sha256:
            raise Refused(self._changed(name))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    def _changed(self, what: str) -> str:
        return (
            f"'{what}' of '{self.merged.folder}' is not what the merge wrote, so the base can't be made from it: "
            f"if the base is still somewhere, name it with --base"
        )


def _changed_back(changes: Iterator[bytes], merged: StoredTensor, reader: int) -> Iterator[bytes]:
    position = 0
    for change in changes:
        yield xor(change, read_block(reader, merged, position, len(change)))
        position += len(change)
