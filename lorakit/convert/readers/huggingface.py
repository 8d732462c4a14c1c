"""Models in Hugging Face's layout: safetensors, or `.bin` shards of torch.save; a folder, or one file."""

from __future__ import annotations

import re
from pathlib import Path

from lorakit.convert.readers.torch_files import without_ema
from lorakit.convert.source import PlainTensor, Source, SourceTensor, TorchTensor
from lorakit.errors import InvalidFile, NotFound, Refused
from lorakit.files.folders import file_state, read_json
from lorakit.files.safetensors import read_header
from lorakit.files.torch_file import read_torch_file
from lorakit.files.torch_tensors import StoredTorchTensor

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin", "pytorch_model_fsdp.bin")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")


def is_model_folder(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*INDEXES, *SINGLES))


def read(path: Path, *, weights: str = "model") -> Source:
    """Open a model folder, or one file of tensors.

    Raises:
        UsageError: other weights than the model's are asked for.
        NotFound: the index names a shard that is not there.
        InvalidFile: a shard is damaged, or the index and its shards contradict each other.
        Refused: there are several files, and no index.
    """
    without_ema(path, weights)
    index, files = (None, [path]) if path.is_file() else _files(path)
    tensors: dict[str, SourceTensor] = {}
    places: dict[str, str] = {}
    for file in files:
        for name, tensor in _tensors(file).items():
            if name in tensors:
                raise InvalidFile(f"'{name}' is both in {places[name]} and in {file.name} of '{file.parent}'")
            tensors[name], places[name] = tensor, file.name
    if index is not None:
        _ensure_indexed(index, places)
    beside = path if path.is_dir() else path.parent
    pickled = [name for name in (INDEXES[1], SINGLES[1]) if (beside / name).is_file()]
    notes: tuple[str, ...] = ()
    if path.is_dir() and pickled and files[0].suffix == ".safetensors":
        notes = (f"the safetensors files are read, and {pickled[0]} beside them is not",)
    return Source(path, "huggingface", tensors, {}, beside, {file: file_state(file) for file in files}, notes)


def _files(folder: Path) -> tuple[Path | None, list[Path]]:
    """The index, if there is one, and the files of the weights; safetensors rather than what is beside them.

    Raises:
        InvalidFile: there are more files than one model has: which of them it is can't be told.
    """
    for index, single in zip(INDEXES, SINGLES, strict=False):
        shards = [file.name for file in sorted(folder.iterdir()) if _is_shard_of(single, file.name)]
        if (folder / index).is_file():
            names = _indexed(folder / index)
            beside = [name for name in (single, *shards) if name not in names and (folder / name).is_file()]
            if beside:
                raise InvalidFile(f"'{folder}' holds {beside[0]} and an index of other shards: keep one of the two")
            return folder / index, [folder / name for name in names]
        if (folder / single).is_file():
            if shards:
                raise InvalidFile(f"'{folder}' holds {single} and {shards[0]}, one of many: keep one of the two")
            return None, [folder / single]
    if (folder / SINGLES[-1]).is_file():
        return None, [folder / SINGLES[-1]]
    return None, _without_index(folder)


def _is_shard_of(single: str, name: str) -> bool:
    match = _SHARD.fullmatch(name)
    return match is not None and f"{match[1]}{match[4]}" == single


def _without_index(folder: Path) -> list[Path]:
    """The one safetensors file, whatever it is called."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        named = ", ".join(file.name for file in files)
        raise Refused(f"'{folder}' holds {named}, and no index that says which are the model: name the file")
    return files


def _indexed(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidFile(f"'{index}' has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise InvalidFile(f"'{index}' names {name!r}, which is no file beside it")
        if not (index.parent / name).is_file():
            raise NotFound(f"'{index.parent}' lacks {name}, which its index names: copy it there")
    return names


def _ensure_indexed(index: Path, places: dict[str, str]) -> None:
    said = read_json(index)["weight_map"]
    for name, place in said.items():
        if places.get(name) != place:
            raise InvalidFile(f"'{index}' says that '{name}' is in {place}, and it isn't")
    extra = next((name for name in places if name not in said), None)
    if extra is not None:
        raise InvalidFile(f"{places[extra]} holds '{extra}', which '{index}' does not know")


def _tensors(file: Path) -> dict[str, SourceTensor]:
    if file.suffix == ".safetensors":
        return {name: PlainTensor(stored) for name, stored in read_header(file).tensors.items()}
    structure = read_torch_file(file)
    if not isinstance(structure, dict) or not all(isinstance(name, str) for name in structure):
        raise InvalidFile(f"'{file}' holds no tensors by name, as a shard of a model does")
    others = [name for name, value in structure.items() if not isinstance(value, StoredTorchTensor)]
    if others:
        raise InvalidFile(f"'{file}': '{others[0]}' is no tensor, and a shard of a model holds nothing else")
    return {name: TorchTensor(name, stored) for name, stored in structure.items()}
