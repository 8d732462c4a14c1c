"""A folder that torch.distributed.checkpoint wrote: whole tensors as the pieces that each rank saved of them.

`.metadata` says of each name its dtype and shape, and in which file at which byte each piece stands; a piece is a torch
file of its own (torch/distributed/checkpoint/metadata.py and filesystem.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import InvalidFile, NotFound, Refused
from lorakit.files.pickle_values import Stub
from lorakit.files.pickles import read_pickle_with_stubs
from lorakit.files.safetensors import DTYPE_BITS
from lorakit.files.tensors import torch_dtype
from lorakit.files.torch_file import read_torch_file
from lorakit.files.torch_tensors import DTYPES, StoredTorchTensor, is_countable, load_torch_tensor

if TYPE_CHECKING:
    import torch

METADATA = ".metadata"
MAX_PIECES = 1 << 14  # of one tensor
MAX_COMPARISONS = 100_000  # of pieces with one another, where they form no grid


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


def load_sharded(name: str, tensor: ShardedTensor) -> torch.Tensor:
    """Put a whole tensor together in memory.

    Raises:
        NotFound, InvalidFile, Refused: a piece is gone, or not what the metadata says.
    """
    import torch

    try:
        whole = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
    except RuntimeError:
        raise Refused(f"'{name}' of shape {list(tensor.shape)} needs more memory than there is") from None
    for piece in tensor.pieces:
        stored = piece.read()
        if not isinstance(stored, StoredTorchTensor) or (stored.dtype, stored.shape) != (tensor.dtype, piece.shape):
            raise InvalidFile(f"'{piece.file}': what stands at byte {piece.start} is not the piece of '{name}'")
        ranges = zip(piece.offsets, piece.shape, strict=True)
        whole[tuple(slice(offset, offset + size) for offset, size in ranges)] = load_torch_tensor(name, stored)
    return whole


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
    if not _cover(placed, shape):
        raise InvalidFile(f"'{file}' is damaged: the pieces of '{name}' are not the whole of it, each part once")
    return ShardedTensor(dtype, shape, placed)


def _dtype_of(properties: Stub) -> Any:
    state = properties.state
    return state[0] if isinstance(state, tuple) and state else properties.fields.get("dtype")


def _cover(pieces: Sequence[Piece], shape: tuple[int, ...]) -> bool:
    """Whether they are the whole, each part once: all inside, as many elements as it has, and no two overlap.

    Raises:
        Refused: that would take too long to find out.
    """
    inside = all(
        len(piece.offsets) == len(piece.shape) == len(shape)
        and all(offset + size <= whole for offset, size, whole in zip(piece.offsets, piece.shape, shape, strict=True))
        for piece in pieces
    )
    if not inside or sum(math.prod(piece.shape) for piece in pieces) != math.prod(shape):
        return False
    placed = sorted((piece for piece in pieces if math.prod(piece.shape)), key=lambda piece: piece.offsets)
    if not shape or _is_grid(placed):
        return True
    compared = 0
    for place, piece in enumerate(placed):
        for other in islice(placed, place + 1, None):
            if other.offsets[0] >= piece.offsets[0] + piece.shape[0]:
                break
            compared += 1
            if compared > MAX_COMPARISONS:
                raise Refused(f"'{piece.file.parent}': {len(placed):,} pieces of one tensor form no grid: not read")
            if _overlap(piece, other):
                return False
    return True


def _is_grid(placed: Sequence[Piece]) -> bool:
    """Whether along each axis the pieces share the same cuts; then two overlap only where they begin alike."""
    for axis in range(len(placed[0].shape) if placed else 0):
        ranges = sorted({(piece.offsets[axis], piece.offsets[axis] + piece.shape[axis]) for piece in placed})
        if any(start < end for (_, end), (start, _) in pairwise(ranges)):
            return False
    return len({piece.offsets for piece in placed}) == len(placed)


def _overlap(one: Piece, other: Piece) -> bool:
    return all(
        max(one.offsets[axis], other.offsets[axis])
        < min(one.offsets[axis] + one.shape[axis], other.offsets[axis] + other.shape[axis])
        for axis in range(len(one.shape))
    )


def _are_counts(numbers: Any) -> bool:
    return isinstance(numbers, tuple) and all(type(number) is int and number >= 0 for number in numbers)
