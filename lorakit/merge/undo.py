"""What is needed to make the base from the merged model: W XOR W' of each changed tensor, compressed, in one file.

The file is laid out as safetensors, but not named so, for vLLM loads every `*.safetensors` of a folder. Each entry is
a row of frames: 4 bytes N, little endian, and N bytes of zlib that hold a block of at most `BLOCK` bytes, its bytes
sorted by their place in an element: a small change leaves the first ones alone, and zeros take no space.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.errors import InvalidFile
from lorakit.files.folders import copy_range, write_all
from lorakit.files.safetensors import DTYPE_BITS, Header, StoredTensor, planned_header, read_header
from lorakit.files.tensors import read_into
from lorakit.merge.base import INDEX, BaseModel, read_base
from lorakit.merge.companions import CONFIG, plan_companions
from lorakit.merge.execute import Sources, worker_count
from lorakit.merge.plan import MergePlan

UNDO = "lorakit.undo"
FORMAT = "lorakit undo 1"
BLOCK = 1 << 22  # bytes
MOST_BLOCK = 1 << 26  # that a reader takes into memory
_LEVEL = 1


@dataclass(frozen=True, slots=True)
class Part:
    """How a tensor or a small file of the base is made: `same` as in the merged model, `xor` with it, or `stored`."""

    how: str
    sha256: str | None = None
    size: int = 0  # of a file


@dataclass(frozen=True, slots=True)
class UndoShard:
    """A shard of the base: the bytes of its head and of all of it, and how each tensor is made."""

    head: int
    size: int
    parts: Mapping[str, Part]


@dataclass(frozen=True, slots=True)
class Undo:
    """An opened file; `shards` and `files` are the base's, by name. `block`: how much is in a frame, but the last."""

    header: Header
    identity: str
    block: int
    shards: Mapping[str, UndoShard]
    files: Mapping[str, Part]

    def blocks(self, entry: str, nbytes: int, itemsize: int = 1) -> Iterator[bytes]:
        """The blocks of one entry, decompressed; they add up to `nbytes`.

        Raises:
            InvalidFile: they don't.
        """
        stored = self.header.tensors.get(entry)
        if stored is None:
            if nbytes:
                raise InvalidFile(f"'{self.header.file}' has no '{entry}'")
            return
        with stored.file.open("rb") as stream:
            position = stored.start
            for first in range(0, nbytes, self.block):
                count = min(self.block, nbytes - first)
                size = int.from_bytes(os.pread(stream.fileno(), 4, position), "little")
                frame = os.pread(stream.fileno(), min(size, stored.end - position - 4), position + 4)
                position += 4 + size
                yield _joined(self._decompressed(frame, count, entry), itemsize)
        if position != stored.end:
            raise InvalidFile(f"'{entry}' in '{self.header.file}' is not as long as it should be")

    def _decompressed(self, frame: bytes, count: int, entry: str) -> bytes:
        decompressor = zlib.decompressobj()
        try:
            block = decompressor.decompress(frame, count)
        except zlib.error as error:
            raise InvalidFile(f"'{entry}' in '{self.header.file}' can't be decompressed: {error}") from None
        if len(block) != count or decompressor.unconsumed_tail or decompressor.unused_data:
            raise InvalidFile(f"'{entry}' in '{self.header.file}' is not as long as it should be")
        return block


def read_undo(file: Path) -> Undo:
    """Open what `write_undo` wrote.

    Raises:
        InvalidFile: it is no such file, or is cut short.
    """
    header = read_header(file)
    if header.metadata.get("format") != FORMAT:
        raise InvalidFile(f"'{file}' is not of the format '{FORMAT}': use the lorakit that wrote it")
    try:
        record = json.loads(header.metadata["record"])
        shards = {
            _inside(name): UndoShard(
                int(shard["head"]), int(shard["size"]), {one: Part(*part) for one, part in shard["parts"].items()}
            )
            for name, shard in record["shards"].items()
        }
        files = {_inside(name): Part(*part) for name, part in record["files"].items()}
        block = int(record["block"])
        if not 0 < block <= MOST_BLOCK or block % 8:
            raise ValueError(f"frames of {block} bytes")
        return Undo(header, str(record["identity"]), block, shards, files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidFile(f"'{file}' can't be understood: {error!r}") from None


def _inside(name: str) -> str:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name!r} is no file inside the folder")
    return name


def write_undo(plan: MergePlan, folder: Path) -> int:
    """Write the file for a merge whose result is in `folder`, and say how large it is."""
    base = plan.base
    if base.remote is not None:
        for shard in base.shards:
            base.remote.fetch(shard.file)
    writer = _Writer(folder / UNDO)
    try:
        shards = _write_tensors(plan, read_base(folder), writer)
        files = _write_files(base, folder, writer)
        return writer.finish({"identity": base.identity, "block": BLOCK, "shards": shards, "files": files})
    finally:
        writer.close()


def beside_weights(base: Path) -> list[str]:
    """The small files of a base that come along."""
    index = [INDEX] if (base / INDEX).is_file() else []
    return [CONFIG, *index, *(companion.name for companion in plan_companions(base, ()))]


