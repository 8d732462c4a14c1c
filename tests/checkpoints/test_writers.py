"""Every writer's own order, replayed: never finished before its files are, and always in the end."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from lorakit.checkpoints.details import details_of
from lorakit.checkpoints.finished import look_at
from lorakit.checkpoints.metadata import metadata_of
from lorakit.checkpoints.runs import Candidate
from lorakit.errors import InvalidFile
from lorakit.files.folders import read_json
from tests.checkpoints.writings import (
    WAYS,
    WRITINGS,
    Disk,
    Way,
    Writing,
    distributed_metadata,
    pieces,
    torch_bytes,
)
from tests.checkpoints.written import write_model_checkpoint
from tests.folders import write_adapter

WRITERS = sorted(WRITINGS)


def is_tensors(name: str) -> bool:
    return name.endswith(".safetensors")


def judge(disk: Disk, writing: Writing, turn: int) -> str:
    """The state, once it was seen that nothing is called finished which is not."""
    look = look_at(disk.folder)
    if look.state == "finished":
        turns = [
            all(disk.has(name, writing.bytes_of(name, each)) for name in writing.covered) for each in range(turn + 1)
        ]
        assert any(turns), look
        for name in writing.there:
            assert any(disk.has(name, writing.bytes_of(name, each)) for each in range(turn + 1)), (name, look)
    return look.state


def some_cuts(content: bytes) -> list[int]:
    """Every byte of short files; of longer ones those at both ends, and some between."""
    size = len(content)
    return sorted({*range(min(size, 10)), *range(10, size, 211), *range(max(0, size - 10), size)})


def alone(disk: Disk, writing: Writing, way: Way, turn: int) -> Iterator[str]:
    """One rank after the other, as far as they wait for each other."""
    others = [name for rank in writing.others for name in rank]
    for name in writing.first:
        if name == writing.barrier:
            for other in others:
                yield from pieces(disk, other, writing.bytes_of(other, turn), way, some_cuts(b"x" * 30))
        content = writing.bytes_of(name, turn)
        yield from pieces(disk, name, content, way, some_cuts(content))
    if writing.barrier is None:
        for other in others:
            yield from pieces(disk, other, writing.bytes_of(other, turn), way, [0, 10])


@pytest.mark.parametrize(
    ("name", "way"),
    [
        (name, way)
        for name in WRITERS
        for way in WAYS
        if way == "in place" or any(map(is_tensors, WRITINGS[name].first))
    ],
)
def test_no_prefix_of_files_and_bytes_is_finished_early_and_the_end_always_is(
    name: str, way: Way, tmp_path: Path
) -> None:
    writing = WRITINGS[name]
    disk = Disk(tmp_path / "run" / writing.place)
    for turn in (0, 1):  # the second time there is an old last file before anything is written
        for _ in alone(disk, writing, way, turn):
            judge(disk, writing, turn)
        assert judge(disk, writing, turn) == writing.ends, look_at(disk.folder)


@pytest.mark.parametrize("name", [name for name in WRITERS if WRITINGS[name].first != ("",)])
def test_what_is_taken_away_in_the_middle_is_no_error(name: str, tmp_path: Path) -> None:
    writing = WRITINGS[name]
    disk = Disk(tmp_path / "run" / writing.place)
    for _ in alone(disk, writing, "in place", 0):
        pass
    for _ in disk.remove():
        look = look_at(disk.folder)
        assert look.reason
    assert look_at(disk.folder).state == "incomplete"


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), way=st.sampled_from(WAYS))
@pytest.mark.parametrize("name", [name for name in WRITERS if WRITINGS[name].others])
def test_however_the_ranks_interleave_it_is_never_finished_early(name: str, seed: int, way: Way) -> None:
    writing, chance = WRITINGS[name], Random(seed)
    with tempfile.TemporaryDirectory() as parent:
        disk = Disk(Path(parent) / "run" / writing.place)
        for turn in (0, 1):
            for _ in interleaved(disk, writing, way, turn, chance):
                judge(disk, writing, turn)
            assert judge(disk, writing, turn) == writing.ends


def interleaved(disk: Disk, writing: Writing, way: Way, turn: int, chance: Random) -> Iterator[str]:
    """All ranks at once, each in its own order; the first waits for the others at its barrier."""

    def all_of(names: tuple[str, ...]) -> Iterator[str]:
        for name in names:
            content = writing.bytes_of(name, turn)
            cuts = sorted(chance.sample(range(len(content)), chance.randint(0, 2)))
            yield name
            yield from pieces(disk, name, content, way, cuts)

    first, others = all_of(writing.first), [all_of(names) for names in writing.others]
    waits = False
    while others or first is not None:
        rank = chance.choice(others if waits and others else [*others, *([first] if first else [])])
        done = next(rank, None)
        if done is not None:
            waits = waits or (rank is first and done == writing.barrier)
            yield done
        elif rank is first:
            first = None
        else:
            others.remove(rank)


def files(folder: Path, **contents: bytes) -> Path:
    """Written in that order; `__` in a name is its dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for turn, (name, content) in enumerate(contents.items()):
        file = folder / name.replace("__", ".")
        file.write_bytes(content)
        os.utime(file, ns=(10**18 + turn, 10**18 + turn))
    return folder


