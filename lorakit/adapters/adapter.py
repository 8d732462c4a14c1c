"""An adapter as a value: lazy, immutable, and cheap to combine.

a = lorakit.load_adapter("runs/sql/checkpoint-500")
mixed = 0.7 * a + 0.3 * lorakit.load_adapter("runs/chat")
mixed.save("mixed")
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.adapters.config import AdapterConfig, ensure_plain, read_config
from lorakit.adapters.delta import Delta, Kind, Term
from lorakit.adapters.keys import FACTORS, Key, base_path, is_base_copy, parse_key
from lorakit.adapters.patterns import chosen, weights_by_module
from lorakit.adapters.source import Source, Stage
from lorakit.adapters.trained import Blend, Trained
from lorakit.errors import Incomplete, InvalidFile, NotFound, UnsupportedAdapter
from lorakit.files.folders import file_state
from lorakit.files.safetensors import StoredTensor, read_header
from lorakit.files.tensors import same_bytes

if TYPE_CHECKING:
    from lorakit.mix.report import MixReport

WEIGHTS = "adapter_model.safetensors"
UNFINISHED = "checkpoint-is-incomplete.txt"  # transformers' sentinel while a checkpoint is written on SIGTERM

Weight = float | Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Adapter:
    """Deltas by module path, what is added to biases, and where all of it came from.

    `others` are the stored tensors that are neither. `trained` are tensors in the place of the base's, to be written
    with it. With `own_ranks` each module is written with its own rank, else all with the largest. Nothing is computed
    until it is asked for.
    """

    deltas: Mapping[str, Delta]
    sources: tuple[Source | Stage, ...]
    others: tuple[StoredTensor, ...] = ()
    config: AdapterConfig = field(default_factory=AdapterConfig)
    biases: Mapping[str, Blend] = field(default_factory=dict)
    trained: Trained = field(default_factory=Trained)
    own_ranks: bool = False
    reported: Callable[[], MixReport] | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        return " + ".join(f"{source.folder}" for source in self.files())

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

    @property
    def report(self) -> MixReport | None:
        """What was done to make it, and how exact it was; None of what was only read or added up."""
        return None if self.reported is None else self.reported()

    def files(self) -> tuple[Source, ...]:
        """The folders that it was read from, each once."""
        every = (file for source in self.sources for file in source.files())
        return tuple({(file.file, file.state): file for file in every}.values())

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

    def ensure_stored(self, *, work: str) -> None:
        """Raises UnsupportedAdapter when it is more than a weighted sum of folders: only those can be named again."""
        if self.trained or any(isinstance(source, Stage) or source.parts for source in self.sources):
            raise UnsupportedAdapter(
                f"an adapter that was computed from '{self.name}' can't be {work} itself: save it, and name that folder"
            )

    def plain(self, *, work: str) -> Adapter:
        """Itself as deltas: an adapter of another method of PEFT becomes one where its change is exactly of low rank.

        Raises:
            UnsupportedAdapter: there is more in it than deltas, biases of lora_B, and PEFT's copies of the base.
        """
        if self.config.peft_type != "LORA":
            from lorakit.adapters.plain import as_lora

            return as_lora(self).plain(work=work)
        others = [stored.name for stored in self.others if not is_base_copy(stored.name)]
        ensure_plain(self.config, self.name, others, work=work, besides=frozenset({"lora_bias"}))
        return self

    def ensure_unchanged(self) -> None:
        """Raises Conflict when a file was written again since it was opened."""
        for source in self.sources:
            source.ensure_unchanged()

    def scaled(self, weight: Weight) -> Adapter:
        """Its deltas times `weight`, or each module's times the weight of the first pattern that names it.

        Raises:
            UnsupportedAdapter: there is more in it than deltas.
            UsageError: a module has no weight, or a pattern no module; see `weights_by_module`.
        """
        return self.plain(work="scaled").weighted(weight)

    def weighted(self, weight: Weight) -> Adapter:
        """Its deltas and biases times `weight`; what is neither stays as it is."""
        if isinstance(weight, Mapping):
            return self._weighted_by_module(weight)
        return replace(
            self,
            deltas={module: delta.scaled(weight) for module, delta in self.deltas.items()},
            biases={module: bias.scaled(weight) for module, bias in self.biases.items()},
            sources=tuple(replace(source, weight=source.weight * weight) for source in self.sources),
            reported=None,
        )

    def _weighted_by_module(self, patterns: Mapping[str, float]) -> Adapter:
        weights = weights_by_module(patterns, self.deltas, self.name)
        said = ", ".join(f"{pattern}={weight:g}" for pattern, weight in patterns.items())
        return replace(
            self,
            deltas={module: delta.scaled(weights[module]) for module, delta in self.deltas.items()},
            biases={module: bias.scaled(weights[module]) for module, bias in self.biases.items()},
            sources=tuple(replace(source, parts=(*source.parts, said)) for source in self.sources),
            reported=None,
        )

    def only(self, *patterns: str) -> Adapter:
        """The modules that any of the patterns names: `*.mlp.*`, or the end of a path, `q_proj`.

        Raises:
            NotFound: a pattern names none.
            UnsupportedAdapter: there is more in it than deltas.
        """
        adapter = self.plain(work="taken apart")
        return adapter._of(chosen(patterns, adapter.deltas, self.name), f"only {', '.join(patterns)}")

    def without(self, *patterns: str) -> Adapter:
        """All modules but those that any of the patterns names; see `only`."""
        adapter = self.plain(work="taken apart")
        out = chosen(patterns, adapter.deltas, self.name)
        return adapter._of(adapter.deltas.keys() - out, f"without {', '.join(patterns)}")

    def _of(self, modules: Iterable[str], said: str) -> Adapter:
        kept = frozenset(modules)
        return replace(
            self,
            deltas={module: delta for module, delta in self.deltas.items() if module in kept},
            biases={module: bias for module, bias in self.biases.items() if module in kept},
            others=tuple(stored for stored in self.others if base_path(stored.name).removesuffix(".weight") in kept),
            sources=tuple(replace(source, parts=(*source.parts, said)) for source in self.sources),
            reported=None,
        )

    def plus(self, other: Adapter) -> Adapter:
        """The exact sum: factors are stacked, whatever the ranks and modules; biases of `lora_bias` are added up.

        Raises:
            UnsupportedAdapter: one of them has more than deltas.
            WrongBase: a module has different shapes in the two.
        """
        mine, theirs = self.plain(work="mixed"), other.plain(work="mixed")
        for adapter in (mine, theirs):
            if adapter.trained:
                raise UnsupportedAdapter(
                    f"adapter '{adapter.name}' holds trained copies of the base's weights, which can't be added up: "
                    f"lorakit.mix(..., trained='average') averages them"
                )
        deltas, biases = dict(mine.deltas), dict(mine.biases)
        for module, delta in theirs.deltas.items():
            deltas[module] = deltas[module].plus(delta, module=module) if module in deltas else delta
        for module, bias in theirs.biases.items():
            biases[module] = biases[module].plus(bias, name=module) if module in biases else bias
        return Adapter(
            deltas, _added_up(mine.sources + theirs.sources), _agreed(mine.others, theirs.others), mine.config, biases,
            own_ranks=mine.own_ranks or theirs.own_ranks,
        )  # fmt: skip

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write a PEFT folder that PEFT and vLLM load. Whole or not at all.

        Raises:
            Conflict: `folder` exists, or a source was written again since it was opened.
        """
        from lorakit.adapters.writing import save_adapter

        return save_adapter(self, Path(folder))

    def __mul__(self, weight: Weight) -> Adapter:
        if isinstance(weight, Mapping):
            return self.scaled(weight)
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
        known = all(delta.known_rank is not None for delta in self.deltas.values())
        return f"Adapter({self.name!r}, rank={self.rank if known else '?'}, modules={len(self.deltas)})"


def _added_up(sources: tuple[Source | Stage, ...]) -> tuple[Source | Stage, ...]:
    together: dict[Any, Source | Stage] = {}
    for source in sources:
        same = together.get(source.key)
        together[source.key] = source if same is None else replace(same, weight=same.weight + source.weight)
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
    biases, others = _biases_of(deltas, others, config)
    return Adapter(deltas, (source,), others, config, biases)


def _biases_of(
    deltas: Mapping[str, Delta], others: tuple[StoredTensor, ...], config: AdapterConfig
) -> tuple[dict[str, Blend], tuple[StoredTensor, ...]]:
    """`lora_bias`: scale · (the bias of lora_B) is added to the module's own; and the tensors that are none."""
    biases: dict[str, Blend] = {}
    rest: list[StoredTensor] = []
    for stored in others:
        key = parse_key(stored.name)
        if key.part == "lora_B_bias" and key.module in deltas and config.peft_type == "LORA":
            biases[key.module] = Blend(((stored, config.scale_of(key.module)),))
        else:
            rest.append(stored)
    return biases, tuple(rest)


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
