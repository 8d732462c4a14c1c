"""A folder that torch.distributed.checkpoint wrote: whole tensors as the pieces that each rank saved of them.

`.metadata` says of each name its dtype and shape, and in which file at which byte each piece stands; a piece is a torch
file of its own (torch/distributed/checkpoint/metadata.py and filesystem.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import InvalidFile, NotFound, Refused
from lorakit.files.pickle_values import Stub
from lorakit.files.pickles import read_pickle_with_stubs
from lorakit.files.pieces import cover
from lorakit.files.safetensors import DTYPE_BITS
from lorakit.files.torch_file import read_torch_file
from lorakit.files.torch_tensors import DTYPES, StoredTorchTensor, is_countable

METADATA = ".metadata"
MAX_PIECES = 1 << 14  # of one tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """`nbytes` of `file` from `start` are a torch file, which holds what begins at `offsets` of the whole tensor."""

    file: Path
    start: int
    nbytes: int
    offsets: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()

    def read(self) -> Any:
        """As `read_torch_file`."""
        return read_torch_file(self.file, self.start, self.nbytes)

    def stored(self, name: str, dtype: str) -> StoredTorchTensor:
        """Where the piece of that tensor stands in the file.

        Raises:
            NotFound, InvalidFile: its file is gone, or holds another thing there.
        """
        found = self.read()
        if not isinstance(found, StoredTorchTensor) or (found.dtype, found.shape) != (dtype, self.shape):
            raise InvalidFile(f"'{self.file}': what stands at byte {self.start} is not the piece of '{name}'")
        return found


@dataclass(frozen=True, slots=True)
class ShardedTensor:
    """Its pieces cover it once; `dtype` as safetensors names it."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Distributed:
    """`objects` are the values that aren't tensors; `paths` where each name stands in the state that was saved."""

    folder: Path
    tensors: Mapping[str, ShardedTensor]
    objects: Mapping[str, Piece]
    paths: Mapping[str, tuple[Any, ...]]


def read_distributed(folder: Path) -> Distributed:
    """What the metadata of a folder says; of the files that it names their presence and size are looked at.

    Raises:
        NotFound: it has no `.metadata`, which is written last.
        InvalidFile: the metadata is damaged, names files elsewhere or missing, or its pieces don't cover a tensor once.
        Refused: tensors are of a dtype that safetensors doesn't have, or were packed.
    """
    file = folder / METADATA
    metadata = read_pickle_with_stubs(file)
    if not isinstance(metadata, Stub) or not metadata.name.endswith(".Metadata"):
        raise InvalidFile(f"'{file}' is no metadata of torch.distributed.checkpoint")
    described = _dict(metadata, "state_dict_metadata", file)
    places = _dict(metadata, "storage_data", file)
    paths = metadata.fields.get("planner_data")
    found: dict[str, list[Piece]] = {}
    for index, place in places.items():
        if not (isinstance(index, Stub) and isinstance(place, Stub)):
            raise InvalidFile(f"'{file}' is damaged: it says nowhere what stands where")
        found.setdefault(str(index.fields.get("fqn")), []).append(_piece(folder, index.fields, place.fields))
    tensors, objects = {}, {}
    for name, entry in described.items():
        if not (isinstance(name, str) and isinstance(entry, Stub)) or name not in found:
            raise InvalidFile(f"'{file}' is damaged: nothing says where {name!r} stands")
        if entry.name.endswith(".TensorStorageMetadata"):
            tensors[name] = _tensor(file, name, entry.fields, found[name])
        else:
            objects[name] = found[name][0]
    return Distributed(folder, tensors, objects, paths if isinstance(paths, dict) else {})


def _dict(metadata: Stub, name: str, file: Path) -> Mapping[Any, Any]:
    found = metadata.fields.get(name)
    if not isinstance(found, dict):
        raise InvalidFile(f"'{file}' is damaged: it has no {name}")
    return found


def _piece(folder: Path, index: Mapping[str, Any], place: Mapping[str, Any]) -> Piece:
    name, start, nbytes = place.get("relative_path"), place.get("offset"), place.get("length")
    offsets = index.get("offset") or ()
    if not (isinstance(name, str) and _are_counts((start, nbytes)) and _are_counts(offsets)):
        raise InvalidFile(f"'{folder / METADATA}' is damaged: the place of '{index.get('fqn')}' can't be read")
    if Path(name).name != name:
        raise InvalidFile(f"'{folder / METADATA}' names {name!r}, which is no file beside it")
    if place.get("transform_descriptors"):
        raise Refused(f"'{folder}' was packed as it was written: save it without extensions")
    file = folder / name
    if not os.path.isfile(file):  # Path's own raises where a name is too long
        raise NotFound(f"'{folder}' lacks {name}, which its metadata names")
    piece = Piece(file, int(start or 0), int(nbytes or 0), tuple(offsets))
    if piece.start + piece.nbytes > os.path.getsize(file):
        raise InvalidFile(f"'{file}' is cut short: {piece.start + piece.nbytes} bytes are needed")
    return piece


def _tensor(file: Path, name: str, entry: Mapping[str, Any], pieces: Sequence[Piece]) -> ShardedTensor:
    properties: Any = entry.get("properties")
    shape: Any = entry.get("size")
    kind = _dtype_of(properties) if isinstance(properties, Stub) else None
    dtype = DTYPES.get(kind.name.removeprefix("torch.")) if isinstance(kind, Stub) else None
    if dtype is None:
        raise Refused(f"'{file}': '{name}' is of the dtype {getattr(kind, 'name', kind)}: save it as another one")
    chunks: Any = entry.get("chunks")
    if not isinstance(chunks, list) or max(len(chunks), len(pieces)) > MAX_PIECES:
        raise Refused(f"'{file}': '{name}' has no list of its pieces, or more than {MAX_PIECES:,}")
    sizes = {}
    for chunk in chunks:
        fields = chunk.fields if isinstance(chunk, Stub) else {}
        if not (_are_counts(fields.get("offsets")) and _are_counts(fields.get("sizes"))):
            raise InvalidFile(f"'{file}' is damaged: a piece of '{name}' has no size")
        sizes[fields["offsets"]] = fields["sizes"]
    if not _are_counts(shape) or not is_countable(shape) or any(piece.offsets not in sizes for piece in pieces):
        raise InvalidFile(f"'{file}' is damaged: '{name}' has no shape, or pieces that it does not name")
    placed = tuple(
        Piece(piece.file, piece.start, piece.nbytes, piece.offsets, sizes[piece.offsets]) for piece in pieces
    )
    if any(math.prod(piece.shape) * DTYPE_BITS[dtype] // 8 > piece.nbytes for piece in placed):
        raise InvalidFile(f"'{file}' is damaged: a piece of '{name}' has more numbers than bytes")
    if not cover(placed, shape, str(file)):
        raise InvalidFile(f"'{file}' is damaged: the pieces of '{name}' are not the whole of it, each part once")
    return ShardedTensor(dtype, shape, placed)


def _dtype_of(properties: Stub) -> Any:
    state = properties.state
    return state[0] if isinstance(state, tuple) and state else properties.fields.get("dtype")


def _are_counts(numbers: Any) -> bool:
    return isinstance(numbers, tuple) and all(type(number) is int and number >= 0 for number in numbers)
