"""Files of torch.save: a state dict alone, one among what else a training keeps, a whole module; Lightning's `.ckpt`.

The pickle in them is read, and not run: a module is walked as the names and containers that it was saved as.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.checkpoints.whole import TORCH
from lorakit.checkpoints.writers.torch_file import LIGHTNING
from lorakit.checkpoints.writers.torch_keys import MODEL, OPTIMIZER, SCALER, SCHEDULER, TRAINER_STATE
from lorakit.convert.source import Source, SourceTensor, TorchTensor
from lorakit.errors import Refused, UsageError
from lorakit.files.folders import file_state
from lorakit.files.pickle_values import Stub
from lorakit.files.torch_file import read_torch_file
from lorakit.files.torch_tensors import StoredTorchTensor

EMA = ("ema", "ema_model", "ema_state_dict", "model_ema", "ema_weights", "state_dict_ema", "shadow_params", "shadow")
NO_WEIGHTS = "what a training resumes with: optimizer, scheduler, counters, settings"
NO_TENSORS = "no tensors"
COUNTERS = "counters of a moving average"
OTHER_MODELS = "other state dicts, of which one alone is taken"
OF_EMA = "the moving average of the weights, which --weights ema takes"
NOT_OF_EMA = "not the moving average of the weights, which was asked for"
_CURRENT = "current_model_state"  # beside it, Lightning's WeightAveraging has its average as the `state_dict`
_NESTED = 3  # mappings around a state dict
_RESUMED = frozenset((*OPTIMIZER, *SCHEDULER, *SCALER, *TRAINER_STATE))
_COUNTERS = frozenset({"n_averaged", "num_updates", "decay", "initted", "step"})
_OF_EMA_PYTORCH = "ema_model."  # beside it, what is trained stands under `online_model.`
MAX_MODULES = 1_000_000
DEEPEST = 64  # modules around a module

Tensors = dict[str, StoredTorchTensor]


def read(path: Path, *, weights: str = "model") -> Source:
    """Open one file, or a folder in which one file holds a model.

    Raises:
        UsageError: there is no moving average of the weights in it.
        Refused: no model is in it, or tensors of a kind that has no bytes of its own (quantised, sharded).
        InvalidFile: it is damaged.
    """
    file = path if path.is_file() else _file_of_model(path)
    structure = read_torch_file(file)
    chosen = _chosen(file, structure, weights)
    tensors: dict[str, SourceTensor] = {name: TorchTensor(name, stored) for name, stored in chosen.tensors.items()}
    lightning = isinstance(structure, dict) and LIGHTNING in structure
    return Source(
        path, "lightning" if lightning else "torch", tensors, chosen.left_out, file.parent, {file: file_state(file)},
        chosen.notes,
    )  # fmt: skip


def without_ema(path: Path, weights: str) -> None:
    """Raises UsageError when other weights than the model's are asked of a format that has no others."""
    if weights != "model":
        raise UsageError(f"'{path}' holds the weights of the model alone: leave out --weights {weights}")


