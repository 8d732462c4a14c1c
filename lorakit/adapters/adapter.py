"""An adapter as a value: lazy, immutable, and cheap to combine.

a = lorakit.load_adapter("runs/sql/checkpoint-500")
mixed = 0.7 * a + 0.3 * lorakit.load_adapter("runs/chat")
mixed.save("mixed")
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.adapters.config import AdapterConfig, read_config, require_plain_lora
from lorakit.adapters.delta import Delta, Kind, Term
from lorakit.adapters.keys import FACTORS, Key, is_base_copy, parse_key
from lorakit.errors import Conflict, Incomplete, InvalidFile, NotFound, UnsupportedAdapter
from lorakit.files.folders import FileState, file_state
from lorakit.files.safetensors import StoredTensor, read_header
from lorakit.files.tensors import same_bytes

if TYPE_CHECKING:
    from lorakit.mix.mix import MixReport

WEIGHTS = "adapter_model.safetensors"
UNFINISHED = "checkpoint-is-incomplete.txt"  # transformers' sentinel while a checkpoint is written on SIGTERM


@dataclass(frozen=True, slots=True)
class Source:
    """A folder that an adapter was read from, and the weight it was given in a sum."""

    folder: Path
    config: AdapterConfig
    file: Path
    state: FileState
    weight: float = 1.0

    def ensure_unchanged(self) -> None:
        """Raises Conflict when the file was written again since its header was read."""
        if file_state(self.file) != self.state:
            raise Conflict(f"'{self.file}' was written again while it was read: start anew when its writer is done")


@dataclass(frozen=True, slots=True)
class Adapter:
    """Deltas by module path, tensors that are no low-rank factors, and where all of it came from."""

    deltas: Mapping[str, Delta]
    sources: tuple[Source, ...]
    others: tuple[StoredTensor, ...] = ()
    report: MixReport | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        return " + ".join(f"{source.folder}" for source in self.sources)

    @property
    def config(self) -> AdapterConfig:
        return self.sources[0].config

    @property
    def base(self) -> str | None:
        """`base_model_name_or_path`, as the trainer wrote it."""
        return self.config.base

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max((delta.rank for delta in self.deltas.values()), default=0)

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(self.deltas)

    def delta(self, module: str) -> Delta:
        """What the adapter adds to one module.

        Raises:
            NotFound: the adapter leaves that module alone; names the nearest it has.
        """
        from difflib import get_close_matches

        path = module.removeprefix("base_model.model.").removesuffix(".weight")
        if path not in self.deltas:
            near = get_close_matches(path, self.deltas, n=3)
            raise NotFound(f"adapter '{self.name}' has no delta for '{module}'; nearest: {', '.join(near) or 'none'}")
        return self.deltas[path]

    def require_plain(self, *, work: str) -> None:
        """Raises UnsupportedAdapter when there is more in it than low-rank factors and PEFT's copies of the base."""
        for source in self.sources:
            others = [
                stored.name for stored in self.others if stored.file == source.file and not is_base_copy(stored.name)
            ]
            require_plain_lora(source.config, str(source.folder), others, work=work)

    def ensure_unchanged(self) -> None:
        """Raises Conflict when a file was written again since it was opened."""
        for source in self.sources:
            source.ensure_unchanged()

    def scaled(self, weight: float) -> Adapter:
        """Raises UnsupportedAdapter when there is more in it than low-rank factors."""
        self.require_plain(work="scaled")
        return self.weighted(weight)

    def weighted(self, weight: float) -> Adapter:
        """Its deltas times `weight`; what is no delta stays as it is."""
        return replace(
            self,
            deltas={module: delta.scaled(weight) for module, delta in self.deltas.items()},
            sources=tuple(replace(source, weight=source.weight * weight) for source in self.sources),
            report=None,
        )

    def plus(self, other: Adapter) -> Adapter:
        """The exact sum: factors are stacked, whatever the ranks and modules.

        Raises:
            UnsupportedAdapter: one of them has more than low-rank factors.
            WrongBase: a module has different shapes in the two.
        """
        self.require_plain(work="mixed")
        other.require_plain(work="mixed")
        deltas = dict(self.deltas)
        for module, delta in other.deltas.items():
            deltas[module] = deltas[module].plus(delta, module=module) if module in deltas else delta
        return Adapter(deltas, _added_up(self.sources + other.sources), _agreed(self.others, other.others))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write a PEFT folder that PEFT and vLLM load. Whole or not at all.

        Raises:
            Conflict: `folder` exists.
        """
        from lorakit.adapters.writing import save_adapter

        return save_adapter(self, Path(folder))

    def __mul__(self, weight: float) -> Adapter:
        return self.scaled(float(weight)) if isinstance(weight, int | float) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Adapter:
        return self.scaled(1 / divisor)

    def __neg__(self) -> Adapter:
        return self.scaled(-1.0)

    def __add__(self, other: Adapter) -> Adapter:
        return self.plus(other) if isinstance(other, Adapter) else NotImplemented

    def __sub__(self, other: Adapter) -> Adapter:
        return self.plus(other.scaled(-1.0)) if isinstance(other, Adapter) else NotImplemented

    def __radd__(self, other: Any) -> Adapter:
        """So that `sum([a, b])` works: it starts from 0."""
        return self if other == 0 else NotImplemented

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, rank={self.rank}, modules={len(self.deltas)})"


def _added_up(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    together: dict[tuple[Path, FileState], Source] = {}
    for source in sources:
        same = together.get((source.file, source.state))
        together[source.file, source.state] = (
            source if same is None else replace(same, weight=same.weight + source.weight)
        )
    return tuple(together.values())


def _agreed(mine: tuple[StoredTensor, ...], others: tuple[StoredTensor, ...]) -> tuple[StoredTensor, ...]:
    """Copies of the base are kept as they are; where two adapters hold the same one, it has to be equal."""
    agreed = {stored.name: stored for stored in mine}
    for stored in others:
        known = agreed.setdefault(stored.name, stored)
        if known != stored and not same_bytes(known, stored):
            raise UnsupportedAdapter(
                f"'{known.file.parent}' and '{stored.file.parent}' hold different values of '{stored.name}': "
                f"they were trained on different bases, or resized the vocabulary, and can't be mixed"
            )
    return tuple(agreed.values())


def load_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Open an adapter in PEFT layout: reads its config and its header, no tensor.

    Raises:
        NotFound: there is no such folder.
        Incomplete: it is still being written.
        InvalidFile: a file in it is missing, cut short, or contradicts another.
    """
    path = Path(folder)
    if not path.is_dir():
        raise NotFound(f"there is no adapter folder '{path}'")
    if (path / UNFINISHED).exists():
        raise Incomplete(f"'{path}' is still being written: it holds {UNFINISHED}")
    config = read_config(path)
    file = (path / WEIGHTS).resolve()
    if not file.is_file():
        pickled = next((name for name in ("adapter_model.bin", "adapter_model.pt") if (path / name).is_file()), None)
        if pickled:
            raise InvalidFile(f"'{path}' holds {pickled}, a pickle: save the adapter as safetensors")
        raise InvalidFile(f"'{path}' has an adapter_config.json, but no {WEIGHTS}: it is incomplete")
    state = file_state(file)
    header = read_header(file)
    source = Source(path.resolve(), config, file, state)
    deltas, others = deltas_of(header.tensors.values(), config, path)
    if not deltas and not others:
        raise InvalidFile(f"'{path / WEIGHTS}' holds no tensor")
    return Adapter(deltas, (source,), others)


