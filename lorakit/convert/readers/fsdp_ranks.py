"""A file of torch.save a rank, each with that rank's parts of the model as DTensors: verl's
`model_world_size_2_rank_0.pt`, and whatever else is named by its rank.

What a rank holds follows from its place in the device mesh and the placement along each of the mesh's dimensions
(torch/distributed/tensor/placement_types.py); both are in the pickle, of which nothing is run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from lorakit.checkpoints.whole import TORCH
from lorakit.checkpoints.writers.fsdp_ranks import ranked
from lorakit.checkpoints.writers.torch_keys import MODEL
from lorakit.convert.readers.pieced import PiecedTensor, with_config
from lorakit.convert.readers.torch_files import NO_TENSORS, NO_WEIGHTS, without_ema
from lorakit.convert.source import Source, SourceTensor, TorchTensor
from lorakit.errors import Incomplete, InvalidFile, Refused
from lorakit.files.distributed import MAX_PIECES
from lorakit.files.folders import file_state
from lorakit.files.pickle_values import Stub
from lorakit.files.pieces import StoredPiece, cover
from lorakit.files.torch_file import read_torch_file
from lorakit.files.torch_tensors import StoredTorchTensor, is_countable, load_torch_range, part_of

MAX_FACTOR = 1 << 16  # of a _StridedShard
COMPARED = 1 << 12  # elements of what several ranks hold alike, from its beginning
_DTENSOR = re.compile(r"torch\.distributed\.(_tensor|tensor)(\.api|\._api)?\.DTensor")  # its module moved

Run = tuple[int, int]  # where it starts, and how long it is


@dataclass(frozen=True, slots=True)
class Part:
    """A rank's part of a tensor: `placements` and `coordinates` by the dimensions of the mesh."""

    file: Path
    local: StoredTorchTensor
    shape: tuple[int, ...]
    placements: tuple[Stub, ...]
    coordinates: tuple[int, ...]


def read(path: Path, *, weights: str = "model") -> Source:
    """Open a folder of such files.

    Raises:
        UsageError: a moving average of the weights is asked for.
        Incomplete: a rank's file is not there.
        InvalidFile: a file is damaged, or the ranks' parts contradict each other.
        Refused: parts are placed as partial sums, or in a way that isn't known.
    """
    without_ema(path, weights)
    files = _files(path)
    states = {file: _state(file) for file in files}
    first, *others = states
    for other in others:
        if states[other].keys() != states[first].keys():
            odd = sorted(map(str, states[other].keys() ^ states[first].keys()))[0]
            raise InvalidFile(
                f"'{odd}' is in one of {first.name} and {other.name} of '{path}' alone: they are of two saves"
            )
    tensors: dict[str, SourceTensor] = {}
    no_tensors = []
    for name in states[first]:
        held = {file: state[name] for file, state in states.items()}
        if isinstance(held[first], StoredTorchTensor | Stub):
            tensors[str(name)] = _tensor(path, str(name), held)
        else:
            no_tensors.append(str(name))
    rest = tuple(sorted(file.name for file in path.iterdir() if file.suffix in TORCH and file not in states))
    left_out = {NO_TENSORS: tuple(no_tensors), NO_WEIGHTS: rest}
    beside = with_config(path / "huggingface", path, path.parent)
    return Source(
        path, "fsdp", tensors, {reason: names for reason, names in left_out.items() if names}, beside,
        {file: file_state(file) for file in files},
    )  # fmt: skip


def _files(folder: Path) -> list[Path]:
    """Of the model, by rank."""
    found = ranked(file.name for file in folder.iterdir() if file.is_file())
    if found is None:
        raise Refused(
            f"'{folder}' has no files of one model that are named by their rank (model_world_size_2_rank_0.pt): name "
            f"the folder that has, and move those of other runs out of it"
        )
    if found.missing:
        raise Incomplete(f"'{folder}' lacks {found.missing[0]}, one rank's part of the model: copy it there")
    return [folder / name for name in found.names]


def _state(file: Path) -> Mapping[Any, Any]:
    found = read_torch_file(file)
    structure = found if isinstance(found, dict) else {}
    by_name = any(isinstance(value, Stub | StoredTorchTensor) for value in structure.values())
    state = structure if by_name else next((structure[key] for key in MODEL if key in structure), None)
    if not isinstance(state, dict):
        raise InvalidFile(f"'{file}' holds no tensors by name, as a rank's part of a model does")
    return state


def _tensor(path: Path, name: str, held: Mapping[Path, Any]) -> SourceTensor:
    first = next(iter(held.values()))
    if all(isinstance(value, StoredTorchTensor) for value in held.values()):
        for file, value in held.items():
            _ensure_alike(name, first, value, file)
        return TorchTensor(name, first)
    parts = [_part(file, name, value) for file, value in held.items()]
    if len({(part.shape, part.local.dtype, len(part.coordinates)) for part in parts}) != 1:
        raise InvalidFile(f"'{path}': the ranks do not agree of which shape and dtype '{name}' is")
    pieces = _pieces(name, parts)
    shape, dtype = parts[0].shape, parts[0].local.dtype
    if not cover(pieces, shape, str(path)):
        raise InvalidFile(f"'{path}': what the ranks hold of '{name}' is not the whole of it, each part once")
    return PiecedTensor(name, dtype, shape, pieces)