class _Writer:
    """Entries one after another into a scratch file, then behind a header that tells where they are."""

    def __init__(self, file: Path) -> None:
        self._target = file
        self._scratch = file.with_name(f"{file.name}.part")
        self._file = os.open(self._scratch, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._sizes: dict[str, int] = {}
        self._position = 0

    def add(self, entry: str, frame: bytes) -> None:
        block = len(frame).to_bytes(4, "little") + frame
        write_all(self._file, block, self._position)
        self._position += len(block)
        self._sizes[entry] = self._sizes.get(entry, 0) + len(block)

    def finish(self, record: Mapping[str, Any]) -> int:
        plan = [(entry, "U8", (size,)) for entry, size in self._sizes.items()]
        head, header = planned_header(self._target, plan, {"format": FORMAT, "record": json.dumps(record)})
        with self._target.open("wb") as stream:
            write_all(stream.fileno(), head, 0)
            copy_range(self._file, stream.fileno(), 0, len(head), self._position)
        return header.size

    def close(self) -> None:
        os.close(self._file)
        self._scratch.unlink()


def _write_tensors(plan: MergePlan, merged: BaseModel, writer: _Writer) -> dict[str, Any]:
    copied = {copy.target.name: copy.source for shard in plan.shards for copy in shard.copied}
    shards: dict[str, Any] = {}
    sources = Sources()
    try:
        with ThreadPoolExecutor(worker_count(), thread_name_prefix="undo") as pool:
            for shard in plan.base.shards:
                head = StoredTensor("head", shard.file, "U8", (shard.data_start,), 0, shard.data_start)
                _write_blocks(f"head {shard.file.name}", _in_order(pool, _jobs(head, None, sources)), writer)
                parts: dict[str, list[str | None]] = {}
                for name, stored in shard.tensors.items():
                    if copied.get(name) == stored:
                        parts[name] = ["same", None]
                        continue
                    now = merged.tensors.get(name)
                    if now is not None and (now.dtype, now.shape) != (stored.dtype, stored.shape):
                        now = None
                    digest = _write_blocks(f"tensor {name}", _in_order(pool, _jobs(stored, now, sources)), writer)
                    parts[name] = ["stored" if now is None else "xor", digest]
                shards[shard.file.name] = {"head": shard.data_start, "size": shard.size, "parts": parts}
    finally:
        sources.close()
    return shards


def _write_blocks(entry: str, blocks: Iterator[tuple[bytes, bytes]], writer: _Writer) -> str:
    """Write the frames, and give the SHA-256 of what they stand for."""
    digest = hashlib.sha256()
    for block, frame in blocks:
        digest.update(block)
        writer.add(entry, frame)
    return digest.hexdigest()


def _write_files(base: BaseModel, folder: Path, writer: _Writer) -> dict[str, list[str | int]]:
    files: dict[str, list[str | int]] = {}
    for name in beside_weights(base.folder):
        content = (base.folder / name).read_bytes()
        there = folder / name
        same = there.is_file() and there.stat().st_size == len(content) and there.read_bytes() == content
        for first in range(0, 0 if same else len(content), BLOCK):
            writer.add(f"file {name}", zlib.compress(content[first : first + BLOCK], _LEVEL))
        files[name] = ["same" if same else "stored", hashlib.sha256(content).hexdigest(), len(content)]
    return files


_Job = Callable[[], tuple[bytes, bytes]]


def _jobs(stored: StoredTensor, merged: StoredTensor | None, sources: Sources) -> Iterator[_Job]:
    """One for each block of a tensor: its bytes, and the frame that they are made from."""
    reader, other = sources.of(stored), -1 if merged is None else sources.of(merged)
    itemsize = item_bytes(stored)

    def job(first: int) -> tuple[bytes, bytes]:
        count = min(BLOCK, stored.nbytes - first)
        block = read_block(reader, stored, first, count)
        change = block if merged is None else xor(block, read_block(other, merged, first, count))
        return block, zlib.compress(_sorted(change, itemsize), _LEVEL)

    for first in range(0, stored.nbytes, BLOCK):
        yield lambda first=first: job(first)  # type: ignore[misc]


def _in_order(pool: ThreadPoolExecutor, jobs: Iterator[_Job]) -> Iterator[tuple[bytes, bytes]]:
    """The results of the jobs, a few of them done ahead."""
    ahead: deque[Future[tuple[bytes, bytes]]] = deque()
    for job in jobs:
        ahead.append(pool.submit(job))
        if len(ahead) > 2 * worker_count():
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def item_bytes(stored: StoredTensor) -> int:
    return max(1, DTYPE_BITS[stored.dtype] // 8)


def read_block(reader: int, stored: StoredTensor, first: int, count: int) -> bytes:
    """`count` bytes, from `first` on, of a tensor."""
    buffer = bytearray(count)
    read_into(reader, memoryview(buffer), stored.start + first, stored)
    return bytes(buffer)


def xor(one: bytes, other: bytes) -> bytes:
    return np.bitwise_xor(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8)).tobytes()


def _sorted(block: bytes, itemsize: int) -> bytes:
    """All first bytes of the elements, then all second ones, and so on."""
    return block if itemsize == 1 else np.frombuffer(block, np.uint8).reshape(-1, itemsize).T.tobytes()


def _joined(block: bytes, itemsize: int) -> bytes:
    return block if itemsize == 1 else np.frombuffer(block, np.uint8).reshape(itemsize, -1).T.tobytes()