def deltas_of(tensors: Any, config: AdapterConfig, folder: Path) -> tuple[dict[str, Delta], tuple[StoredTensor, ...]]:
    """Pair the factors: deltas by module, and all that is no factor."""
    factors: dict[str, dict[str, StoredTensor]] = {}
    others: list[StoredTensor] = []
    adapters: set[str] = set()
    for stored in tensors:
        key: Key = parse_key(stored.name)
        if key.part not in FACTORS or not _is_plain_factor(stored, key, config):
            others.append(stored)
            continue
        if key.adapter:
            adapters.add(key.adapter)
        parts = factors.setdefault(key.module, {})
        if key.part in parts:
            raise InvalidFile(f"'{folder}': '{stored.name}' and '{parts[key.part].name}' name the same factor")
        parts[key.part] = stored
    if len(adapters) > 1:
        raise InvalidFile(f"'{folder}' holds several adapters in one file ({', '.join(sorted(adapters))}): split them")
    deltas = {module: _delta(module, parts, config, folder) for module, parts in factors.items()}
    return deltas, tuple(others)


def _is_plain_factor(stored: StoredTensor, key: Key, config: AdapterConfig) -> bool:
    """Not the factors of a convolution, nor of all experts of a layer at once (PEFT's `target_parameters`)."""
    if len(stored.shape) != 2 or config.peft_type != "LORA":
        return False
    if not (config.raw.get("target_parameters") or key.module.removesuffix(".base_layer").endswith(".experts")):
        return True
    rank = stored.shape[0] if key.part == "lora_A" else stored.shape[1]
    return rank == config.rank_of(key.module)


def _delta(module: str, parts: Mapping[str, StoredTensor], config: AdapterConfig, folder: Path) -> Delta:
    kind: Kind = "embedding" if any(part.startswith("lora_embedding") for part in parts) else "linear"
    prefix = "lora_embedding_" if kind == "embedding" else "lora_"
    try:
        a, b = parts[prefix + "A"], parts[prefix + "B"]
    except KeyError as error:
        raise InvalidFile(f"'{folder}': '{module}' has no {error.args[0]}") from None
    if a.shape[0] != b.shape[1]:
        raise InvalidFile(f"'{folder}': the factors of '{module}' don't fit: B {list(b.shape)}, A {list(a.shape)}")
    if a.shape[0] != config.rank_of(module):
        raise InvalidFile(
            f"'{folder}': '{module}' has rank {a.shape[0]}, but its config says {config.rank_of(module)}: "
            f"the scale can't be known"
        )
    return Delta((Term(b, a, config.scale_of(module)),), kind)
