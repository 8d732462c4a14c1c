"""DeepSpeed's ZeRO 1, 2 and 3: the optimizer's fp32 master weights, and what it doesn't have (frozen parameters,
buffers) from the model's own states.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorakit.convert.readers.pieced import with_config
from lorakit.convert.readers.torch_files import NO_TENSORS, NO_WEIGHTS, without_ema
from lorakit.convert.readers.zero import PARTITIONS, SHARES, Shapes, flat, of_partitions, of_shares, shared
from lorakit.convert.source import Source, SourceTensor, TorchTensor
from lorakit.errors import Incomplete, InvalidFile, NotFound, Refused
from lorakit.files.folders import file_state
from lorakit.files.pickle_values import Stub
from lorakit.files.regular import opened
from lorakit.files.torch_file import read_torch_file
from lorakit.files.torch_tensors import StoredTorchTensor, is_countable, load_torch_range

EMPTY = "empty here: in optimizer's files that are not there, or the same as a parameter of another name"
COMPARED = 256  # elements of a parameter
ROUNDED = 2**-6  # a master weight and its 16-bit copy differ by less, relatively
_MAX_RANKS = 1 << 20
_MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d{1,6})_)?mp_rank_(?P<part>\d{1,6})_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d{1,6})_mp_rank_(?P<part>\d{1,6})_optim_states\.pt")
_SPLIT = re.compile(r"(layer_\d+.*[-_](model|optim)|expp_rank_.*)_states\.pt")
_OF_MODEL = frozenset({  # of its states what the weights are read by, or what says how it was trained
    "module", "param_shapes", "buffer_names", "shared_params", "frozen_param_shapes", "frozen_param_fragments",
    "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version",
    "universal_checkpoint_info", "global_steps", "global_samples", "skipped_steps",
})  # fmt: skip


def read(path: Path, *, weights: str = "model") -> Source:
    """Open a `global_stepN` folder, or the folder above, in which `latest` names one.

    Raises:
        UsageError: a moving average of the weights is asked for.
        NotFound: nothing of DeepSpeed's is there.
        Incomplete: a rank's file is not there.
        InvalidFile: files are damaged or contradict each other.
        Refused: the model was cut by tensor, pipeline or expert parallelism.
    """
    without_ema(path, weights)
    folder = step_folder(path, "latest")
    if folder is None or not any(folder.glob("*_states.pt")):
        raise NotFound(f"'{path}' is no checkpoint of DeepSpeed: name a global_stepN folder, or the one with 'latest'")
    _ensure_not_cut(folder)
    states = model_states(folder)
    first, *_ = states.values()
    optimizers = _by_rank(folder, _OPTIMIZER)
    _ensure_all_ranks(folder, first, optimizers, _OPTIMIZER)
    with named(folder):
        masters, said = _masters(first, [_optimizer_state(file) for file in optimizers])
        ensure_of_one_save(first, masters)
        tensors: dict[str, SourceTensor] = {**masters}
        left_out = add_others(list(states.values()), tensors)
    if not tensors:
        raise Incomplete(f"'{folder}' has no weights: they are {EMPTY}; copy all files of the step there")
    if optimizers:
        left_out[NO_WEIGHTS] = ("optimizer_state_dict", *left_out.get(NO_WEIGHTS, ()))
    files = (*states, *(optimizers if masters else ()))
    return Source(
        path, "deepspeed", tensors, left_out, with_config(path, folder, folder.parent),
        {file: file_state(file) for file in files}, (said,),
    )  # fmt: skip


def step_folder(path: Path, latest: str) -> Path | None:
    """The folder of one step: the path, or the one that the file called `latest` in it names; None if neither is."""
    if not path.is_dir():
        return None
    if _by_rank(path, _MODEL) or (path / "zero").is_dir():
        return path
    if not (path / latest).is_file():
        return None
    with opened(path / latest) as stream:
        tag = stream.read(255).decode("utf-8", "replace").strip()
    named = tag.isprintable() and Path(tag).name == tag and (path / tag).is_dir()
    return path / tag if named else None


def model_states(folder: Path) -> dict[Path, Mapping[str, Any]]:
    """What each rank says of the model, or rank 0 for all.

    Raises:
        Incomplete: a rank's file is not there.
        InvalidFile: a file is damaged.
    """
    files = _by_rank(folder, _MODEL)
    if not files:
        raise Incomplete(f"'{folder}' has no *_model_states.pt, which names and shapes are in: copy it there")
    states = {file: _said_in(file) for file in files}
    _ensure_all_ranks(folder, states[files[0]], files, _MODEL)
    return states


def is_cut(files: Iterable[Path]) -> bool:
    """Whether these model states are of tensor or pipeline parallelism, so that none has whole layers."""
    return len({match["part"] for file in files if (match := _MODEL.fullmatch(file.name))}) > 1


def _ensure_not_cut(folder: Path) -> None:
    split = next((file.name for file in folder.iterdir() if _SPLIT.fullmatch(file.name)), None)
    if split or is_cut(folder.iterdir()):
        raise Refused(
            f"'{folder}' was cut by tensor, pipeline or expert parallelism ({split or 'mp_rank_01, …'}): make "
            f"it universal with DeepSpeed's ds_to_universal, and convert that"
        )


def _by_rank(folder: Path, named: re.Pattern[str]) -> list[Path]:
    found = ((match, file) for file in folder.iterdir() if (match := named.fullmatch(file.name)))
    return [file for _, file in sorted(((int(match["rank"] or 0), int(match["part"])), file) for match, file in found)]


def _said_in(file: Path) -> Mapping[str, Any]:
    found = read_torch_file(file)
    if not isinstance(found, dict):
        raise InvalidFile(f"'{file}' does not hold what DeepSpeed writes: copy it again")
    return found


def _ensure_all_ranks(folder: Path, first: Mapping[str, Any], files: Sequence[Path], named: re.Pattern[str]) -> None:
    """Raises Incomplete where ranks are missing of a file that each of them writes."""
    own = {int(match["rank"]) for file in files if (match := named.fullmatch(file.name)) and match["rank"]}
    said = first.get("dp_world_size")
    ranks = said if isinstance(said, int) and 0 < said <= _MAX_RANKS else max(own, default=0) + 1
    missing = next((rank for rank in range(ranks) if rank not in own), None)
    if own and missing is not None:
        raise Incomplete(f"'{folder}' lacks the file of rank {missing}, one of {ranks} like {files[0].name}: copy it")


@contextmanager
def named(folder: Path) -> Iterator[None]:
    """What contradicts itself does so in one folder."""
    try:
        yield
    except InvalidFile as error:
        raise InvalidFile(f"'{folder}': {error}; its files may be of two saves: copy it again") from None


def _optimizer_state(file: Path) -> Mapping[str, Any]:
    found = _said_in(file).get("optimizer_state_dict")
    if not isinstance(found, dict):
        raise InvalidFile(f"{file.name} holds no state of an optimizer")
    return found


def _masters(first: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, SourceTensor], str]:
    """The parameters that were trained, none where the optimizer's files are not there; and what to say of them."""
    groups = shapes_in(first, "param_shapes")
    if not ranks:
        return {}, "the weights are those that the model computed with: the optimizer keeps no others, or is not there"
    said = f"the weights are the optimizer's fp32 master weights, from {len(ranks)} ranks of ZeRO"
    if all(PARTITIONS in rank for rank in ranks):
        return of_partitions(groups, ranks), f"{said} {_stage(ranks[0])}"
    if all(SHARES in rank for rank in ranks):
        return of_shares(groups, ranks), f"{said} 3"
    raise InvalidFile("the optimizer's files hold no fp32 weights, or not all of one stage of ZeRO")


