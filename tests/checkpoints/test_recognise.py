"""Whose work a path is, and which parts of a training's state it holds; what more `show` says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.checkpoints.details import Details, details_of
from lorakit.checkpoints.recognise import Recognised, recognise
from tests.checkpoints.writings import WRITINGS, Disk, torch_bytes
from tests.folders import factors, linear_modules, write_adapter, write_base

ALL_OF_A_TRAINER = ("model", "optimizer", "scheduler", "rng", "trainer_state")


def written(tmp_path: Path, name: str) -> Path:
    """A checkpoint as this writer leaves it."""
    writing = WRITINGS[name]
    disk = Disk(tmp_path / "run" / writing.place)
    for each in (*writing.first, *(other for rank in writing.others for other in rank)):
        disk.file(each).write_bytes(writing.bytes_of(each, 0))
    return disk.folder


def known(path: Path) -> Recognised:
    found = recognise(path)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "writer", "kind", "holds"),
    [
        ("adapter", "transformers", "adapter", ALL_OF_A_TRAINER),
        ("adapter alone", "transformers", "adapter", ("model", "trainer_state")),
        ("model", "transformers", "regular", ALL_OF_A_TRAINER),
        ("model in shards", "transformers", "regular", ("model", "optimizer", "scheduler", "trainer_state")),
        ("sharded by FSDP", "transformers", "regular", ALL_OF_A_TRAINER),
        ("adapter with DeepSpeed's state", "transformers", "adapter", ("model", "optimizer", "rng", "trainer_state")),
        ("distributed", "dcp", "regular", ("model", "optimizer")),
        ("DeepSpeed", "deepspeed", "regular", ("model", "optimizer", "trainer_state")),
        ("torchtune", "torchtune", "adapter", ("model", "optimizer", "trainer_state")),
        ("torchtune 0.6", "torchtune", "adapter", ("model",)),
        ("litgpt", "litgpt", "adapter", ("model",)),
        ("accelerate", "accelerate", "regular", ("model", "optimizer", "scheduler", "rng")),
        ("saved by PEFT", "peft", "adapter", ("model",)),
        ("saved by transformers", "huggingface", "regular", ("model",)),
    ],
)  # fmt: skip
def test_each_writers_work_is_known(tmp_path: Path, name: str, writer: str, kind: str, holds: tuple[str, ...]) -> None:
    found = known(written(tmp_path, name))
    assert (found.writer, found.kind, found.holds) == (writer, kind, holds)
    assert all((found.path / file).exists() for file in found.files)


def test_a_folder_above_deepspeeds_steps_is_the_one_that_latest_names(tmp_path: Path) -> None:
    found = known(written(tmp_path, "DeepSpeed").parent)
    assert (found.writer, found.kind) == ("deepspeed", "regular")
    assert all(file.startswith("global_step8/") for file in found.files)


def torch_file(folder: Path, name: str, value: Any) -> Path:
    (folder / name).write_bytes(torch_bytes(value))
    return folder / name


def test_torch_files_are_known_by_the_names_in_them(tmp_path: Path) -> None:
    import torch

    weights, lora = {"a.weight": torch.zeros(2)}, {"a.lora_A.weight": torch.zeros(3, 2)}
    moments = {"state": {0: {"exp_avg": torch.zeros(2)}}}
    lightning = {"pytorch-lightning_version": "2.6.6", "epoch": 1, "global_step": 16, "loops": {"fit_loop": {}}}
    for name, value, writer, kind, holds in [
        ("plain.pt", weights, "torch", "regular", ("model",)),
        ("lora.pth", lora, "torch", "adapter", ("model",)),
        ("both.pt", {"model": weights, "optimizer": moments, "step": 5}, "torch", "regular",
         ("model", "optimizer", "trainer_state")),
        ("all.pt", {"model_state_dict": lora, "optimizer_state_dict": moments, "scheduler": {"last_epoch": 1},
                    "scaler": {"scale": 2.0}, "rng_state": torch.zeros(4), "epoch": 1}, "torch", "adapter",
         ("model", "optimizer", "scheduler", "scaler", "rng", "trainer_state")),
        ("l.ckpt", {**lightning, "state_dict": weights, "optimizer_states": [moments], "lr_schedulers": [{}]},
         "lightning", "regular", ("model", "optimizer", "scheduler", "trainer_state")),
        ("weights-only.ckpt", {**lightning, "state_dict": lora, "optimizer_states": [], "lr_schedulers": []},
         "lightning", "adapter", ("model", "trainer_state")),
        ("numbers.pt", {"a": 1}, "torch", None, ()),
    ]:  # fmt: skip
        found = known(torch_file(tmp_path, name, value))
        assert (name, found.writer, found.kind, found.holds) == (name, writer, kind, holds)
        assert found.files == (name,)


def test_a_safetensors_file_alone_is_known(tmp_path: Path) -> None:
    adapter, model = write_adapter(tmp_path / "a"), write_base(tmp_path / "m")
    assert known(adapter / "adapter_model.safetensors").kind == "adapter"
    assert known(model / "model.safetensors").kind == "regular"


def test_what_lorakit_wrote_is_known_as_its_own(tmp_path: Path) -> None:
    for folder, kind in ((write_adapter(tmp_path / "a"), "adapter"), (write_base(tmp_path / "m"), "regular")):
        (folder / "lorakit.json").write_text("{}")
        assert (known(folder).writer, known(folder).kind) == ("lorakit", kind)


@pytest.mark.parametrize("make", ["nothing", "empty", "text", "folder of text"])
def test_what_is_nothing_known_is_none(tmp_path: Path, make: str) -> None:
    path = tmp_path / "x"
    if make == "text":
        path.write_text("hello")
    elif make != "nothing":
        path.mkdir()
    if make == "folder of text":
        (path / "notes.txt").write_text("hello")
    assert recognise(path) is None
    assert details_of(path).writer is None


def test_details_are_what_the_files_say(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "checkpoint-5", factors(linear_modules(2)), peft_version="0.21.2")
    (folder / "optimizer.pt").write_bytes(torch_bytes({"state": {}}))
    (folder / "global_step5").mkdir()
    (folder / "global_step5" / "x.pt").write_bytes(b"12345")
    found = details_of(folder)
    assert (found.writer, found.holds, found.peft_version) == ("transformers", ("model", "optimizer"), "0.21.2")
    assert (found.dtypes, found.modules, found.tensors) == (("F32",), 6, 12)
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    assert dict(found.files) == sizes


def test_versions_come_from_the_config_and_the_model_card(tmp_path: Path) -> None:
    model = write_base(tmp_path / "m", transformers_version="5.19.0", shards=2)
    assert details_of(model).transformers_version == "5.19.0"
    assert (details_of(model).modules, details_of(model).dtypes) == (None, ("F32",))
    adapter = write_adapter(tmp_path / "a")
    (adapter / "README.md").write_text("### Framework versions\n\n- PEFT 0.20.1.dev0\n")
    assert details_of(adapter).peft_version == "0.20.1.dev0"
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_version": 3}))
    assert details_of(adapter).peft_version == "0.20.1.dev0"


def test_what_cant_be_read_has_no_details(tmp_path: Path) -> None:
    assert details_of(tmp_path / "nowhere") == Details()
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(b"cut")
    assert details_of(folder).tensors is None
