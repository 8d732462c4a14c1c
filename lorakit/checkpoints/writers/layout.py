"""What a writer of checkpoints is to the rest: what it left in a place, and what its last file says."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from lorakit.checkpoints.places import Entry, Place, entry_of

Kind = Literal["adapter", "regular"]
Part = Literal["model", "optimizer", "scheduler", "scaler", "rng", "trainer_state"]
PARTS: tuple[Part, ...] = ("model", "optimizer", "scheduler", "scaler", "rng", "trainer_state")
WriterName = Literal[
    "transformers", "peft", "huggingface", "torchtune", "litgpt", "lightning", "dcp", "deepspeed", "accelerate",
    "fsdp", "torch", "lorakit",
]  # fmt: skip

CHECKPOINT = re.compile(r"checkpoint-(\d{1,18})")
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLED = ("adapter_model.bin", "adapter_model.pt")
COMPANIONS = re.compile(r"(tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|.*\.jinja)")


@dataclass(frozen=True, slots=True)
class Layout:
    """One checkpoint by the names of its files, each relative to its place: `optimizer.pt`, `global_step8/…`.

    `missing`: names without which it is of no use, and that are not there. `covered`: what its writer's last file
    vouches for. `late`: what other ranks write, maybe after that file. `weights`: what a model or adapter is in.
    """

    writer: WriterName
    kind: Kind | None
    holds: tuple[Part, ...] = ()
    covered: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    refusal: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.covered, *self.late)))


@dataclass(frozen=True, slots=True)
class LastWord:
    """A writer's last file: when it was written, and what speaks against believing it, if anything does.

    `partly`: it is still being written itself. `timeless`: it vouches for what is newer, too.
    """

    file: str
    written: int = 0  # nanoseconds since 1970
    against: str | None = None
    partly: bool = False
    timeless: bool = False


class Writer(Protocol):
    """Each module beside this one is one."""

    def layout(self, place: Place) -> Layout | None:
        """What it has left there; None when that is not its work. Raises OSError."""

    def last_word(self, place: Place, layout: Layout) -> LastWord | None:
        """What its last file says; None where there is none, so that only quiet time tells."""


def parts(**there: object) -> tuple[Part, ...]:
    """The names of what is there, in the order of `PARTS`."""
    return tuple(part for part in PARTS if there.get(part))


def written(place: Place, names: Iterable[str]) -> int:
    """When the last of these was written, in nanoseconds since 1970."""
    found = (entry_of(place, name) for name in names)
    return max((entry.written for entry in found if entry is not None), default=0)


def all_inside(place: Place, folder: str, depth: int = 4) -> tuple[str, ...]:
    """Every file in a folder of the place, as `folder/…/name`; no deeper than writers go, as links may go round."""
    found: list[str] = []
    holder = place.inside(folder)
    for name, entry in holder.entries.items():
        if not entry.is_folder:
            found.append(f"{folder}/{name}")
        elif depth:
            found += [f"{folder}/{inner}" for inner in all_inside(holder, name, depth - 1)]
    return tuple(sorted(found))


def folders(place: Place) -> tuple[str, ...]:
    return tuple(name for name, entry in place.entries.items() if entry.is_folder)


def plain_files(place: Place) -> dict[str, Entry]:
    return {name: entry for name, entry in place.entries.items() if not entry.is_folder}
