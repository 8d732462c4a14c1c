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
from typing import Any

from lorakit.adapters.config import AdapterConfig, ensure_plain
from lorakit.adapters.delta import Delta, require_finite
from lorakit.adapters.keys import base_path, is_base_copy
from lorakit.adapters.patterns import chosen, weights_by_module
from lorakit.adapters.report import MixReport, Weight
from lorakit.adapters.source import Source, Stage
from lorakit.adapters.trained import Blend, Trained, is_kept
from lorakit.errors import NotFound, UnsupportedAdapter, UsageError
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import same_bytes

TIED = "ensure_weight_tying"


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
        if self.trained:
            raise UnsupportedAdapter(
                f"adapter '{self.name}' can't be {work} exactly: it holds trained copies of the base's values, "
                f"which no weight scales; to average them between adapters, ask for it (mix --trained average)"
            )
        if self.config.peft_type != "LORA":
            from lorakit.adapters.plain import as_lora

            return as_lora(self).plain(work=work)
        others = [stored.name for stored in self.others if not is_kept(self.config, stored.name)]
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
        require_finite(weight)
        return replace(
            self,
            deltas={module: delta.scaled(weight) for module, delta in self.deltas.items()},
            biases={module: bias.scaled(weight) for module, bias in self.biases.items()},
            sources=tuple(replace(source, weight=source.weight * weight) for source in self.sources),
            reported=None,
        )

    def _weighted_by_module(self, patterns: Mapping[str, float]) -> Adapter:
        weights = weights_by_module(patterns, (*self.deltas, *self.trained.owners), self.name)
        said = ", ".join(f"{pattern}={weight!r}" for pattern, weight in patterns.items())
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
        if not kept:
            raise UsageError(f"no module is left of adapter '{self.name}': {said or 'no pattern is given'}")
        return replace(
            self,
            deltas={module: delta for module, delta in self.deltas.items() if module in kept},
            biases={module: bias for module, bias in self.biases.items() if module in kept},
            others=tuple(
                stored
                for stored in self.others
                if not is_base_copy(stored.name) or base_path(stored.name).removesuffix(".weight") in kept
            ),
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
        deltas, biases = dict(mine.deltas), dict(mine.biases)
        for module, delta in theirs.deltas.items():
            deltas[module] = deltas[module].plus(delta, module=module) if module in deltas else delta
        for module, bias in theirs.biases.items():
            biases[module] = biases[module].plus(bias, name=module) if module in biases else bias
        others = _agreed(mine.others, theirs.others)
        own_ranks = mine.own_ranks or theirs.own_ranks
        sources = _added_up(mine.sources + theirs.sources)
        config = _shared(mine.config, theirs.config)
        return Adapter(deltas, sources, others, config, biases, own_ranks=own_ranks)

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


def _shared(config: AdapterConfig, other: AdapterConfig) -> AdapterConfig:
    """The first one's, but tied (`ensure_weight_tying`) only where both are."""
    if config.raw.get(TIED) == other.raw.get(TIED):
        return config
    return replace(config, raw={name: value for name, value in config.raw.items() if name != TIED})


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