def _stage(rank: Mapping[str, Any]) -> int:
    said = rank.get("zero_stage")
    stage = said.args[0] if isinstance(said, Stub) and said.args else said
    return 2 if stage == 2 else 1


def shapes_in(first: Mapping[str, Any], key: str) -> list[Shapes]:
    """Of each group of parameters the shapes by their names, in the order in which they are kept.

    Raises:
        InvalidFile: these aren't any.
    """
    said = first.get(key) or []
    groups = [said] if isinstance(said, dict) else said
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise InvalidFile(f"{key} are no shapes by name")
    for name, shape in (entry for group in groups for entry in group.items()):
        counts = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
        if not isinstance(name, str) or not counts or not is_countable(shape):
            raise InvalidFile(f"{key} say no shape of {name!r}")
    return groups


def add_others(states: Sequence[Mapping[str, Any]], tensors: dict[str, SourceTensor]) -> dict[str, tuple[str, ...]]:
    """Add what the optimizer doesn't have: what is frozen, the same under another name, or a buffer.

    Returns:
        What is no weight, or not there, by the reason.
    """
    left_out: dict[str, list[str]] = {}
    first = states[0]
    for name, shape in (entry for group in shapes_in(first, "frozen_param_shapes") for entry in group.items()):
        tensors.setdefault(name, _frozen(states, name, shape))
    module, same = first.get("module"), _same_as(first)
    for name, value in module.items() if isinstance(module, dict) else ():
        if name in tensors or not isinstance(name, str):
            continue
        if not isinstance(value, StoredTorchTensor):
            left_out.setdefault(NO_TENSORS, []).append(name)
        elif value.nbytes:  # ZeRO 3 leaves an empty one where a parameter was
            tensors[name] = TorchTensor(name, value)
        elif name not in same:
            left_out.setdefault(EMPTY, []).append(name)
    for name, source in same.items():
        if source in tensors:
            tensors[name] = tensors[source]
    left_out[NO_WEIGHTS] = [str(key) for key, value in first.items() if key not in _OF_MODEL and value is not None]
    return {reason: tuple(names) for reason, names in left_out.items() if names}