def _part(file: Path, name: str, value: Any) -> Part:
    """A DTensor: the stub of a call that would have made one, with its attributes as the last argument.

    Raises:
        Refused: it is another thing.
        InvalidFile: it lacks what a DTensor has.
    """
    match value:
        case Stub(args=(Stub(), Stub(name=kind), _, state)) if _DTENSOR.fullmatch(kind):
            fields = Stub("", (), state).fields
        case _:
            what = getattr(value, "name", "plain tensor here, and none on another rank")
            raise Refused(f"'{file}': '{name}' is a {what}, and DTensors are read: save it with FSDP2, or with DCP")
    spec = _fields(fields.get("_spec"))
    mesh, meta, local = _fields(spec.get("mesh")), spec.get("tensor_meta"), fields.get("_local_tensor")
    placements, coordinates = spec.get("placements"), mesh.get("_coordinate_on_dim")
    shape = meta.args[0] if isinstance(meta, Stub) and meta.args else _fields(meta).get("shape")
    if not (
        isinstance(local, StoredTorchTensor)
        and isinstance(placements, tuple)
        and isinstance(coordinates, tuple | list)
        and len(placements) == len(coordinates)
        and all(isinstance(placement, Stub) for placement in placements)
        and _are_counts(coordinates)
        and isinstance(shape, tuple)
        and _are_counts(shape)
        and is_countable(shape)
        and len(shape) == len(local.shape)
    ):
        raise InvalidFile(f"'{file}': '{name}' does not say which part of the whole it is, as torch 2.4 and later do")
    return Part(file, local, shape, placements, tuple(coordinates))


def _fields(value: Any) -> Mapping[str, Any]:
    return value.fields if isinstance(value, Stub) else {}


def _are_counts(numbers: Sequence[Any]) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


def _pieces(name: str, parts: Sequence[Part]) -> list[StoredPiece]:
    """Of all ranks, each place once: of what several hold alike, the first's."""
    sizes = tuple(1 + max(part.coordinates[axis] for part in parts) for axis in range(len(parts[0].coordinates)))
    pieces: dict[tuple[int, ...], StoredPiece] = {}
    for part in parts:
        for piece in _placed(name, part, sizes):
            same = pieces.setdefault((*piece.offsets, *piece.shape), piece)
            if same is not piece:
                _ensure_alike(name, same.tensor, piece.tensor, part.file)
    return list(pieces.values())


def _placed(name: str, part: Part, sizes: tuple[int, ...]) -> Iterator[StoredPiece]:
    """What is one range along each axis, with its place in the whole."""
    runs = _runs(name, part, sizes)
    if tuple(sum(count for _, count in along) for along in runs) != part.local.shape:
        raise InvalidFile(
            f"'{part.file}': the part of '{name}' is {list(part.local.shape)}, and its place in the mesh says otherwise"
        )
    if math.prod(map(len, runs)) > MAX_PIECES:
        raise Refused(f"'{part.file}': '{name}' is cut into more than {MAX_PIECES:,} pieces a rank: save it with DCP")
    for box in product(*(list(_with_places(along)) for along in runs)):
        local = part_of(part.local, tuple(place for place, _ in box), tuple(count for _, (_, count) in box))
        yield StoredPiece(tuple(start for _, (start, _) in box), local)


def _runs(name: str, part: Part, sizes: tuple[int, ...]) -> list[list[Run]]:
    """Along each axis of the whole what the part has of it; the dimensions of the mesh cut it in their order."""
    runs: list[list[Run]] = [[(0, size)] for size in part.shape]
    for placement, ranks, rank in zip(part.placements, sizes, part.coordinates, strict=True):
        kind = placement.name.rpartition(".")[2]
        if kind == "Replicate":
            continue
        axis: Any = placement.fields.get("dim")
        factor: Any = placement.fields.get("split_factor", 1)
        known = kind in ("Shard", "_StridedShard") and _are_counts((axis, factor))
        if not known or axis >= len(runs) or not 0 < factor <= MAX_FACTOR:
            raise Refused(f"'{part.file}': '{name}' is placed as {kind}, and Shard and Replicate are read: use DCP")
        if factor > 1 and sum(count for _, count in runs[axis]) % (factor * ranks):
            raise Refused(f"'{part.file}': '{name}' is cut unevenly by a {kind}: save it with DCP")
        splits = [_chunk(runs[axis], factor, split) for split in range(factor)]
        runs[axis] = [run for split in splits for run in _chunk(split, ranks, rank)]
    return runs


def _chunk(runs: Sequence[Run], ranks: int, rank: int) -> list[Run]:
    """The share of one of several ranks, as torch.chunk cuts it: the last ones may get less, or nothing."""
    total = sum(count for _, count in runs)
    share = -(-total // ranks)
    begin, end = min(total, rank * share), min(total, (rank + 1) * share)
    found, at = [], 0
    for start, count in runs:
        low, high = max(begin, at), min(end, at + count)
        if low < high:
            found.append((start + low - at, high - low))
        at += count
    return found or [(runs[0][0] if runs else 0, 0)]


def _with_places(runs: Sequence[Run]) -> Iterator[tuple[int, Run]]:
    """Each with where it begins in the rank's own part."""
    at = 0
    for run in runs:
        yield at, run
        at += run[1]


def _ensure_alike(name: str, one: StoredTorchTensor, other: StoredTorchTensor, file: Path) -> None:
    """Raises Refused when two ranks differ in what both should hold, as far as their first elements tell."""
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    if alike and one is not other and one.nbytes:
        count = min(COMPARED, one.nbytes // one.itemsize)
        alike = bool((_bytes(name, one, count) == _bytes(name, other, count)).all())
    if not alike:
        raise Refused(f"'{file}': '{name}' differs from rank 0's, and nothing says how they go together: use DCP")


def _bytes(name: str, stored: StoredTorchTensor, count: int) -> Any:
    import torch

    return load_torch_range(name, stored, 0, count).view(torch.uint8)
