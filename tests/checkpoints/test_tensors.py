"""The tensors of anything that a trainer writes, under the names that it gave them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorakit.checkpoints import tensors
from lorakit.checkpoints.tensors import Tensors, blocks, nbytes, open_tensors
from lorakit.errors import Conflict, Incomplete, InvalidFile, NotFound, Refused
from lorakit.files.torch_tensors import StoredTorchTensor
from tests.folders import base_tensors, write_adapter, write_base
from tests.trainers.expected import EVERYDAY, Run
from tests.trainers.written import Trainers


def values(opened: Tensors) -> dict[str, torch.Tensor]:
    return {name: value(opened, name) for name in opened.stored}


def value(opened: Tensors, name: str, count: int = 5) -> torch.Tensor:
    stored = opened.stored[name]
    found = list(blocks(name, stored, count))
    assert all(block.numel() == count for block in found[:-1])
    return torch.cat(found).reshape(stored.shape) if found else torch.empty(stored.shape)


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("shards", [1, 3])
def test_the_weights_of_a_model_keep_their_names(tmp_path: Path, shards: int) -> None:
    opened = open_tensors(write_base(tmp_path / "base", shards=shards))
    assert_same(values(opened), {name: torch.from_numpy(one) for name, one in base_tensors().items()})
    assert set(opened.groups.values()) == {""}
    assert sum(map(nbytes, opened.stored.values())) == sum(one.nbytes for one in base_tensors().values())


def test_a_torch_file_has_its_tensors_by_dotted_path_and_its_values_beside_them(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": 2,
            "rng": torch.get_rng_state(),
            "kind": torch.bfloat16,
            "raw": b"abc",
            "many": list(range(100)),
            "nothing": None,
        },
        tmp_path / "it.pt",
    )
    opened = open_tensors(tmp_path / "it.pt")
    state = optimizer.state_dict()["state"]
    expected = {f"model.{name}": one for name, one in model.state_dict().items()}
    expected |= {f"optimizer.state.{i}.{name}": one for i in state for name, one in state[i].items()}
    expected["rng"] = torch.get_rng_state()
    assert_same(values(opened), expected)
    assert opened.groups["model.weight"] == "model"
    assert opened.groups["optimizer.state.0.exp_avg"] == "optimizer"
    assert opened.groups["rng"] == ""
    assert opened.values["epoch"] == 2
    assert opened.values["kind"] == "torch.bfloat16"
    assert opened.values["optimizer.param_groups.0.lr"] == 3e-4
    assert opened.values["optimizer.param_groups.0.betas"] == [0.9, 0.999]
    assert opened.values["raw"].startswith("3 bytes, sha256 ba7816bf")
    assert opened.values["many"].startswith("100 values, sha256 ")
    assert opened.values["nothing"] is None


def test_a_tensor_alone_is_called_one(tmp_path: Path) -> None:
    torch.save(torch.arange(7), tmp_path / "it.pt")
    assert_same(values(open_tensors(tmp_path / "it.pt")), {"tensor": torch.arange(7)})


def test_what_holds_itself_is_told_once(tmp_path: Path) -> None:
    holder = Holder()
    holder.me, holder.others, holder.name = holder, [holder, torch.ones(2)], "it"
    torch.save({"callback": holder, "kind": Holder, "again": Holder}, tmp_path / "it.pt")
    opened = open_tensors(tmp_path / "it.pt")
    assert_same(values(opened), {"callback.others.1": torch.ones(2)})
    assert opened.values == {
        "callback.me": "the same as callback",
        "callback.others.0": "the same as callback",
        "callback.name": "it",
        "kind": f"{__name__}.Holder",
        "again": f"{__name__}.Holder",
    }


class Holder:
    me: Holder
    others: list[Any]
    name: str


def test_a_chain_without_end_is_not_followed_to_it(tmp_path: Path) -> None:
    first = last = Holder()
    for _ in range(150):
        last.me = Holder()
        last = last.me
    torch.save({"chain": first, "w": torch.ones(1)}, tmp_path / "it.pt")
    opened = open_tensors(tmp_path / "it.pt")
    assert list(opened.stored) == ["w"]
    (note,) = opened.notes
    assert "nested deeper than 100" in note


def test_keys_that_read_alike_are_two_tensors(tmp_path: Path) -> None:
    torch.save({1: torch.ones(1), "1": torch.zeros(1)}, tmp_path / "it.pt")
    assert_same(values(open_tensors(tmp_path / "it.pt")), {"1": torch.ones(1), "1'": torch.zeros(1)})


def test_of_a_checkpoint_the_other_files_begin_with_their_names(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "checkpoint-5")
    torch.save({"state": {0: {"exp_avg": torch.ones(3)}}}, folder / "optimizer.pt")
    torch.save({"last_epoch": 5}, folder / "scheduler.pt")
    (folder / "tokenizer.bin").write_bytes(b"no torch file")
    opened = open_tensors(folder)
    assert torch.equal(value(opened, "optimizer.state.0.exp_avg"), torch.ones(3))
    assert opened.groups["optimizer.state.0.exp_avg"] == "optimizer"
    assert opened.values == {"scheduler.last_epoch": 5}
    weights = load_file(folder / "adapter_model.safetensors")
    assert_same({name: one for name, one in values(opened).items() if name in weights}, weights)
    (note,) = opened.notes
    assert "'tokenizer.bin' (no torch file)" in note


def test_the_same_weights_twice_in_a_folder_are_two(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    found = values(open_tensors(tmp_path))
    assert_same(found, {"w": torch.ones(2), "pytorch_model.w": torch.zeros(2)})


@settings(max_examples=40)
@given(shape=st.lists(st.integers(0, 5), max_size=3), count=st.integers(1, 7), turned=st.booleans())
def test_blocks_are_the_elements_in_their_order(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], count: int, turned: bool
) -> None:
    tensor = torch.arange(5 ** len(shape), dtype=torch.int16).reshape([5] * len(shape))
    tensor = tensor[tuple(slice(size) for size in shape)]
    tensor = tensor.permute(list(reversed(range(tensor.dim())))) if turned else tensor
    file = tmp_path_factory.mktemp("blocks") / "it.pt"
    torch.save({"w": tensor}, file)
    opened = open_tensors(file)
    assert isinstance(opened.stored["w"], StoredTorchTensor)
    found = value(opened, "w", count)
    assert found.tolist() == tensor.tolist()
    assert nbytes(opened.stored["w"]) == tensor.nbytes


def test_a_checkpoint_that_is_being_written_is_not_opened(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "checkpoint-5", shards=2)
    sentinel = folder / "checkpoint-is-incomplete.txt"
    sentinel.touch()
    with pytest.raises(Incomplete, match="still being written"):
        open_tensors(folder)
    sentinel.unlink()
    shard = folder / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(InvalidFile, match="cut short"):
        open_tensors(folder)
    shard.unlink()
    with pytest.raises(Incomplete, match=r"names model-00002-of-00002\.safetensors"):
        open_tensors(folder)


def test_what_holds_no_tensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(Refused, match="holds no tensors"):
        open_tensors(tmp_path)
    with pytest.raises(NotFound, match="no folder or file"):
        open_tensors(tmp_path / "nowhere")


def test_a_file_that_is_written_again_is_noticed(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    opened = open_tensors(folder)
    opened.ensure_unchanged()
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(Conflict, match="written again"):
        opened.ensure_unchanged()


@pytest.mark.parametrize("run", ["ddp", "fsdp", pytest.param("fsdp-async", marks=pytest.mark.slow)])
def test_tensors_in_pieces_of_two_ranks_are_those_that_torch_puts_together(
    trainers: Trainers, tmp_path: Path, run: str
) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder = trainers.wrote("two_ranks").folder / run / "step-2"
    dcp_to_torch_save(folder, tmp_path / "whole.pt")
    opened, whole = open_tensors(folder), open_tensors(tmp_path / "whole.pt")
    expected = values(whole)
    assert any(name.startswith("model.") for name in expected)
    assert any(name.startswith("optimizer.") for name in expected)
    assert_same(values(opened), expected)
    assert opened.groups == whole.groups
    if run == "fsdp":
        assert max(len(one.pieces) for one in opened.stored.values()) == 2  # type: ignore[union-attr]


def test_every_tensor_of_real_checkpoints_is_there(trainers: Trainers) -> None:
    written = trainers.wrote("hf_trainer").folder / "whole" / "checkpoint-2"
    opened = open_tensors(written)
    found = values(opened)
    weights = load_file(written / "model.safetensors")
    assert_same({name: found[name] for name in weights}, weights)
    state = torch.load(written / "optimizer.pt", weights_only=True)["state"]
    for number, moments in state.items():
        for name, tensor in moments.items():
            assert torch.equal(found[f"optimizer.state.{number}.{name}"], tensor)
    assert opened.values["training_args.per_device_train_batch_size"] == 2
    assert opened.values["scheduler.last_epoch"] == 2


@pytest.mark.parametrize("run", EVERYDAY, ids=str)
def test_whatever_a_trainer_wrote_is_opened(trainers: Trainers, run: Run) -> None:
    for step in run.places:
        opened = open_tensors(trainers.wrote(run.program).checkpoint(run, step))
        assert opened.stored
        for name, stored in opened.stored.items():
            assert sum(block.numel() for block in blocks(name, stored, 1 << 16)) == math.prod(stored.shape)


def test_of_a_dtype_that_safetensors_lacks_the_bytes_are_kept(tmp_path: Path) -> None:
    wide = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128)
    torch.save({"w": torch.ones(2), "rope": wide}, tmp_path / "it.pt")
    opened = open_tensors(tmp_path / "it.pt")
    (content,) = blocks("rope", opened.stored["rope"], 1000)
    assert content.numpy().tobytes() == wide.numpy().tobytes()
    assert nbytes(opened.stored["rope"]) == 32


def test_a_tensor_of_far_more_elements_than_are_stored_is_left_out_and_told(tmp_path: Path) -> None:
    spread = {"w": torch.ones(2), "mask": torch.ones(1).expand(5, 3), "far": torch.ones(1).expand(1 << 45)}
    torch.save(spread, tmp_path / "it.pt")
    opened = open_tensors(tmp_path / "it.pt")
    assert_same(values(opened), {"w": torch.ones(2), "mask": torch.ones(5, 3)})
    assert opened.notes == (f"not compared of '{tmp_path / 'it.pt'}': 'far' (of more elements than are stored)",)
    torch.save(spread["far"], tmp_path / "it.pt")
    with pytest.raises(Refused, match=r"holds no tensors.*not compared"):
        open_tensors(tmp_path / "it.pt")


def test_names_that_would_fill_the_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long key over many values, all of them the same one."""
    shared: Any = {}
    for _ in range(8):
        shared = (shared, shared)
    torch.save({"w": torch.ones(1), "k" * 1000: shared}, tmp_path / "it.pt")
    assert len(open_tensors(tmp_path / "it.pt").values) == 256
    for limit, most in (("MAX_NAMES", 200), ("MAX_LETTERS", 200_000)):
        with monkeypatch.context() as patch:
            patch.setattr(tensors, limit, most)
            with pytest.raises(Refused, match="endless names"):
                open_tensors(tmp_path / "it.pt")


