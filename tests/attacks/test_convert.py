"""Checkpoints that were made to run code, to lie, or to never end: a clear error, nothing run, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lorakit
from lorakit.errors import InvalidFile, LorakitError
from lorakit.files.folders import read_json
from tests.models import load, make_base

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that exists once an attack has run."""
    file = tmp_path / "canary"
    yield file
    assert not file.exists()


class Runs:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


class Cyclic(torch.nn.Module):
    """Twice in itself: walked without a limit, its names are 2 to the power of its depth."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self._modules |= {"one": self, "two": self}


def shard(folder: Path, header: bytes, data: bytes = b"", claimed: int | None = None) -> None:
    length = len(header) if claimed is None else claimed
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + header + data)


def entry(**said: Any) -> bytes:
    return json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **said}}).encode()


def index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def bins(folder: Path, value: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(value, folder / "pytorch_model.bin")


SWIN = {"model_type": "swin", "architectures": ["SwinModel"]}
MUSICGEN = {"model_type": "musicgen_decoder", "architectures": ["MusicgenForCausalLM"]}

ATTACKS: dict[str, Callable[[Path, Path], object]] = {
    "a pickle that runs a command": lambda folder, canary: bins(folder, {"model.norm.weight": Runs(canary)}),
    "a pickle without a tensor": lambda folder, canary: (
        (folder / "model.safetensors").rename(folder / "other"),
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(canary))),
    ),
    "a module that holds itself": lambda folder, _: bins(folder, Cyclic()),
    "a header that is longer than the file": lambda folder, _: shard(folder, entry(), claimed=1 << 20),
    "a header of 100 MB and more": lambda folder, _: shard(folder, b" " * 100_000_001),
    "a header of 2^63 bytes": lambda folder, _: shard(folder, entry(), claimed=1 << 63),
    "a tensor beyond the file": lambda folder, _: shard(folder, entry(shape=[1 << 40], data_offsets=[0, 1 << 42])),
    "a size that is not its shape's": lambda folder, _: shard(folder, entry(shape=[400]), bytes(16)),
    "an index of a missing shard": lambda folder, _: index(folder, {"a": "model-00002-of-00002.safetensors"}),
    "an index of a file elsewhere": lambda folder, _: index(folder, {"a": "../../etc/passwd.safetensors"}),
    "an index that names itself": lambda folder, _: index(folder, {"a": "model.safetensors.index.json"}),
    "an index of nothing": lambda folder, _: index(folder, {}),
    "an index of another tensor": lambda folder, _: index(folder, {"a": "model-00001-of-00002.safetensors"}),
    "a config without end": lambda folder, _: configure(folder, num_hidden_layers=10**9),
    "a config of another size": lambda folder, _: configure(folder, hidden_size=-96),
    "a config that is no object": lambda folder, _: (folder / "config.json").write_text("[" * 100_000),
    "a config that is a list": lambda folder, _: (folder / "config.json").write_text("[]"),
    "depths without end": lambda folder, _: configure(folder, **SWIN, depths=[2, 10**9, 2]),
    "codebooks without end": lambda folder, _: configure(folder, **MUSICGEN, num_codebooks=10**9),
    "layers upon layers": lambda folder, _: configure(folder, text_config={"num_hidden_layers": [10**9]}),
    "a class of ours": lambda folder, _: configure(folder, architectures=["__builtins__"], model_type="ours"),
}


def configure(folder: Path, **said: Any) -> None:
    (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | said))


@pytest.mark.parametrize("attack", ATTACKS)
def test_it_is_refused_and_leaves_nothing(tmp_path: Path, base: Path, canary: Path, attack: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(dict(load(base).state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    ATTACKS[attack](folder, canary)
    with pytest.raises(LorakitError) as refused:
        lorakit.convert(folder, tmp_path / "out")
    assert str(tmp_path) in str(refused.value) or "transformers has no model of type" in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: shard(folder, b" " * 64, claimed=200_000_000),
        lambda folder: shard(folder, entry(dtype="F31"), bytes(16)),
        lambda folder: shard(folder, entry(data_offsets=[4, 20]), bytes(20)),
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {'),
    ],
    ids=["header", "dtype", "overlap", "config", "index"],
)
def test_damage_is_not_taken_for_something_that_is_still_being_written(
    tmp_path: Path, base: Path, damage: Callable[[Path], object]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(dict(load(base).state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    damage(folder)
    with pytest.raises(InvalidFile, match="copy it again"):
        lorakit.convert(folder, tmp_path / "out")


def aliases(level: int, name: str) -> str:
    """Each line is ten times the one before, and all are one object."""
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{one}: &a{one} [{','.join([f'*a{one - 1}'] * 10)}]" for one in range(1, level)]
    return "\n".join([*lines, f"{name}: *a{level - 1}", ""])


@pytest.mark.parametrize("name", ["name", "mlp_class_name", "n_head"])
def test_settings_that_are_a_thousand_times_as_long_as_their_file_are_not_written_out(
    tmp_path: Path, base: Path, name: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    torch.save({"transformer.h.0.attn.qkv.weight": torch.zeros(64, 32)}, folder / "lit_model.pth")
    said = {"n_head": "4", "n_query_groups": "2", "head_size": "8", "mlp_class_name": "LLaMAMLP"}
    plain = "".join(f"{key}: {value}\n" for key, value in said.items() if key != name)
    (folder / "model_config.yaml").write_text(aliases(9, name) + plain)
    with pytest.raises(LorakitError) as refused:
        lorakit.convert(folder, tmp_path / "out")
    assert len(str(refused.value)) < 3000
