"""The tensors of anything that a trainer writes, by name, and where each stands: nothing is read but headers.

What differs from writer to writer is where the bytes are, so that is all that the three kinds of `Stored` know.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.checkpoints.finished import CHECKPOINT, is_adapter
from lorakit.errors import Conflict, Incomplete, InvalidFile, NotFound, Refused
from lorakit.files.distributed import METADATA, ShardedTensor, read_distributed
from lorakit.files.folders import FileState, file_state, read_json
from lorakit.files.pickle_values import Stub
from lorakit.files.pieces import read_pieces
from lorakit.files.regular import denied
from lorakit.files.safetensors import StoredTensor, read_header
from lorakit.files.tensors import TORCH_NAMES, load_range, torch_dtype
from lorakit.files.torch_file import is_torch_file, read_torch_file
from lorakit.files.torch_tensors import StoredTorchTensor, TorchStorage, load_torch_range

if TYPE_CHECKING:
    import torch

Stored = StoredTensor | StoredTorchTensor | ShardedTensor

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl", ".lora")
LONGEST = 8  # elements of a list that are kept as a value
LONG = 100  # letters, by which two keys or elements of a set are told apart
DEEPEST = 100  # containers around a value, or folders around a file
SPREAD = 1 << 26  # bytes that a tensor may have beyond those that are stored of it, as an expanded one does
MAX_NAMES = 1_000_000
MAX_LETTERS = 1 << 28  # of all names, and of the values that are told
_WEIGHTS = re.compile(r"(model|adapter_model|pytorch_model|pytorch_model_fsdp|consolidated|lit_model)\b.*")
_UNFINISHED = "checkpoint-is-incomplete.txt"


@dataclass(frozen=True, slots=True)
class Tensors:
    """`groups` says of each name what it belongs to (`model`, `optimizer`; "" for weights alone), `values` holds the
    numbers and words beside the tensors by their dotted path.
    """

    path: Path
    stored: Mapping[str, Stored]
    groups: Mapping[str, str]
    values: Mapping[str, Any]
    states: Mapping[Path, FileState]
    notes: tuple[str, ...] = ()

    def ensure_unchanged(self) -> None:
        """Raises Conflict when a file was written again since it was opened."""
        for file, state in self.states.items():
            if not file.exists() or file_state(file) != state:
                raise Conflict(f"'{file}' was written again while it was read: start anew when its writer is done")


@dataclass(slots=True)
class _Gathered:
    path: Path
    stored: dict[str, Stored] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    states: dict[Path, FileState] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)  # names by the reason
    seen: dict[int, str] = field(default_factory=dict)  # the stubs of one structure, which may hold themselves
    taken: dict[str, int] = field(default_factory=dict)
    letters: int = 0

    def add(self, name: str, tensor: Stored, group: str) -> None:
        name = self._own(name)
        self.stored[name] = tensor
        self.groups[name] = group

    def add_value(self, name: str, value: Any) -> None:
        self.letters += _letters(value)
        self.values[self._own(name)] = _described(value)

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out.setdefault(reason, []).append(self._own(name))

    def _own(self, name: str) -> str:
        """`1` and "1" are two keys of a dict. Raises Refused when there are too many."""
        while (number := self.taken.get(name, 0) + 1) > 1:
            self.taken[name] = number
            name += "'" if number == 2 else f"'{number}"
        self.taken[name] = 1
        self.letters += len(name)
        if len(self.taken) > MAX_NAMES or self.letters > MAX_LETTERS:
            raise Refused(f"'{self.path}' holds more than {MAX_NAMES:,} tensors and values, or endless names: refused")
        return name

    def notes(self) -> tuple[str, ...]:
        return tuple(
            f"not compared of '{self.path}': {listed(names)} ({reason})" for reason, names in self.left_out.items()
        )


def listed(names: Sequence[str]) -> str:
    """The first ones, for a sentence."""
    return ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def open_tensors(path: Path) -> Tensors:
    """Open a safetensors or torch file, or a folder of them, of an adapter, a model or a checkpoint of any writer.

    Weights keep their names; of the other files of a folder (`optimizer.pt`) the names begin with the file's. What is
    left out is told in the notes: checkpoints and adapters in folders of their own, links to folders, unknown files.

    Raises:
        NotFound: there is no such path.
        Incomplete: a file that its index names is missing, or its writer says that it is still writing.
        InvalidFile, Refused: a file is damaged, or holds more than is read; or nothing here holds tensors.
    """
    found = _Gathered(path)
    try:
        if path.is_dir():
            _gather_folder(path, "", found)
        elif path.exists():
            _gather_file(path, "", found)
        else:
            raise NotFound(f"there is no folder or file '{path}'")
    except PermissionError as error:
        raise InvalidFile(denied(error.filename or path)) from None
    if not found.stored:
        why = "; ".join(("name a checkpoint, a model, or a safetensors or torch file", *found.notes()))
        raise Refused(f"'{path}' holds no tensors: {why}")
    return Tensors(path, found.stored, found.groups, found.values, found.states, found.notes())


def blocks(name: str, stored: Stored, count: int) -> Iterator[torch.Tensor]:
    """The elements in the order of their indices, `count` at a time, as they are stored; as bytes where torch has no
    such dtype.

    Raises:
        NotFound, InvalidFile: the file is gone, or became shorter.
    """
    if isinstance(stored, StoredTensor) and stored.dtype not in TORCH_NAMES:
        stored = replace(stored, dtype="U8", shape=(stored.nbytes,))
    total = math.prod(stored.shape)
    for begin in range(0, total, count):
        end = min(begin + count, total)
        if isinstance(stored, StoredTensor):
            yield load_range(stored, begin, end)
        elif isinstance(stored, StoredTorchTensor):
            yield load_torch_range(name, stored, begin, end)
        else:
            yield read_pieces(name, stored.dtype, stored.shape, stored.pieces, begin, end)


def nbytes(stored: Stored) -> int:
    """Of its elements."""
    if isinstance(stored, ShardedTensor):
        return math.prod(stored.shape) * torch_dtype(stored.dtype).itemsize
    return stored.nbytes


def _gather_folder(folder: Path, prefix: str, found: _Gathered) -> None:
    if (folder / _UNFINISHED).exists():
        raise Incomplete(f"'{folder}' is still being written: {_UNFINISHED} is there")
    if (folder / METADATA).exists():
        _gather_distributed(folder, prefix, found)
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    for name in names:
        if name.endswith(".index.json"):
            _check_index(folder / name)
    for name in names:
        path = folder / name
        if path.is_dir():
            if (reason := _apart(path, prefix)) is not None:
                found.leave_out(str(path.relative_to(found.path)), reason)
            else:
                _gather_folder(path, f"{prefix}{name}.", found)
        elif path.suffix in SUFFIXES:
            _gather_file(path, prefix if _WEIGHTS.fullmatch(name) else f"{prefix}{path.stem}.", found)


def _apart(folder: Path, prefix: str) -> str | None:
    """Why a folder in a checkpoint is no part of it."""
    if folder.is_symlink():
        return "a link to a folder"
    if CHECKPOINT.fullmatch(folder.name) or is_adapter(folder):
        return "a checkpoint or adapter of its own"
    return f"nested deeper than {DEEPEST}" if prefix.count(".") > DEEPEST else None


def _check_index(index: Path) -> None:
    weight_map = read_json(index).get("weight_map")
    for name in sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else ():
        if not os.path.isfile(index.parent / name):  # Path's own raises where a name is too long
            raise Incomplete(f"'{index.parent}' is incomplete: its index names {name}, and there is no such file")


def _gather_file(file: Path, prefix: str, found: _Gathered) -> None:
    if not file.is_file():
        raise InvalidFile(f"'{file}' is a pipe, a device or a link to nowhere, not a file")
    found.states[file] = file_state(file)
    if file.suffix == ".safetensors":
        tensors = read_header(file).tensors
        clash = not prefix and any(name in found.stored for name in tensors)
        for name, stored in tensors.items():
            found.add(f"{file.stem}.{name}" if clash else f"{prefix}{name}", stored, prefix[:-1])
    elif file.suffix in (".bin", ".pkl", ".lora") and not is_torch_file(file) and file.stat().st_size:
        found.leave_out(str(file.relative_to(found.path)) if file != found.path else file.name, "no torch file")
    else:
        structure = read_torch_file(file)
        clash = not prefix and isinstance(structure, dict) and any(str(name) in found.stored for name in structure)
        _gather_structure(structure, f"{file.stem}." if clash else prefix, found)


def _gather_structure(structure: Any, prefix: str, found: _Gathered) -> None:
    """`prefix` ends in a dot, or is empty."""
    found.seen = {}
    for key, value in _children(structure) or [("" if prefix else "tensor", structure)]:
        group = prefix[:-1] or (key if _children(value) else "")
        _gather_value(value, f"{prefix}{key}".removesuffix("."), group, found, 1)


def _gather_value(value: Any, name: str, group: str, found: _Gathered, depth: int) -> None:
    stored = _stored(value, name)
    if stored is not None:
        if isinstance(stored, StoredTorchTensor) and stored.nbytes > stored.storage.nbytes + SPREAD:
            found.leave_out(name, "of more elements than are stored")
        else:
            found.add(name if stored is value else name.removesuffix(".args.0"), stored, group)
        return
    children = _children(value)
    if not children:
        found.add_value(name, value)
        return
    if isinstance(value, Stub) and found.seen.setdefault(id(value), name) != name:
        found.add_value(name, f"the same as {found.seen[id(value)]}")
        return
    if depth > DEEPEST:
        found.leave_out(name, f"nested deeper than {DEEPEST}")
        return
    for key, child in children:
        _gather_value(child, f"{name}.{key}", group, found, depth + 1)


def _stored(value: Any, name: str) -> StoredTorchTensor | StoredTensor | None:
    """A tensor, or a storage as one; of a dtype that safetensors lacks as its bytes alone."""
    if isinstance(value, StoredTorchTensor):
        return value
    if isinstance(value, TorchStorage):
        count = value.nbytes // torch_dtype(value.dtype).itemsize
        return StoredTorchTensor(value.dtype, (count,), (1,), value, 0)
    match value:
        case Stub(name=kind, args=(TorchStorage() as storage, int() as count)) if kind.endswith("Storage"):
            return StoredTensor(name, storage.file, kind, (count,), storage.start, storage.end)
    return None


def _children(value: Any) -> list[tuple[str, Any]]:
    """What a container holds, by key; none where it is told as one value."""
    if isinstance(value, dict):
        return [(key if isinstance(key, str) else _name(key), child) for key, child in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        children = sorted(value, key=_name) if isinstance(value, set | frozenset) else value
        return [] if all(map(_is_plain, value)) else [(str(i), child) for i, child in enumerate(children)]
    return _held(value) if isinstance(value, Stub) else []


def _held(stub: Stub) -> list[tuple[str, Any]]:
    fields = stub.fields
    parts = {"args": stub.args, "state": None if fields else stub.state, "elements": stub.elements}
    held = [(key, part) for key, part in parts.items() if part]
    if not fields and not stub.entries and all(key == "args" and not _children(part) for key, part in held):
        return []
    return [
        *_children(fields),
        *((key if isinstance(key, str) else _name(key), child) for key, child in stub.entries),
        *held,
    ]


def _name(value: Any) -> str:
    """Of a key, or an element of a set, whatever it hashes to; of long ones the beginning."""
    if isinstance(value, Stub):
        plain = filter(_is_plain, (value.args or ())[:LONGEST])
        return f"{value.name}({', '.join(map(_name, plain))})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_name, value))})"
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(map(_name, value)))}}}"
    return repr(value[:LONG] if isinstance(value, str | bytes) else value)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool | complex)


def _described(value: Any) -> Any:
    """A value that is no tensor, short enough to be shown, and different where it differs."""
    if isinstance(value, Stub):
        return value.name if value.args is None else f"{value.name}({', '.join(map(repr, value.args))})"
    if isinstance(value, bytes | bytearray):
        return f"{len(value)} bytes, sha256 {hashlib.sha256(value).hexdigest()[:12]}"
    if isinstance(value, list | tuple | set | frozenset):
        return _listed(value)
    return repr(value) if isinstance(value, complex) else value


def _letters(value: Any) -> int:
    if isinstance(value, str | bytes | bytearray):
        return len(value)
    parts = value.args or () if isinstance(value, Stub) else value
    return 1 + sum(map(_letters, parts)) if isinstance(parts, list | tuple | set | frozenset) else 1


def _listed(values: Iterable[Any]) -> Any:
    parts = sorted(values, key=_name) if isinstance(values, set | frozenset) else list(values)
    if len(parts) <= LONGEST:
        return parts
    return f"{len(parts)} values, sha256 {hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"


def _gather_distributed(folder: Path, prefix: str, found: _Gathered) -> None:
    content = read_distributed(folder)
    for name, tensor in content.tensors.items():
        found.add(f"{prefix}{name}", tensor, _group(content.paths.get(name)) or prefix[:-1])
    for name, piece in content.objects.items():
        found.seen, value = {}, piece.read()
        _gather_value(value, f"{prefix}{name}", _group(content.paths.get(name)) or prefix[:-1], found, 1)
    pieces = chain(content.objects.values(), *(tensor.pieces for tensor in content.tensors.values()))
    for file in {folder / METADATA, *(piece.file for piece in pieces)}:
        found.states[file] = file_state(file)


def _group(path: Any) -> str:
    return str(path[0]) if isinstance(path, tuple) and len(path) > 1 else ""