def test_values_that_read_alike_are_all_there(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1), "of": {1: "c", "1": "b", (1, "x"): "d"}}, tmp_path / "it.pt")
    assert open_tensors(tmp_path / "it.pt").values == {"of.1": "c", "of.1'": "b", "of.(1, 'x')": "d"}


@pytest.mark.parametrize("seed", ["1", "2"])
def test_a_set_has_one_order_whatever_its_elements_hash_to(tmp_path: Path, seed: str) -> None:
    program = (
        "import sys, torch; names = [('a%d' % i, frozenset('xyz')) for i in range(12)]; "
        "torch.save({'w': torch.ones(1), 's': set(names), 'f': frozenset('abcdefghij')}, sys.argv[1])"
    )
    file = tmp_path / "it.pt"
    subprocess.run([sys.executable, "-c", program, file], env={**os.environ, "PYTHONHASHSEED": seed}, check=True)
    found = open_tensors(file).values
    assert [found[f"s.{i}.0"] for i in range(12)] == sorted(f"a{i}" for i in range(12))
    assert [found["s.0.1"], found["f"]] == [["x", "y", "z"], EXPECTED]


EXPECTED = f"10 values, sha256 {hashlib.sha256(repr(list('abcdefghij')).encode()).hexdigest()[:12]}"