def _file_of_model(folder: Path) -> Path:
    files = sorted(file for file in folder.iterdir() if file.suffix in TORCH and file.is_file())
    with_model = [file for file in files if any(_states_in(read_torch_file(file), set(), _is_usual))]
    if len(with_model) != 1:
        said = ", ".join(file.name for file in with_model) or "none of its torch files does"
        raise Refused(f"'{folder}' should hold one model, and these hold one: {said}: name the file")
    return with_model[0]


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Where the weights stand, their tensors, and what is left out."""

    place: str
    tensors: Tensors
    left_out: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]


def _chosen(file: Path, structure: Any, weights: str) -> _Chosen:
    states = dict(_states_in(structure, set(), _is_usual)) or _only_state(file, structure)
    averaged = {place: state for place, state in states.items() if _is_average(place, states)}
    plain = {place: state for place, state in states.items() if place not in averaged}
    place = first = _first(plain)
    others = {**plain, **dict(_states_in(structure, set(), _is_weights))}
    others = {name: state for name, state in others.items() if name != first and name not in averaged}
    found, no_tensors = _tensors(file, plain[first]) if first is not None else ({}, [])
    model, inside = _apart(found)
    left_out: dict[str, tuple[str, ...]] = {OTHER_MODELS: tuple(others)}
    if weights == "ema":
        place, ema = _average(file, structure, averaged, inside, model)
        trained = (name for name in found if name not in inside) if inside or first is None else (first,)
        left_out[NOT_OF_EMA] = tuple(trained)
        model = ema
    elif inside or averaged:
        left_out[OF_EMA] = (*inside, *averaged)
    left_out[COUNTERS] = tuple(name for name in model if _is_counter(name, model[name]))
    model = {name: stored for name, stored in model.items() if name not in left_out[COUNTERS]}
    if not model:
        raise Refused(f"'{file}' holds no model{_offered(averaged, structure)}")
    left_out[NO_TENSORS] = tuple(no_tensors)
    top = tuple(str(key) for key in structure) if isinstance(structure, dict) and place else ()
    left_out[NO_WEIGHTS] = tuple(key for key in top if key not in {name.split("/")[0] for name in (*states, *others)})
    is_news = weights == "ema" or others or (place and not _is_usual(place.split("/")[0]))
    notes = (f"the weights are those of '{place}'",) if is_news else ()
    return _Chosen(place or "the file", model, {reason: names for reason, names in left_out.items() if names}, notes)


def _is_usual(key: str) -> bool:
    """Whether a state dict of a model is called so, or what holds one."""
    return key in MODEL or key in EMA or key in (_CURRENT, "callbacks") or "EMA" in key


def _is_weights(key: str) -> bool:
    return key not in _RESUMED and not key.startswith("optim")


def _only_state(file: Path, structure: Any) -> dict[str, Mapping[str, Any]]:
    """The one state dict of a file, whatever it is called. Raises Refused when there are several."""
    found = dict(_states_in(structure, set(), _is_weights))
    if len(found) > 1:
        raise Refused(f"'{file}' holds several state dicts, {', '.join(found)}: save the one that is meant alone")
    return found


def _states_in(
    structure: Any, seen: set[int], wanted: Callable[[str], bool], place: str = "", depth: int = 0
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every state dict under keys that are wanted, by its keys joined with slashes; `seen` are those that were looked
    into, as what a pickle gives may hold itself.
    """
    if id(structure) in seen:
        return
    seen.add(id(structure))
    if isinstance(structure, Stub):
        structure = _of_module(structure)
    if not isinstance(structure, dict) or not structure:
        return
    values = list(structure.values())
    if sum(isinstance(value, StoredTorchTensor) for value in values) * 2 > len(values):
        yield place, structure
        return
    if depth == _NESTED:
        return
    for key, value in structure.items():
        if isinstance(key, str) and wanted(key):
            yield from _states_in(value, seen, wanted, f"{place}/{key}" if place else key, depth + 1)


def _of_module(module: Stub) -> dict[str, Any]:
    """What `state_dict()` of a pickled torch.nn.Module would give, persistent buffers among it.

    Raises:
        Refused: it is nested deeper, or holds more, than any model does.
    """
    state: dict[str, Any] = {}
    waiting, looked_at = [(module, "")], 0
    while waiting:
        (one, prefix), looked_at = waiting.pop(), looked_at + 1
        fields = one.fields
        inner = fields.get("_modules")
        if not isinstance(inner, dict):
            continue
        if looked_at > MAX_MODULES or prefix.count(".") > DEEPEST:
            raise Refused("a module that was saved as a whole holds itself, or more than a model does: not read")
        passing = fields.get("_non_persistent_buffers_set")
        for kind in ("_parameters", "_buffers"):
            held = fields.get(kind)
            for name, value in held.items() if isinstance(held, dict) else ():
                is_passing = kind == "_buffers" and isinstance(passing, set) and name in passing
                if value is not None and not is_passing:
                    state[f"{prefix}{name}"] = value
        waiting += [(part, f"{prefix}{name}.") for name, part in reversed(inner.items()) if isinstance(part, Stub)]
    return state


def _is_average(place: str, states: Mapping[str, Any]) -> bool:
    if _CURRENT in states:
        return place == "state_dict"
    return any(part in EMA or "EMA" in part or part == "callbacks" for part in place.split("/"))


def _first(states: Mapping[str, Any]) -> str | None:
    """The usual one, where there are several."""
    usual = (_CURRENT, *MODEL)
    order = {place: usual.index(place) if place in usual else len(usual) for place in states}
    return min(states, key=lambda place: order[place], default=None)