def _frozen(states: Sequence[Mapping[str, Any]], name: str, shape: tuple[int, ...]) -> SourceTensor:
    """Whole on rank 0, or a share on every rank."""
    held = [state.get("frozen_param_fragments") for state in states]
    fragments = [fragment.get(name) if isinstance(fragment, dict) else None for fragment in held]
    if isinstance(fragments[0], StoredTorchTensor) and fragments[0].shape == shape:
        return TorchTensor(name, fragments[0])
    return shared(name, shape, [flat(fragment) for fragment in fragments])


def ensure_of_one_save(first: Mapping[str, Any], masters: Mapping[str, SourceTensor]) -> None:
    """Hold the master weights against the model's own, as far as they are beside them: the first elements of each.

    Raises:
        InvalidFile: they are not what those were rounded from.
    """
    module = first.get("module")
    for name, own in module.items() if isinstance(module, dict) else ():
        master = masters.get(name)
        if not isinstance(own, StoredTorchTensor) or master is None or own.shape != master.shape or not own.nbytes:
            continue
        count = min(COMPARED, own.nbytes // own.itemsize)
        wanted, found = load_torch_range(name, own, 0, count).double(), master.read(0, count).double()
        if not found.isclose(wanted, rtol=ROUNDED, atol=1e-6, equal_nan=True).all():
            raise InvalidFile(f"the master weights of '{name}' are not those of the model beside them")


def _same_as(first: Mapping[str, Any]) -> dict[str, str]:
    """Names by those that they share a parameter with; older versions say them in pairs."""
    said = first.get("shared_params")
    pairs = said.items() if isinstance(said, dict) else said if isinstance(said, list) else ()
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2 and all(isinstance(name, str) for name in pair)}