def test_what_stands_on_its_own_in_a_folder_is_left_out_and_told(tmp_path: Path) -> None:
    run = write_base(tmp_path / "run")
    write_base(run / "checkpoint-5")
    write_adapter(run / "reference")
    write_base(run / "vae")
    (run / "self").symlink_to(".")
    opened = open_tensors(run)
    assert opened.stored.keys() == {*base_tensors(), *(f"vae.{name}" for name in base_tensors())}
    assert opened.notes == (
        f"not compared of '{run}': 'checkpoint-5', 'reference' (a checkpoint or adapter of its own)",
        f"not compared of '{run}': 'self' (a link to a folder)",
    )


@pytest.mark.parametrize("name", ["x.pt", "model.safetensors", "pytorch_model.bin"])
def test_a_pipe_among_the_files_is_an_error_and_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = write_base(tmp_path / "base", shards=2)
    os.mkfifo(folder / name)
    for path in (folder, folder / name):
        with pytest.raises(InvalidFile, match=f"{name}' is a pipe"):
            open_tensors(path)


def test_a_folder_that_may_not_be_read_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> Any:  # root, as whom tests may run, can read every folder
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(InvalidFile, match="permission denied; chmod it, or run as its owner"):
        open_tensors(tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_beside_a_distributed_checkpoint_the_other_files_count_too(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": {"w": torch.ones(3)}, "step": 7}, checkpoint_id=tmp_path)
    torch.save({"seed": 3, "rng": torch.arange(2)}, tmp_path / "meta.pt")
    opened = open_tensors(tmp_path)
    assert_same(values(opened), {"model.w": torch.ones(3), "meta.rng": torch.arange(2)})
    assert opened.values == {"step": 7, "meta.seed": 3}
    assert {file.name for file in opened.states} == {".metadata", "__0_0.distcp", "meta.pt"}
