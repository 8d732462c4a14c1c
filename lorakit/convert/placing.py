"""Each tensor of a checkpoint to its place in the model, and what the config has to say then."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from lorakit.convert.expected import Expected, Part
from lorakit.convert.names import Named, named
from lorakit.convert.source import ByteRun, CopiedTensor, Source, SourceTensor, same_bits
from lorakit.convert.vocabulary import settled, with_vocabulary
from lorakit.errors import Refused, UnplacedTensors, WrongBase
from lorakit.files.safetensors import DTYPE_BITS
from lorakit.files.tensors import FLOATS
from lorakit.merge.tied import untied

if TYPE_CHECKING:
    import torch

SHOWN = 8  # tensors that an error names
AS_IT_IS = "load it in vLLM as it is"

# Here `tie_word_embeddings: false` says that the decoder's output is not scaled; two weights that differ stay two.
_ALWAYS_TIED = frozenset({"t5", "longt5", "pop2piano"})


@dataclass(frozen=True, slots=True)
class PartOf:
    """Elements of another tensor, from `begin` on."""

    whole: SourceTensor
    begin: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.whole.dtype

    def read(self, begin: int, end: int) -> torch.Tensor:
        return self.whole.read(self.begin + begin, self.begin + end)

    def byte_runs(self) -> tuple[ByteRun, ...] | None:
        runs = self.whole.byte_runs() if isinstance(self.whole, CopiedTensor) else None
        if runs is None:
            return None
        bits = DTYPE_BITS[self.dtype]
        first, last = self.begin * bits // 8, (self.begin + math.prod(self.shape)) * bits // 8
        return tuple(_cut(runs, first, last))


def _cut(runs: Iterable[ByteRun], first: int, last: int) -> Iterable[ByteRun]:
    position = 0
    for run in runs:
        begin, end = max(first, position), min(last, position + run.nbytes)
        if begin < end:
            yield ByteRun(run.file, run.start + begin - position, end - begin)
        position += run.nbytes


class Placing:
    """`tensors` by their names in the running model, or by those in its files where the source has these; `renamed` and
    `left_out` by those in the source, `config` as it becomes.
    """

    def __init__(self, source: Source, expected: Expected, config: dict[str, Any]) -> None:
        self.source = source
        self.expected = expected
        self.config = config
        self.tensors: dict[str, SourceTensor] = {}
        self.extra: dict[str, SourceTensor] = {}  # what its files may hold beside the model
        self.as_stored = False  # whether the source has the names of files, which are others here and there
        self.renamed: dict[str, str] = {}
        self.left_out = dict(source.left_out)
        self.notes: list[str] = []
        stored = expected.stored.items()
        self._stored_names = {part.whole: name for name, part in stored if part.whole is not None and part.begin == 0}
        section = self.config.pop("quantization_config", None)
        self.quantised = str(section.get("quant_method", "an unnamed method")) if isinstance(section, dict) else None

    def place(self, *, strict: bool) -> None:
        expected, source = self.expected, self.source
        sources = {name: tensor.shape for name, tensor in source.tensors.items()}
        found = named(sources, expected.shapes, expected.tied)
        in_files = {name: part.shape for name, part in expected.stored.items()}
        if found.unplaced and in_files.keys() != expected.shapes.keys():
            spare = [name for name, part in expected.stored.items() if part.whole in expected.tied]
            others = named(sources, in_files, spare)
            self.as_stored = len(others.unplaced) < len(found.unplaced)
            found = others if self.as_stored else found
        if found.rivals:
            raise UnplacedTensors(self._rivals_message(*found.rivals))
        extra: dict[str, str] = {}
        for name, place in found.unplaced.items():
            if expected.is_ignored(place) and place not in expected.shapes:
                extra.setdefault(place, name)
        ignored = set(extra.values())
        unplaced = [name for name in found.unplaced if name not in ignored]
        if unplaced and strict:
            raise UnplacedTensors(self._unplaced_message(unplaced, found))
        if found.passed and found.passed[1] in unplaced:
            taken, passed = found.passed
            self.notes.append(f"'{taken}' is taken and not '{passed}', as more of those with its prefix have a place")
        self.tensors = {place: source.tensors[name] for name, place in found.names.items()}
        self.extra = {place: source.tensors[name] for place, name in extra.items()}
        places = {**found.names} | {name: place for place, name in extra.items()}
        self.renamed = {name: place for name, place in places.items() if name != place}
        if found.recomputed:
            self.left_out["buffers, which are computed anew wherever the model runs"] = found.recomputed
        if unplaced:
            self.left_out["tensors that the model has no place for"] = tuple(unplaced)

    def _rivals_message(self, one: str, other: str) -> str:
        return (
            f"'{self.source.path}' holds '{one}' and '{other}', which fit the same place of the model that its config "
            f"describes, and so do others beside them: which of the two models is meant can't be told. Save it alone"
        )

    def _unplaced_message(self, unplaced: Sequence[str], found: Named) -> str:
        near = get_close_matches(unplaced[0], self.expected.shapes, n=1, cutoff=0.5)
        lines = _listed(unplaced)
        hint = f"\nThe nearest name to '{unplaced[0]}' is '{near[0]}'" if near else ""
        cure = "Name the model that it was trained from with --like, or go on without them with --no-strict"
        if self.quantised:
            cure = f"Its weights are quantised (by {self.quantised}), and those in 16 bit are converted: {AS_IT_IS}"
        elif any(".lora_" in name for name in unplaced):
            cure = "These are an adapter's: save the adapter alone, and merge it (lorakit merge)"
        return (
            f"{len(unplaced)} of {len(self.source.tensors)} tensors of '{self.source.path}' have no place in the model "
            f"that its config describes ({len(found.names)} have one):{lines}{hint}\n{cure}"
        )

    def _as_placed(self, name: str) -> str:
        """A name in the running model as `tensors` has it."""
        return self._stored_names.get(name, name) if self.as_stored else name

    @property
    def tied(self) -> dict[str, str]:
        return {self._as_placed(name): self._as_placed(first) for name, first in self.expected.tied.items()}

    @property
    def tables(self) -> set[str]:
        return {self._as_placed(name) for name in self.expected.tables}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        if self.as_stored:
            return {name: part.shape for name, part in self.expected.stored.items()}
        return self.expected.shapes

    def ensure_not_quantised(self) -> None:
        """A config that was copied from a quantised base says that the weights are, and they are not any more."""
        integers = {self._as_placed(name) for name in self.expected.integers}
        quantised = (name for name, one in self.tensors.items() if one.dtype not in FLOATS and name not in integers)
        kept = next(quantised, None)
        if kept is not None and self.quantised is not None:
            raise Refused(
                f"'{kept}' in '{self.source.path}' is quantised (by {self.quantised}), and weights in 16 bit are "
                f"converted: {AS_IT_IS}"
            )
        if kept is not None:
            raise Refused(
                f"'{kept}' in '{self.source.path}' is {self.tensors[kept].dtype}, and config.json says nothing of a "
                f"quantisation: no engine would know what its numbers stand for. Convert what it was made from"
            )
        if self.quantised is not None:
            self.notes.append(
                f"config.json says no more that the weights are quantised (by {self.quantised}): they aren't"
            )

    def settle_tied(self, dtype: str | None = None) -> None:
        """Weights of two names are written once where all such pairs are equal bit for bit, as they will be written;
        else each as two, for the config can only say it of all. `dtype`: what floats are rounded to, if they are.
        """
        pairs = {name: first for name, first in self.tied.items() if name in self.tensors}
        for name, first in pairs.items():
            self.tensors.setdefault(first, self.tensors[name])
        both = [(pair, self.tensors[pair[0]], self.tensors[pair[1]]) for pair in pairs.items()]
        unequal = next((pair for pair, mine, other in both if not same_bits(mine, other, dtype)), None)
        if unequal is None:
            for name in pairs:
                del self.tensors[name]
            return
        for name, first in self.tied.items():
            if first in self.tensors:
                self.tensors.setdefault(name, self.tensors[first])
        name, first = unequal
        note = (
            f"'{name}' and '{first}' are one weight by the config, and two that differ in the checkpoint: both are "
            f"written"
        )
        if self.config.get("model_type") in _ALWAYS_TIED:
            self.notes.append(note)
            return
        self.config.update(untied(self.config))
        self.notes.append(f"{note}, and config.json says tie_word_embeddings false")

    def ensure_all_there(self) -> None:
        tied, tables = self.tied, self.tables
        missing = [name for name in self.shapes if name not in self.tensors and name not in tied]
        if missing:
            raise Refused(
                f"'{self.source.path}' lacks {len(missing)} of {len(self.shapes)} tensors of the model that its config "
                f"describes:{_listed(missing)}\nIs a part of the checkpoint elsewhere, or is it another model? Name "
                f"the one that it was trained from with --like"
            )
        for name, tensor in self.tensors.items():
            shape = self.shapes[name]
            same = tensor.shape[1:] == shape[1:] if name in tables else tensor.shape == shape
            if not same or len(tensor.shape) != len(shape):
                raise WrongBase(
                    f"'{name}' is {list(tensor.shape)} in '{self.source.path}', and {list(shape)} by the config: name "
                    f"the model that it was trained from with --like"
                )

    def settle_vocabulary(self, tokens: int | None, *, trained: bool = True) -> None:
        tables = {name: self.tensors[name] for name in sorted(self.tables) if name in self.tensors}
        if not tables:
            return
        said = self.shapes[next(iter(tables))][0]
        vocabulary = settled({name: tensor.shape[0] for name, tensor in tables.items()}, said, tokens, trained=trained)
        if vocabulary.note is not None:
            self.notes.append(vocabulary.note)
        for name, tensor in tables.items():
            if tensor.shape[0] != vocabulary.rows:
                self.tensors[name] = PartOf(tensor, 0, (vocabulary.rows, *tensor.shape[1:]))
        self.config = with_vocabulary(self.config, said, vocabulary.rows)

    def cut_as_stored(self) -> dict[str, SourceTensor]:
        """By the names that files have, in the order of the model: one expert, say, of the many that are one tensor."""
        if self.as_stored:
            return {**self.tensors, **self.extra}
        cut: dict[str, SourceTensor] = {}
        parts = self._parts()
        for whole, tensor in self.tensors.items():
            for name, part in parts.get(whole, [(whole, Part(whole, 0, tensor.shape))]):
                is_whole = math.prod(part.shape) == math.prod(self.expected.shapes[whole])
                cut[name] = tensor if is_whole else PartOf(tensor, part.begin, part.shape)
        if cut.keys() != self.tensors.keys():
            self._rename_as_stored(parts)
        return {**cut, **self.extra}

    def _parts(self) -> dict[str, list[tuple[str, Part]]]:
        """What files hold for each tensor, by its name; of those alone that are in them wholly, and as they are."""
        parts: dict[str, list[tuple[str, Part]]] = {}
        for name, part in self.expected.stored.items():
            if part.whole is not None:
                parts.setdefault(part.whole, []).append((name, part))
        shapes = self.expected.shapes
        return {
            whole: cut
            for whole, cut in parts.items()
            if sum(math.prod(part.shape) for _, part in cut) == math.prod(shapes[whole])
        }

    def _rename_as_stored(self, parts: Mapping[str, Sequence[tuple[str, Part]]]) -> None:
        for source, place in [(name, self.renamed.get(name, name)) for name in self.source.tensors]:
            names = [name for name, _ in parts.get(place, ())]
            if names and place in self.tensors and names != [source]:
                self.renamed[source] = names[0] if len(names) == 1 else f"{names[0]} … ({len(names)} tensors)"


def _listed(names: Sequence[str]) -> str:
    lines = "".join(f"\n  {name}" for name in names[:SHOWN])
    return lines + (f"\n  and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
