"""Folders of torch.distributed.checkpoint: whole tensors from their pieces, and metadata that lies."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from lorakit.errors import InvalidFile, NotFound, Refused
from lorakit.files import distributed, pieces
from lorakit.files.distributed import ShardedTensor, read_distributed
from lorakit.files.pieces import read_pieces

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
WEIGHT = torch.arange(24, dtype=torch.bfloat16).reshape(6, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dcp.save({"model": {"w": WEIGHT, "scale": torch.tensor(2.5)}, "step": 7}, checkpoint_id=tmp_path / "dcp")
    return tmp_path / "dcp"


def whole(name: str, tensor: ShardedTensor) -> torch.Tensor:
    count = torch.Size(tensor.shape).numel()
    return read_pieces(name, tensor.dtype, tensor.shape, tensor.pieces, 0, count).reshape(tensor.shape)


def changed(folder: Path, change: Callable[[Any], None]) -> Path:
    """With other metadata, as torch itself would write it."""
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))
    return folder


def cut(metadata: Any, chunks: list[tuple[tuple[int, int], tuple[int, int]]], shape: tuple[int, ...] = (6, 4)) -> None:
    """The weight in pieces of these offsets and sizes, each of which is said to be the file's only one."""
    weight = metadata.state_dict_metadata["model.w"]
    (index,) = (index for index in metadata.storage_data if index.fqn == "model.w")
    place = metadata.storage_data.pop(index)
    weight.size = torch.Size(shape)
    weight.chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, size in chunks]
    for number, chunk in enumerate(weight.chunks):
        metadata.storage_data[MetadataIndex("model.w", chunk.offsets, number)] = place


def halved(metadata: Any, rows: int = 3, second: int = 3) -> None:
    cut(metadata, [((0, 0), (rows, 4)), ((rows, 0), (second, 4))])


def test_tensors_and_objects_are_found_by_their_names(folder: Path) -> None:
    found = read_distributed(folder)
    assert {name: (one.dtype, one.shape) for name, one in found.tensors.items()} == {
        "model.w": ("BF16", (6, 4)),
        "model.scale": ("F32", ()),
    }
    assert torch.equal(whole("model.w", found.tensors["model.w"]), WEIGHT)
    assert whole("model.scale", found.tensors["model.scale"]).item() == 2.5
    assert found.objects["step"].read() == 7
    assert found.paths["model.w"] == ("model", "w")


def test_a_folder_without_metadata_is_not_finished(folder: Path) -> None:
    (folder / ".metadata").unlink()
    with pytest.raises(NotFound, match="no file"):
        read_distributed(folder)


def test_a_file_that_the_metadata_names_has_to_be_there(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(NotFound, match=r"lacks __0_0\.distcp"):
        read_distributed(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/../../x", "..", ""])
def test_a_file_elsewhere_is_never_opened(folder: Path, name: str) -> None:
    def elsewhere(metadata: Any) -> None:
        for index, place in metadata.storage_data.items():
            metadata.storage_data[index] = replace(place, relative_path=name)

    with pytest.raises((InvalidFile, NotFound), match=r"which is no file beside it|lacks"):
        read_distributed(changed(folder, elsewhere))


@pytest.mark.parametrize(("rows", "second"), [(3, 4), (3, 2), (6, 6), (7, -1)])
def test_pieces_that_are_not_the_whole_once_are_refused(folder: Path, rows: int, second: int) -> None:
    with pytest.raises(InvalidFile, match=r"not the whole of it|has no size"):
        read_distributed(changed(folder, lambda metadata: halved(metadata, rows, second)))


def test_pieces_that_overlap_are_refused_though_their_sizes_add_up(folder: Path) -> None:
    def overlapping(metadata: Any) -> None:
        halved(metadata)
        weight = metadata.state_dict_metadata["model.w"]
        weight.chunks[1] = ChunkStorageMetadata(torch.Size([2, 0]), torch.Size([3, 4]))
        place = metadata.storage_data.popitem()[1]
        metadata.storage_data[MetadataIndex("model.w", torch.Size([2, 0]), 1)] = place

    with pytest.raises(InvalidFile, match="not the whole of it"):
        read_distributed(changed(folder, overlapping))


def test_a_piece_of_another_shape_than_said_is_not_put_in(folder: Path) -> None:
    found = read_distributed(changed(folder, halved))
    with pytest.raises(InvalidFile, match=r"is not the piece of 'model\.w'"):
        whole("model.w", found.tensors["model.w"])


@pytest.mark.parametrize(("start", "length"), [(1 << 40, 10), (0, 1 << 40), (-5, 10), (3, 100)])
def test_a_piece_elsewhere_in_the_file_is_an_error(folder: Path, start: int, length: int) -> None:
    def moved(metadata: Any) -> None:
        for index, place in metadata.storage_data.items():
            metadata.storage_data[index] = replace(place, offset=start, length=length)

    with pytest.raises(InvalidFile, match=r"cut short|can't be read|no file that torch"):
        whole("model.w", read_distributed(changed(folder, moved)).tensors["model.w"])


def test_packed_pieces_are_refused(folder: Path) -> None:
    def packed(metadata: Any) -> None:
        for index, place in metadata.storage_data.items():
            metadata.storage_data[index] = replace(place, transform_descriptors=["zstd"])

    with pytest.raises(Refused, match="packed as it was written"):
        read_distributed(changed(folder, packed))


def test_a_dtype_that_safetensors_lacks_is_named(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2, dtype=torch.complex128)}, checkpoint_id=tmp_path)
    with pytest.raises(Refused, match=r"dtype torch\.complex128"):
        read_distributed(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", pickle.dumps({"state_dict_metadata": {}})])
def test_metadata_of_something_else_is_an_invalid_file(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(InvalidFile):
        read_distributed(folder)


@pytest.mark.parametrize("columns", [False, True])
def test_a_thousand_pieces_side_by_side_are_the_whole(
    folder: Path, columns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "MAX_COMPARISONS", 0)
    places = [((0, i), (1, 1)) if columns else ((i, 0), (1, 1)) for i in range(1000)]
    shape = (1, 1000) if columns else (1000, 1)
    found = read_distributed(changed(folder, lambda metadata: cut(metadata, places, shape)))
    assert len(found.tensors["model.w"].pieces) == 1000


def test_pieces_that_form_no_grid_are_compared_with_one_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bricks = [((0, 0), (3, 4)), ((3, 0), (3, 1)), ((3, 1), (3, 3))]
    changed(folder, lambda metadata: cut(metadata, bricks))
    assert len(read_distributed(folder).tensors["model.w"].pieces) == 3
    monkeypatch.setattr(pieces, "MAX_COMPARISONS", 0)
    with pytest.raises(Refused, match="form no grid"):
        read_distributed(folder)


def test_more_pieces_than_there_are_machines_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "MAX_PIECES", 1)
    with pytest.raises(Refused, match="more than 1"):
        read_distributed(changed(folder, halved))


@pytest.mark.parametrize("shape", [(1 << 44, 1), (1 << 62, 8), (0, 1 << 62)])
def test_a_shape_that_the_bytes_can_not_fill_is_refused_before_there_is_memory_for_it(
    folder: Path, shape: tuple[int, int]
) -> None:
    with pytest.raises(InvalidFile, match=r"more numbers than bytes|no shape"):
        read_distributed(changed(folder, lambda metadata: cut(metadata, [((0, 0), shape)], shape)))
