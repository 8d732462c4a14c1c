"""A file a rank, each with its part of the model: put together by what the DTensors in them say."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lorakit.convert.readers.fsdp_ranks import read
from lorakit.errors import Incomplete, InvalidFile, Refused, UsageError
from tests.convert.readers.same import ensure_gives
from tests.trainers.written import Trainers

Mesh = tuple[int, ...]


def written(folder: Path, mesh: Mesh, state: dict[str, tuple[torch.Tensor, list[Placement]]]) -> Path:
    """What each rank of a real device mesh would save; torch's fake process group needs no other process."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    ranks = math.prod(mesh)
    for rank in range(ranks):
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        try:
            devices = init_device_mesh("cpu", mesh)
            placed = {
                name: distribute_tensor(tensor, devices, placements, src_data_rank=None)
                for name, (tensor, placements) in state.items()
            }
            torch.save(placed, folder / f"model_world_size_{ranks}_rank_{rank}.pt")
        finally:
            dist.destroy_process_group()
    return folder


@pytest.fixture
def actor(trainers: Trainers, tmp_path: Path) -> Path:
    return shutil.copytree(trainers.wrote("two_ranks").folder / "sharded" / "ranks" / "actor", tmp_path / "actor")


def test_what_verls_layout_holds_is_the_model_that_was_trained(trainers: Trainers, actor: Path) -> None:
    found = read(actor)
    ensure_gives(found, torch.load(trainers.wrote("two_ranks").folder / "sharded" / "rows.pt"))
    assert found.beside == actor / "huggingface"
    (others,) = found.left_out.values()
    assert others == tuple(
        f"{what}_world_size_2_rank_{rank}.pt" for what in ("extra_state", "optim") for rank in (0, 1)
    )


def test_columns_under_names_of_ones_own_are_put_together(trainers: Trainers) -> None:
    folder = trainers.wrote("two_ranks").folder / "sharded"
    ensure_gives(read(folder / "columns"), torch.load(folder / "columns.pt"))


@st.composite
def placed(draw: st.DrawFn) -> tuple[Mesh, tuple[int, ...], list[Placement]]:
    mesh = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    shape = tuple(draw(st.lists(st.integers(0, 7), min_size=1, max_size=3)))
    kinds = st.one_of(st.just(Replicate()), st.integers(0, len(shape) - 1).map(Shard))
    return mesh, shape, [draw(kinds) for _ in mesh]


@given(case=placed())
@settings(max_examples=25)
def test_any_shards_on_any_mesh_are_the_whole_tensor(
    tmp_path: Path, case: tuple[Mesh, tuple[int, ...], list[Placement]]
) -> None:
    mesh, shape, placements = case
    whole = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    ensure_gives(read(written(tmp_path / "ranks", mesh, {"w": (whole, placements)})), {"w": whole})


@pytest.mark.parametrize("after", [0, 1])
def test_fsdp_over_tensor_parallelism_is_read_where_it_divides_evenly(tmp_path: Path, after: int) -> None:
    whole = torch.arange(48.0).reshape(12, 4)
    placements = [_StridedShard(0, split_factor=2), Shard(after)]
    ensure_gives(read(written(tmp_path / "ranks", (3, 2), {"w": (whole, placements)})), {"w": whole})
    odd = (torch.arange(44.0).reshape(11, 4), placements)
    with pytest.raises(Refused, match="cut unevenly"):
        read(written(tmp_path / "odd", (3, 2), {"w": odd}))


def test_a_rank_that_is_missing_is_named(actor: Path) -> None:
    (actor / "model_world_size_2_rank_1.pt").unlink()
    with pytest.raises(Incomplete, match=r"lacks model_world_size_2_rank_1\.pt"):
        read(actor)


def test_files_of_two_runs_are_told_apart(actor: Path) -> None:
    shutil.copy(actor / "model_world_size_2_rank_0.pt", actor / "model_world_size_4_rank_3.pt")
    with pytest.raises(Refused, match="of one model"):
        read(actor)


def test_the_same_part_twice_is_refused(actor: Path) -> None:
    shutil.copy(actor / "model_world_size_2_rank_0.pt", actor / "model_world_size_2_rank_1.pt")
    with pytest.raises(InvalidFile, match="its place in the mesh says otherwise"):
        read(actor)