def _tensors(file: Path, state: Mapping[str, Any]) -> tuple[Tensors, list[str]]:
    """The tensors, and the names of what is none. Raises Refused for one that has no bytes of its own."""
    tensors: Tensors = {}
    others: list[str] = []
    for name, value in state.items():
        if isinstance(value, StoredTorchTensor):
            tensors[str(name)] = value
        elif isinstance(value, Stub) and value.name.startswith("torch."):
            raise Refused(f"'{file}': '{name}' is a {value.name}, which isn't read here: save it as a plain tensor")
        else:
            others.append(str(name))
    return tensors, others


def _apart(found: Tensors) -> tuple[Tensors, Tensors]:
    """The model's tensors, and those of an average that the same module holds, by their own names."""
    prefixes = tuple(f"{name}." for name in EMA)
    inside = {name: stored for name, stored in found.items() if name.startswith(prefixes)}
    if len(inside) == len(found):
        return found, {}
    return {name: stored for name, stored in found.items() if name not in inside}, inside


def _average(
    file: Path, structure: Any, averaged: Mapping[str, Mapping[str, Any]], inside: Tensors, model: Tensors
) -> tuple[str, Tensors]:
    """The averaged weights under the model's names.

    Raises:
        UsageError: there are none.
        Refused: there are several; or which is which tensor's can't be told.
    """
    if len(averaged) > 1:
        every = ", ".join(averaged)
        raise Refused(f"'{file}' holds several moving averages, {every}: save the one that is meant alone")
    if averaged:
        ((place, state),) = averaged.items()
        found = _tensors(file, state)[0]
        own = {name.removeprefix(_OF_EMA_PYTORCH): found[name] for name in found if name.startswith(_OF_EMA_PYTORCH)}
        return place, own or found
    if inside:
        prefix = next(iter(inside)).partition(".")[0]
        own = {name.partition(".")[2]: stored for name, stored in inside.items() if name.startswith(f"{prefix}.")}
        return prefix, _with_dots(file, prefix, own, model)
    listed = _listed(structure)
    if listed is None:
        said = ", ".join(map(str, structure)) if isinstance(structure, dict) else "the weights of the model alone"
        raise UsageError(f"'{file}' has no moving average of the weights; it has {said}: leave out --weights ema")
    place, values = listed
    return place, _in_order(file, place, values, model)


def _is_counter(name: str, stored: StoredTorchTensor) -> bool:
    return name in _COUNTERS and math.prod(stored.shape) == 1


def _with_dots(file: Path, prefix: str, average: Tensors, model: Tensors) -> Tensors:
    """An average under the model's names where it has them without their dots, as a module's buffers have to (LitEma);
    with what is not averaged, as it was not trained, from the model.
    """
    own = {name: stored for name, stored in average.items() if not _is_counter(name, stored)}
    if any("." in name for name in own) or not own:
        return average
    parts = next(iter(model), "").split(".")
    for end in range(len(parts)):
        above = "".join(f"{part}." for part in parts[:end])
        names = {name.removeprefix(above).replace(".", ""): name for name in model if name.startswith(above)}
        if own.keys() <= names.keys():
            return {name: own.get(short, model[name]) for short, name in names.items()}
    raise Refused(f"'{file}': the names in '{prefix}' are not those of the model: which belongs to which can't be told")


def _listed(structure: Any) -> tuple[str, list[StoredTorchTensor]] | None:
    """An average that is kept as a list in the order of the parameters, as torch_ema and diffusers do."""
    waiting: list[tuple[tuple[str, ...], Any]] = [(("",), structure)]
    for keys, value in waiting:
        if isinstance(value, list) and value and all(isinstance(one, StoredTorchTensor) for one in value):
            return "/".join(keys[1:]), value
        if isinstance(value, dict) and len(keys) <= _NESTED:
            waiting += [((*keys, key), inner) for key, inner in value.items() if isinstance(key, str) and key in EMA]
    return None


def _in_order(file: Path, place: str, values: list[StoredTorchTensor], model: Tensors) -> Tensors:
    if [value.shape for value in values] != [stored.shape for stored in model.values()]:
        raise Refused(
            f"'{file}': '{place}' is a list of {len(values)} tensors, which are not those of the model one for one: "
            f"which belongs to which can't be told"
        )
    return dict(zip(model, values, strict=True))


def _offered(averaged: Mapping[str, Any], structure: Any) -> str:
    if averaged:
        return f" but a moving average: take '{next(iter(averaged))}' with --weights ema, or name another file"
    keys = ", ".join(map(str, structure)) if isinstance(structure, dict) else ""
    return f"{f', only {keys}' if keys else ''}: name the file of the weights"