STATE = torch_bytes({"state": {}})


def test_what_accelerate_saves_as_checkpoint_n_is_its_own(tmp_path: Path) -> None:
    """As the scripts of diffusers do."""
    weights = save({"w": numpy.zeros(2, numpy.float32)})
    own = {"optimizer__bin": STATE, "scheduler__bin": STATE, "random_states_0__pkl": STATE}
    model = look_at(files(tmp_path / "checkpoint-4", model__safetensors=weights, **own))
    assert (model.state, model.writer, model.kind) == ("finished", "accelerate", "regular")
    lora = look_at(files(tmp_path / "checkpoint-5", pytorch_lora_weights__safetensors=weights, **own))
    assert (lora.state, lora.writer, lora.kind) == ("refused", "accelerate", "adapter")
    assert "diffusers" in lora.reason


@pytest.mark.parametrize(
    ("names", "config", "missing"),
    [
        (["mp_rank_00"], {"zero_optimization": {"stage": 1}}, "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        (["mp_rank_00"], {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
         "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        (["zero_pp_rank_0_mp_rank_00", "zero_pp_rank_1_mp_rank_00"], {}, "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        (["mp_rank_00"], {"zero_optimization": {"stage": 0}}, None),
        (["mp_rank_00"], {}, None),
    ],
)  # fmt: skip
def test_deepspeeds_ranks_hold_the_optimizer_in_files_that_have_to_be_there(
    tmp_path: Path, names: list[str], config: dict[str, Any], missing: str | None
) -> None:
    said = torch_bytes({"module": {}, "ds_config": config, "dp_world_size": len(names)})
    files(tmp_path / "global_step4", **{f"{name}_model_states__pt": said for name in names})
    (tmp_path / "latest").write_text("global_step4")
    found = look_at(tmp_path / "global_step4")
    assert (found.state, missing is None or found.reason == f"{missing} is not there yet") == (
        "finished" if missing is None else "incomplete", True,
    )  # fmt: skip


def test_lightnings_sharded_checkpoint_is_done_with_its_meta_file(tmp_path: Path) -> None:
    folder = tmp_path / "epoch=0-step=2.ckpt"
    folder.mkdir()
    for rank in (0, 1):
        (folder / f"__{rank}_0.distcp").write_bytes(bytes(64))
    (folder / ".metadata").write_bytes(distributed_metadata(0))
    assert look_at(folder).state == "whole"
    (folder / "meta.pt").write_bytes(STATE[:-1])
    assert look_at(folder).state == "incomplete"
    (folder / "meta.pt").write_bytes(STATE)
    assert look_at(folder).state == "finished"


def test_where_an_adapter_is_that_is_not_called_default(tmp_path: Path) -> None:
    folder = files(tmp_path / "checkpoint-8", trainer_state__json=b'{"global_step": 8}')
    write_adapter(folder / "train")
    assert look_at(folder).reason == "its adapter is in train/: name '…/checkpoint-8/train'"


def test_torchtunes_last_epoch_waits_for_no_state_of_another(tmp_path: Path) -> None:
    files(tmp_path / "recipe_state", recipe_state__pt=STATE)
    folder = write_adapter(tmp_path / "epoch_1")
    (folder / "adapter_model.pt").write_bytes(STATE)
    assert (look_at(folder).state, look_at(folder).reason) == ("whole", "nothing says yet that its writer is done")


def test_a_model_in_torchtunes_own_names_has_no_index(tmp_path: Path) -> None:
    folder = files(tmp_path / "epoch_0", model_00001_of_00002__bin=STATE)
    (folder / "model_00001_of_00002.bin").rename(folder / "model-00001-of-00002.bin")
    assert look_at(folder).reason == "model-00002-of-00002.bin is not there yet"
    (folder / "model-00002-of-00002.bin").write_bytes(STATE)
    look = look_at(folder)
    assert (look.writer, look.kind, look.state) == ("torchtune", "regular", "whole")


@pytest.mark.parametrize("name", ["config.json", "README.md", "adapter_config.json", "trainer_state.json"])
def test_a_pipe_is_waited_for_by_nobody(tmp_path: Path, name: str) -> None:
    model = write_model_checkpoint(tmp_path / "checkpoint-5")
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    assert metadata_of(Candidate(model, "run", "step", 5)).step == 5
    assert details_of(model).files
    with pytest.raises(InvalidFile, match="pipe"):
        read_json(model / name)
