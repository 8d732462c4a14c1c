"""The readers of checkpoints, one module a format; each opens a path as a `Source`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from lorakit.checkpoints.places import LocalPlace
from lorakit.checkpoints.recognise import recognise
from lorakit.checkpoints.writers import folder_written_by
from lorakit.convert.described import is_described
from lorakit.convert.readers.huggingface import is_model_folder
from lorakit.convert.source import Source
from lorakit.errors import InvalidFile, NotFound, Refused
from lorakit.files.distributed import METADATA

WEIGHTS = ("model", "ema")
_FSDP_FOLDER = re.compile(r"pytorch_model_fsdp_\d+|model|model_state|weights|app")
_TAG = re.compile(r"global_step\d+(_universal)?")
_OF_TORCHTUNE = re.compile(r"model-\d{5}-of-\d{5}\.bin")  # in its own names or Meta's, which no index joins
_MEGATRON = ("latest_checkpointed_iteration.txt", "common.pt", "run_config.yaml")


def read_source(path: Path, *, weights: str = "model") -> Source:
    """Open the weights of a checkpoint, by the reader of its format.

    Raises:
        NotFound: there is no such path.
        Refused: no reader knows it.
        UsageError: it has no other weights than the model's, and others are asked for.
        InvalidFile: it is damaged.
    """
    if not path.exists():
        raise NotFound(f"there is no folder or file '{path}'")
    found = list(_formats(path))
    if not found:
        raise Refused(f"'{path}' is no checkpoint of a kind that is known: name the folder or file that holds weights")
    reader, place = found[0]
    source: Source = import_module(f"lorakit.convert.readers.{reader}").read(place, weights=weights)
    if not source.tensors:
        raise InvalidFile(f"'{place}' holds no tensors")
    masters = [other for kind, other in found if kind in ("deepspeed", "universal")]
    notes = source.notes
    if reader == "huggingface" and masters:
        notes += (f"the model's own files are read; the fp32 master weights are in '{masters[0]}': name that for them",)
    return _translated(replace(source, path=path, beside=_beside(path, source.beside), notes=notes))


def is_exported(path: Path) -> bool:
    """Whether its reader has it exported first, by another program and to another place."""
    return next((reader == "megatron" for reader, _ in _formats(path)), False)


def _translated(source: Source) -> Source:
    """In transformers' names, where a trainer's own ones stand in a file of a common format."""
    from lorakit.convert.readers import litgpt, torchtune

    return litgpt.translated(torchtune.translated(source))


def _formats(path: Path) -> Iterator[tuple[str, Path]]:
    """The reader's module, and what it is to open: the likeliest first."""
    if path.is_file():
        yield _of_file(path), path
        return
    names = {entry.name for entry in path.iterdir()}
    writer = found.writer if (found := recognise(path)) else None
    if writer in ("torchtune", "litgpt"):
        yield writer, path
    if is_model_folder(path):
        yield "huggingface", path
    if any(name.endswith(".gguf") for name in names):
        yield "gguf", path
    if any(_OF_TORCHTUNE.fullmatch(name) for name in names):
        yield "torchtune", path
    if writer == "fsdp":
        yield "fsdp_ranks", path
    if names.intersection(_MEGATRON) or any(name.startswith("iter_") for name in names):
        yield "megatron", path
    if METADATA in names:
        yield "distributed", path
    for name in sorted(names):
        if _FSDP_FOLDER.fullmatch(name) and (path / name / METADATA).is_file():
            yield "distributed", path / name
    if writer == "deepspeed":
        yield _of_deepspeed(path), path
    for name in sorted((name for name in names if _TAG.fullmatch(name)), key=_step):
        yield _of_deepspeed(path / name), path / name
    if (path / "pytorch_model" / "latest").is_file() or any((path / "pytorch_model").glob("*_model_states.pt")):
        yield _of_deepspeed(path / "pytorch_model"), path / "pytorch_model"
    if any(name.startswith("shard-") and name.endswith(".safetensors") for name in names):
        yield "distributed", path  # of torch.distributed.checkpoint in Hugging Face's format, which has no index yet
    elif any(name.endswith(".safetensors") for name in names):
        yield "huggingface", path
    if writer in ("torch", "lightning"):
        yield "torch_files", path


def _of_file(file: Path) -> str:
    """Raises Refused for one of many that only together are a checkpoint."""
    whole = folder_written_by(LocalPlace(file.parent))
    if whole is not None and whole.writer in ("deepspeed", "dcp") and file.name in whole.files:
        raise Refused(f"'{file}' is one file of a checkpoint: name its folder, '{file.parent}'")
    if file.suffix == ".gguf":
        return "gguf"
    if file.name.startswith("lit_model.pth"):
        return "litgpt"
    return "huggingface" if file.suffix == ".safetensors" else "torch_files"


def _of_deepspeed(folder: Path) -> str:
    latest = folder / "latest_universal"
    return "universal" if (folder / "zero").is_dir() or latest.is_file() else "deepspeed"


def _step(name: str) -> int:
    return -int("".join(filter(str.isdigit, name)))


def _beside(path: Path, found: Path | None) -> Path | None:
    """The nearest folder with a config, of the one that the reader names, the path itself, and what it lies in."""
    folder = path if path.is_dir() else path.parent
    candidates = [place for place in (found, folder, folder.parent) if place is not None]
    verl = [place / "huggingface" for place in candidates[:2]]  # which keeps config and tokenizer in a folder so named
    return next(filter(is_described, (*candidates, *verl)), found)
