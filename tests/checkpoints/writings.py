"""What each writer puts on a disk, in its own order (facts/serving-and-checkpoints.md §2.1): small files with the true
names, and a way to write them piece by piece."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from tests.folders import factors, linear_modules, write_adapter, write_base

WEIGHTS, CONFIG, STATE = "adapter_model.safetensors", "adapter_config.json", "trainer_state.json"
Way = Literal["in place", "renamed", "filled"]
WAYS: tuple[Way, ...] = ("in place", "renamed", "filled")
Step = Callable[[Path], None]


@dataclass(frozen=True)
class Writing:
    """`first` is what rank 0 writes, in order, `others` what each other rank does; names are relative to the folder.

    `covered` has to be of one piece when it counts as finished; `there` has to be whole then, of whichever time.
    `barrier`: the name before which rank 0 waits for all others.
    """

    place: str
    first: tuple[str, ...]
    others: tuple[tuple[str, ...], ...] = ()
    covered: tuple[str, ...] = ()
    there: tuple[str, ...] = ()
    barrier: str | None = None
    ends: str = "finished"
    content: Mapping[str, bytes] = field(default_factory=dict)

    def bytes_of(self, name: str, turn: int) -> bytes:
        """What is in a file the `turn`-th time that it is written: other numbers, as many bytes."""
        return _content(self, name, turn)


def torch_bytes(value: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@cache
def _adapter(turn: int) -> dict[str, bytes]:
    return _made(lambda folder: write_adapter(folder, factors(linear_modules(1), seed=turn + 1), turn=turn))


@cache
def _model(turn: int, shards: int) -> dict[str, bytes]:
    import numpy as np

    tensors = {f"model.layers.{k}.w": np.full((4, 4), turn + k, "float32") for k in range(3)}
    return _made(lambda folder: write_base(folder, tensors, shards=shards, turn=turn))


def _made(write: Callable[[Path], Path]) -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as parent:
        return {file.name: file.read_bytes() for file in write(Path(parent) / "made").iterdir()}


@cache
def torch_state(turn: int) -> bytes:
    import torch

    return torch_bytes({"state": {0: {"exp_avg": torch.full((3,), float(turn))}}})


@cache
def lora_state(turn: int, **more: Any) -> bytes:
    import torch

    return torch_bytes({"model": {"q.lora_A": torch.full((2, 3), float(turn)), "q.lora_B": torch.zeros(3, 2)}, **more})


@cache
def deepspeed_state(turn: int) -> bytes:
    import torch

    module = {"model.q.weight": torch.full((2, 3), float(turn))}
    return torch_bytes(
        {"module": module, "dp_world_size": 2, "mp_world_size": 1, "global_steps": 8, "lr_scheduler": {}}
    )


@cache
def distributed_metadata(turn: int) -> bytes:
    """`.metadata` of two ranks' files, as torch.distributed.checkpoint pickles it."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

    keys = {name: BytesStorageMetadata() for name in ("model.q.weight", "optim.state.q.exp_avg")}
    storage = {
        MetadataIndex(name, offset=None, index=turn): _StorageInfo(f"__{rank}_0.distcp", 0, 64)
        for rank, name in enumerate(keys)
    }
    return pickle.dumps(Metadata(state_dict_metadata=keys, planner_data=None, storage_data=storage))


def _content(writing: Writing, name: str, turn: int) -> bytes:
    last = name.rpartition("/")[2]
    if name in writing.content:
        return writing.content[name]
    if last in (WEIGHTS, CONFIG):
        return _adapter(turn)[last]
    sharded = any(".index." in each for each in writing.first)
    if last in _model(turn, 2 if sharded else 1):
        return _model(turn, 2 if sharded else 1)[last]
    if last == STATE:
        return json.dumps({"global_step": 500, "log_history": [{"step": 500, "loss": float(turn)}]}).encode()
    if last == ".metadata":
        return distributed_metadata(turn)
    if last.endswith(".distcp"):
        return bytes([turn + 1]) * 64
    if last.startswith("lit_model"):
        return lora_state(turn)
    if last.endswith("_model_states.pt"):
        return deepspeed_state(turn)
    if not last or last.endswith((".pt", ".pth", ".bin", ".pkl")):
        return torch_state(turn)
    return f"{name} {turn}\n".encode()


TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja")
STATES = ("training_args.bin", "optimizer.pt", "scheduler.pt")
FSDP = (
    "pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata", "optimizer_0/__0_0.distcp",
    "optimizer_0/.metadata", "scheduler.pt", "rng_state_0.pth", STATE,
)  # fmt: skip
ENGINE = "global_step8/mp_rank_00_model_states.pt"
OPTIMIZERS = tuple(f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1))


def _own(names: tuple[str, ...], *without: str) -> tuple[str, ...]:
    return tuple(name for name in names if name not in ("README.md", *without))


def _trainer(model: tuple[str, ...], rest: tuple[str, ...], **more: Any) -> Writing:
    first = (*model, *rest)
    return Writing("checkpoint-500", first, covered=_own(first), **more)


WRITINGS: dict[str, Writing] = {
    "adapter": _trainer(("README.md", WEIGHTS, CONFIG, *TOKENIZER), (*STATES, "rng_state.pth", STATE)),
    "adapter of two ranks": _trainer(
        ("README.md", WEIGHTS, CONFIG, *TOKENIZER), (*STATES, "rng_state_0.pth", STATE), others=(("rng_state_1.pth",),)
    ),
    "adapter alone": _trainer((WEIGHTS, CONFIG), (STATE,)),
    "model": _trainer(
        ("config.json", "generation_config.json", "model.safetensors", *TOKENIZER), (*STATES, "rng_state.pth", STATE)
    ),
    "model in shards": _trainer(
        ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
         "model.safetensors.index.json", *TOKENIZER), (*STATES, STATE),
    ),
    "pickled model": _trainer(("config.json", "pytorch_model.bin", *TOKENIZER), (*STATES, STATE)),
    "sharded by FSDP": Writing(
        "checkpoint-500", FSDP, (("pytorch_model_fsdp_0/__1_0.distcp",), ("rng_state_1.pth",)),
        covered=(*FSDP, "pytorch_model_fsdp_0/__1_0.distcp"), barrier="pytorch_model_fsdp_0/.metadata",
    ),
    "adapter with DeepSpeed's state": Writing(
        "checkpoint-500",
        (WEIGHTS, CONFIG, "training_args.bin", ENGINE, f"global_step8/{OPTIMIZERS[0]}", "latest", "rng_state_0.pth",
         STATE),
        ((f"global_step8/{OPTIMIZERS[1]}",),), barrier="rng_state_0.pth",
        covered=(WEIGHTS, CONFIG, "training_args.bin", ENGINE, f"global_step8/{OPTIMIZERS[0]}",
                 f"global_step8/{OPTIMIZERS[1]}", "rng_state_0.pth", STATE),
        content={"latest": b"global_step8"},
    ),
    "distributed": Writing(
        "step-500", ("__0_0.distcp", ".metadata"), (("__1_0.distcp",),), barrier=".metadata",
        covered=("__0_0.distcp", "__1_0.distcp", ".metadata"),
    ),
    "DeepSpeed": Writing(
        "global_step8", (ENGINE[13:], OPTIMIZERS[0], "../latest"), ((OPTIMIZERS[1],),),
        covered=(ENGINE[13:], OPTIMIZERS[0]), there=(OPTIMIZERS[1],), content={"../latest": b"global_step8"},
    ),
    "torchtune": Writing(
        "epoch_0", ("adapter_model.pt", WEIGHTS, CONFIG, *TOKENIZER, "recipe_state.pt"),
        covered=("adapter_model.pt", WEIGHTS, CONFIG, *TOKENIZER),
    ),
    "torchtune 0.6": Writing(
        "epoch_0",
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
         "adapter_model.pt", WEIGHTS, CONFIG, *TOKENIZER, "config.json", "../recipe_state/recipe_state.pt"),
        covered=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "adapter_model.pt", WEIGHTS,
                 CONFIG, *TOKENIZER, "config.json"),
    ),
    "torchtune's last": Writing(
        "epoch_1", ("adapter_model.pt", WEIGHTS, CONFIG, *TOKENIZER),
        covered=("adapter_model.pt", WEIGHTS, CONFIG, *TOKENIZER), ends="whole",
    ),
    "litgpt": Writing(
        "step-000500", ("lit_model.pth.lora", "config.json", "tokenizer.json", "model_config.yaml",
                        "hyperparameters.yaml", "prompt_style.yaml"),
        covered=("lit_model.pth.lora", "config.json", "tokenizer.json", "model_config.yaml", "hyperparameters.yaml"),
    ),
    "accelerate": Writing(
        "states", ("model.safetensors", "optimizer.bin", "scheduler.bin", "sampler.bin", "random_states_0.pkl",
                   "custom_checkpoint_0.pkl"),
        (("random_states_1.pkl",),),
        covered=("model.safetensors", "optimizer.bin", "scheduler.bin", "sampler.bin", "random_states_0.pkl"),
    ),
    "saved by PEFT": Writing("sql", ("README.md", WEIGHTS, CONFIG), covered=(WEIGHTS, CONFIG), ends="whole"),
    "saved by transformers": Writing(
        "model", ("config.json", "model.safetensors", *TOKENIZER),
        covered=("config.json", "model.safetensors"), ends="whole",
    ),
    "marked by anybody": Writing("sql", (WEIGHTS, CONFIG, "STABLE"), covered=(WEIGHTS, CONFIG)),
    "a torch file": Writing("model.pt", ("",), covered=("",)),
    "a Lightning file": Writing("epoch=1-step=16.ckpt", ("",), covered=("",)),
}  # fmt: skip


