"""What `torch.save` wrote, without running the pickle in it: containers and numbers, tensors as byte ranges.

Two formats are read: the zip archive of torch 1.6 and later, and the row of pickles of before, which storages follow.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from lorakit.errors import InvalidFile, Refused
from lorakit.files.pickle_values import Call, Damaged
from lorakit.files.pickle_values import Stub as Stub
from lorakit.files.pickles import MAX_BYTES, read_pickle
from lorakit.files.pickles import read_pickle_with_stubs as read_pickle_with_stubs
from lorakit.files.regular import opened
from lorakit.files.safetensors import DTYPE_BITS
from lorakit.files.torch_tensors import DTYPES, TorchStorage, checked_tensor
from lorakit.files.torch_tensors import StoredTorchTensor as StoredTorchTensor
from lorakit.files.torch_zip import FILE, TorchZip, has_directory, open_torch_zip

ROW_OF_PICKLES = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, itself a pickle
_SIZE = struct.Struct("<q")


def is_torch_file(file: Path) -> bool:
    """Whether it begins as what torch.save writes; it may be cut short.

    Raises:
        InvalidFile: it may not be read.
    """
    if not file.is_file():
        return False
    with opened(file) as stream:
        head = stream.read(1030)
    return head.startswith(ROW_OF_PICKLES) or _begins_as_zip(head)


def _begins_as_zip(head: bytes) -> bool:
    length = int.from_bytes(head[26:28], "little")
    return head.startswith(FILE) and head[30 : 30 + length].endswith(b"/data.pkl")


def is_cut_short(file: Path) -> bool:
    """Whether its end is missing, as while torch.save is writing it. Costs two short reads, and more where it is in
    the format of before torch 1.6.
    """
    with opened(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if stream.read(len(FILE)) == FILE:
            return not has_directory(stream.fileno(), 0, size)
    try:
        read_torch_file(file)
    except InvalidFile:
        return True
    except Refused:
        pass
    return False


def read_torch_file(file: Path, start: int = 0, size: int | None = None) -> Any:
    """The structure of a file that torch.save wrote, or of one that begins at byte `start` of another file.

    Dicts, lists, numbers and text as they are, torch.Size as a tuple, a tensor as a StoredTorchTensor, a bare storage
    as a TorchStorage; everything else is a Stub, a torch.dtype among them. A parameter is the tensor that it holds.
    Where safetensors lacks the dtype, the storage is a Stub of its bytes, as a TorchStorage, and its count of elements.

    Raises:
        NotFound: there is no such file.
        InvalidFile: it is cut short, damaged, or not one that torch.save wrote.
        Refused: it holds more than a checkpoint would, was written on a big-endian machine, or is a program.
    """
    with opened(file) as stream:
        whole = os.fstat(stream.fileno()).st_size
        end = whole if size is None else start + size
        if not 0 <= start <= end <= whole:
            raise InvalidFile(f"'{file}' is cut short: {end} bytes are needed, and {whole} are there")
        head = os.pread(stream.fileno(), len(ROW_OF_PICKLES), start)
        if head.startswith(FILE):
            return _Zip(open_torch_zip(stream, str(file), start, end), file).structure()
        if head == ROW_OF_PICKLES:
            return _read_row(stream, file, start, end)
    raise InvalidFile(f"'{file}' is no file that torch.save wrote{_instead(head)}")


def _instead(head: bytes) -> str:
    if not head:
        return ": it is empty"
    if head.startswith(b"\x80"):
        return ", but a plain pickle: load it where you trust it, and save it again with torch.save or as safetensors"
    return ""


class _Zip:
    def __init__(self, archive: TorchZip, file: Path) -> None:
        self._archive = archive
        self._file = file
        self._storages: dict[str, TorchStorage] = {}

    def structure(self) -> Any:
        if "byteorder" in self._archive.members and self._record("byteorder", 16) != b"little":
            raise Refused(f"'{self._file}' was written on a big-endian machine: save it again on another one")
        program = self._record("data.pkl", MAX_BYTES)
        return read_pickle(io.BytesIO(program), len(program), str(self._file), CALLS, self._persistent)

    def _record(self, name: str, most: int) -> bytes:
        begin, end = self._archive.place(name)
        if end - begin > most:
            raise Refused(f"'{self._file}' has a {name} of {(end - begin) >> 20} MB: it is not read")
        return os.pread(self._archive.reader, end - begin, begin)

    def _persistent(self, identity: Any) -> Any:
        dtype, key, count = _storage_named(identity)
        if dtype is None:
            return Stub(identity[1].name, (self._storage(key, "U8"), count))
        storage = self._storages.get(key) or self._storage(key, dtype)
        if count * DTYPE_BITS[dtype] // 8 != storage.nbytes:
            raise InvalidFile(
                f"'{self._file}' is damaged: storage {key!r} has {storage.nbytes} bytes, not {count} numbers of {dtype}"
            )
        self._storages[key] = storage
        return storage if storage.dtype == dtype else replace(storage, dtype=dtype)

    def _storage(self, key: str, dtype: str) -> TorchStorage:
        return TorchStorage(self._file, key, dtype, *self._archive.place(f"data/{key}"))


def _storage_named(identity: Any) -> tuple[str | None, str, int]:
    """dtype, key and elements of the storage that a persistent id means; no dtype where safetensors has no name for it.

    Raises:
        Damaged: it means something else.
    """
    if not (isinstance(identity, tuple) and len(identity) in (5, 6) and identity[0] == "storage"):
        raise Damaged("a persistent id is none of torch.save's")
    _, kind, key, _, count, *view = identity
    if isinstance(key, int) and not isinstance(key, bool):  # as litgpt's and Lightning's incremental writers have it
        key = str(key)
    if not (isinstance(kind, Stub) and isinstance(key, str) and isinstance(count, int) and count >= 0):
        raise Damaged("a persistent id is none of torch.save's")
    if view not in ([], [None]):
        raise Damaged("a storage is a view of another one, as torch wrote them before 0.4")
    name = kind.name.rpartition(".")[2]
    return _STORAGES.get(name) if kind.name.startswith("torch.") else None, key, count


_STORAGES = {
    "FloatStorage": "F32", "DoubleStorage": "F64", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": "U8",
}  # fmt: skip


def _read_row(stream: BinaryIO, file: Path, start: int, end: int) -> Any:
    """Magic number, protocol, the machine's properties, the structure, the storages' keys: a pickle each; storages."""

    def pickled(persistent: Any = None) -> Any:
        return read_pickle(stream, end - stream.tell(), str(file), CALLS, persistent)

    stream.seek(start + len(ROW_OF_PICKLES))
    protocol, machine = pickled(), pickled()
    if protocol != 1001 or not isinstance(machine, dict):
        raise InvalidFile(f"'{file}' is no file that torch.save wrote: its protocol is {protocol!r}")
    if machine.get("little_endian") is not True:
        raise Refused(f"'{file}' was written on a big-endian machine: save it again on another one")
    structure_at = stream.tell()
    wanted: dict[str, tuple[str | None, int]] = {}
    pickled(partial(_noted, wanted))  # once for the storages, which stand behind
    storages = _places(stream, file, end, pickled(), wanted)
    stream.seek(structure_at)
    return pickled(partial(_found, storages))


def _noted(wanted: dict[str, tuple[str | None, int]], identity: Any) -> Stub:
    if (kind := _class_named(identity)) is not None:
        return kind
    dtype, key, count = _storage_named(identity)
    if wanted.setdefault(key, (dtype, count)) != (dtype, count):
        raise Damaged(f"storage {key!r} is of two kinds")
    return Stub("torch.UntypedStorage", ())


def _found(storages: Mapping[str, TorchStorage], identity: Any) -> Any:
    kind = _class_named(identity)
    return storages[_storage_named(identity)[1]] if kind is None else kind


def _class_named(identity: Any) -> Stub | None:
    """Of a module, beside whose class the old format keeps its source."""
    if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module" and isinstance(identity[1], Stub):
        return identity[1]
    return None


def _places(
    stream: BinaryIO, file: Path, end: int, keys: Any, wanted: Mapping[str, tuple[str | None, int]]
) -> dict[str, TorchStorage]:
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != wanted.keys():
        raise InvalidFile(f"'{file}' is damaged: its storages are not those that its tensors refer to")
    places = {}
    at = stream.tell()
    for key in keys:
        dtype, count = wanted[key]
        if dtype is None:
            raise Refused(f"'{file}' is of before torch 1.6, with a dtype that safetensors lacks: save it again")
        raw = os.pread(stream.fileno(), _SIZE.size, at)
        at += _SIZE.size + count * DTYPE_BITS[dtype] // 8
        if len(raw) < _SIZE.size or at > end:
            raise InvalidFile(f"'{file}' is cut short: {at} bytes are needed, and {end} are there")
        if _SIZE.unpack(raw)[0] != count:
            raise InvalidFile(f"'{file}' is damaged: storage {key!r} has another size than its tensors say")
        places[key] = TorchStorage(file, key, dtype, at - count * DTYPE_BITS[dtype] // 8, at)
    return places


# How torch rebuilds tensors. What is more than a view of numbers (quantised, sparse, nested, conjugate) stays a Stub.


def _tensor(
    name: str, storage: Any, offset: Any, shape: Any, stride: Any, *, dtype: str | None = None, flags: Any = None
) -> Any:
    if not isinstance(storage, TorchStorage) or (isinstance(flags, dict) and (flags.get("conj") or flags.get("neg"))):
        return Stub(name, (storage, offset, shape, stride, flags))
    return checked_tensor(dtype or storage.dtype, tuple(shape), tuple(stride), storage, offset)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> Any:
    return _tensor("torch._utils._rebuild_tensor", storage, offset, shape, stride)


def _rebuild_tensor_v2(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, flags: Any = None
) -> Any:
    return _tensor("torch._utils._rebuild_tensor_v2", storage, offset, shape, stride, flags=flags)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, flags: Any = None
) -> Any:
    known = DTYPES.get(dtype.name.removeprefix("torch.")) if isinstance(dtype, Stub) else None
    if known is None:
        return Stub("torch._utils._rebuild_tensor_v3", (storage, offset, shape, stride, dtype))
    return _tensor("torch._utils._rebuild_tensor_v3", storage, offset, shape, stride, dtype=known, flags=flags)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


_REBUILDS: dict[str, Call] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}
_PLAIN_TENSORS = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")


def _rebuild_from_type(rebuild: Any, kind: Any, args: Any, state: Any = None) -> Any:
    """A tensor with attributes; one of another class stays a Stub."""
    if isinstance(rebuild, Stub) and isinstance(kind, Stub) and isinstance(args, tuple) and kind.name in _PLAIN_TENSORS:
        call = _REBUILDS.get(rebuild.name)
        if call is not None:
            return call(*args)
    return Stub("torch._tensor._rebuild_from_type_v2", (rebuild, kind, args, state))


CALLS: dict[str, Call] = {
    **_REBUILDS,
    "torch._tensor._rebuild_from_type": _rebuild_from_type,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
}