def test_ranks_of_different_models_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "ranks", (2,), {"w": (torch.ones(4), [Shard(0)])})
    written(tmp_path / "others", (2,), {"v": (torch.ones(4), [Shard(0)])})
    shutil.copy(tmp_path / "others" / "model_world_size_2_rank_1.pt", folder)
    with pytest.raises(InvalidFile, match="of two saves"):
        read(folder)


def plain(folder: Path, *states: dict[str, Any]) -> Path:
    folder.mkdir()
    for rank, state in enumerate(states):
        torch.save({"model": state}, folder / f"rank{rank}.pt")
    return folder


def test_what_every_rank_has_whole_is_taken_once(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    ensure_gives(read(plain(tmp_path / "ranks", {"w": whole, "step": 3}, {"w": whole, "step": 3})), {"w": whole})


def test_plain_tensors_that_differ_by_rank_are_not_guessed_at(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="differs from rank 0's"):
        read(plain(tmp_path / "ranks", {"w": torch.zeros(6)}, {"w": torch.ones(6)}))


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "ranks", (2,), {"w": (torch.ones(4), [Replicate()])})
    written(tmp_path / "others", (2,), {"w": (torch.zeros(4), [Replicate()])})
    shutil.copy(tmp_path / "others" / "model_world_size_2_rank_1.pt", folder)
    with pytest.raises(Refused, match="differs from rank 0's"):
        read(folder)


def test_a_tensor_of_another_kind_is_refused_by_its_name(tmp_path: Path) -> None:
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(Refused, match=r"'w' is a torch\._utils\._rebuild_sparse_tensor"):
        read(plain(tmp_path / "ranks", {"w": sparse}, {"w": sparse}))


def test_other_folders_are_not_taken_for_one(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "rng_state_0.pth")
    torch.save({}, tmp_path / "model.pt")
    with pytest.raises(Refused, match="named by their rank"):
        read(tmp_path)


class Crafted:
    """What torch.save would write of a DTensor that says this of itself; `runs` is called where it is unpickled."""

    def __init__(self, placement: Any, shape: Any = (4,), coordinates: Any = (0,), runs: Any = None) -> None:
        mesh = SimpleNamespace(_coordinate_on_dim=coordinates)
        said = SimpleNamespace(mesh=mesh, placements=(placement,), tensor_meta=SimpleNamespace(shape=shape))
        self.state = {"_local_tensor": torch.ones(4), "_spec": said, "more": runs}

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        rebuild = torch._utils._rebuild_wrapper_subclass
        return torch._tensor._rebuild_from_type_v2, (rebuild, DTensor, (), self.state)


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def test_no_pickle_runs(tmp_path: Path) -> None:
    crafted = Crafted(Shard(0), runs=Runs(tmp_path / "ran"))
    ensure_gives(read(plain(tmp_path / "ranks", {"w": crafted})), {"w": torch.ones(4)})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("crafted", "reason"),
    [
        (Crafted(Shard(0), shape=torch.Size([1 << 61])), "does not say which part"),
        (Crafted(Shard(0), shape=torch.Size([2, 2])), "does not say which part"),
        (Crafted(Shard(0), shape="four"), "does not say which part"),
        (Crafted(Shard(0), coordinates=("first",)), "does not say which part"),
        (Crafted(Shard(0), coordinates=(0, 0)), "does not say which part"),
        (Crafted(Shard(0), coordinates=None), "does not say which part"),
        (Crafted("rows"), "does not say which part"),
        (Crafted(Shard(0), coordinates=(1 << 40,)), "its place in the mesh says otherwise"),
        (Crafted(Shard(0), shape=torch.Size([5])), "its place in the mesh says otherwise"),
        (Crafted(Shard(3)), "is placed as Shard"),
        (Crafted(Partial()), "is placed as"),
        (Crafted(SimpleNamespace(dim=0)), "is placed as SimpleNamespace"),
        (Crafted(_StridedShard(0, split_factor=1 << 30)), "is placed as _StridedShard"),
    ],
)
def test_parts_that_lie_about_their_place_are_refused(tmp_path: Path, crafted: Crafted, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        read(plain(tmp_path / "ranks", {"w": crafted}))


def test_it_has_no_average_of_the_weights(actor: Path) -> None:
    with pytest.raises(UsageError, match="leave out --weights ema"):
        read(actor, weights="ema")