class Disk:
    """A folder in which each write has a time of its own, later than all before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._now = 10**18

    def file(self, name: str) -> Path:
        path = Path(os.path.normpath(self.folder / name)) if name else self.folder
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def stamp(self, path: Path) -> None:
        self._now += 1000
        os.utime(path, ns=(self._now, self._now))

    def has(self, name: str, content: bytes) -> bool:
        path = self.file(name)
        return path.is_file() and path.read_bytes() == content

    def remove(self) -> Iterator[str]:
        """Take the files away one by one."""
        for path in sorted(self.folder.rglob("*"), key=lambda path: path.name[::-1]):
            if path.is_file():
                path.unlink()
                yield path.name
        shutil.rmtree(self.folder)


def pieces(disk: Disk, name: str, content: bytes, way: Way, cuts: list[int]) -> Iterator[str]:
    """Write a file as one writer does, stopping at each of these bytes."""
    path = disk.file(name)
    if way == "renamed" or name.endswith(".metadata"):
        temporary = path.with_name(
            f".tmp{len(path.name)}{path.name[:20]}" if path.name != ".metadata" else ".metadata.tmp"
        )
        yield from _grow(disk, temporary, content, cuts)
        temporary.rename(path)
        yield "renamed"
    elif way == "filled" and name.endswith(".safetensors"):
        with path.open("wb", buffering=0) as file:
            file.truncate(len(content))
            for begin, end in pairwise((0, *cuts, len(content))):
                file.write(content[begin:end])
                disk.stamp(path)
                yield f"{end} filled"
    else:
        yield from _grow(disk, path, content, cuts)


def _grow(disk: Disk, path: Path, content: bytes, cuts: list[int]) -> Iterator[str]:
    with path.open("wb", buffering=0) as file:
        for begin, end in pairwise((0, *cuts, len(content))):
            file.write(content[begin:end])
            disk.stamp(path)
            yield f"{path.name} to {end}"
