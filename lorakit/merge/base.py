"""A base model on disk: its config and the headers of its shards, never its tensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.adapters.adapter import Adapter
from lorakit.errors import Conflict, InvalidFile, NotFound, UsageError
from lorakit.files.digests import file_digest, sampled_digest
from lorakit.files.folders import FileState, file_state, read_json
from lorakit.files.hub import hub_folder, looks_like_hub_id
from lorakit.files.safetensors import Header, StoredTensor, read_header

if TYPE_CHECKING:
    from lorakit.merge.fetch import RemoteShards

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class BaseModel:
    """A folder in Hugging Face layout. `reference` is how it was named: a folder or a hub id.

    With `remote`, shards may still be on the hub, and `states` is empty.
    """

    reference: str
    folder: Path
    config: Mapping[str, Any]
    shards: tuple[Header, ...]
    index: Mapping[str, Any] | None
    states: tuple[FileState, ...]
    remote: RemoteShards | None = None

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        return {name: stored for shard in self.shards for name, stored in shard.tensors.items()}

    @cached_property
    def identity(self) -> str:
        """Tells one base from another, a retrained one of the same shapes among them, wherever they lie.

        From samples: the whole of a large model takes minutes to read.
        """
        parts = [sampled_digest(self.folder / "config.json"), *self._sampled]
        return f"{self.model_type}-{hashlib.sha256(''.join(parts).encode()).hexdigest()[:16]}"

    @cached_property
    def weights_digest(self) -> str:
        """As `identity`, whatever its config says."""
        return hashlib.sha256("".join(self._sampled).encode()).hexdigest()[:16]

    @cached_property
    def _sampled(self) -> list[str]:
        return [sampled_digest(shard.file) for shard in self.shards]

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def quantised(self) -> str | None:
        """The method by which the weights are quantised, if they are."""
        settings = self.config.get("quantization_config")
        return str(settings.get("quant_method", "an unnamed method")) if isinstance(settings, dict) else None

    @property
    def versions(self) -> list[Any]:
        """What tells this base from itself at another time: as data, and cheap."""
        if self.remote is not None:
            return [self.remote.name, self.remote.commit]
        files = [str(shard.file) for shard in self.shards]
        return [file_digest(self.folder / "config.json"), *zip(files, self.states, strict=True)]

    def ensure_unchanged(self) -> None:
        """Raises Conflict when a shard was written again since its header was read."""
        if self.remote is not None:
            self.remote.ensure_unchanged()
            return
        for shard, state in zip(self.shards, self.states, strict=True):
            if file_state(shard.file) != state:
                raise Conflict(f"'{shard.file}' was written again while it was read: start anew")


def read_base(reference: str | os.PathLike[str]) -> BaseModel:
    """Open a base: a folder, or a hub id.

    Raises:
        NotFound: there is neither a folder nor a hub repository of that name.
        InvalidFile: it has no config, no safetensors, or its shards and its index contradict each other.
    """
    name = os.fspath(reference)
    folder = Path(name) if Path(name).is_dir() else hub_folder(name, what="base", patterns=HUB_PATTERNS)
    if not (folder / "config.json").is_file():
        hint = ": it holds an adapter, not a model" if (folder / "adapter_config.json").is_file() else ""
        raise InvalidFile(f"'{folder}' is no base model, it has no config.json{hint}")
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else None
    files = _shard_files(folder, index)
    states = tuple(file_state(file) for file in files)
    shards = tuple(read_header(file) for file in files)
    return checked_base(BaseModel(name, folder, read_json(folder / "config.json"), shards, index, states))


def checked_base(base: BaseModel) -> BaseModel:
    """Raises InvalidFile when shards and index contradict each other."""
    if base.index is not None:
        _check_index(base.folder / INDEX, base.index["weight_map"], base.shards)
    if not any(shard.tensors for shard in base.shards):
        raise InvalidFile(f"'{base.folder}' holds no tensor")
    return base


def _shard_files(folder: Path, index: Mapping[str, Any] | None) -> list[Path]:
    single = folder / SINGLE
    if index is None:
        if not single.is_file():
            raise InvalidFile(_no_weights(folder))
        return [single]
    names = shard_names(folder, index)
    for name in names:
        if not (folder / name).is_file():
            raise InvalidFile(f"'{folder}' is incomplete: its index names {name}, and there is no such file")
    if single.is_file() and SINGLE not in names:
        raise InvalidFile(f"'{folder}' holds {SINGLE} and an index of other shards: keep one of the two")
    return [folder / name for name in names]


def shard_names(folder: Path, index: Mapping[str, Any]) -> list[str]:
    """The files that the index of `folder` names.

    Raises:
        InvalidFile: it names none, or something that is no safetensors file beside it.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidFile(f"'{folder / INDEX}' has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InvalidFile(f"'{folder / INDEX}' names {name!r}, which is no safetensors file beside it")
    return names


def _no_weights(folder: Path) -> str:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        return (
            f"base '{folder}' has its weights as pickles ({pickled[0]}): save it as safetensors first "
            f"(model.save_pretrained(..., safe_serialization=True))"
        )
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        return f"base '{folder}' holds {shards[0]}, but neither {SINGLE} nor {INDEX}"
    return f"base '{folder}' has no weights: neither {SINGLE} nor {INDEX}"


def _check_index(file: Path, weight_map: Mapping[str, str], shards: Sequence[Header]) -> None:
    found: dict[str, str] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in found:
                raise InvalidFile(f"'{name}' is both in {found[name]} and in {shard.file.name} of '{file.parent}'")
            found[name] = shard.file.name
    for name, shard_name in weight_map.items():
        if name not in found:
            raise InvalidFile(f"'{file}' says that '{name}' is in {shard_name}, and it isn't")
        if found[name] != shard_name:
            raise InvalidFile(f"'{file}' says that '{name}' is in {shard_name}, but it is in {found[name]}")
    extra = sorted(found.keys() - weight_map.keys())
    if extra:
        raise InvalidFile(f"{found[extra[0]]} holds '{extra[0]}', which '{file}' does not know")


def base_named_by(adapters: Sequence[Adapter]) -> str:
    """The base that the adapters' own configs name: a folder (seen from here, else from the adapter), or a hub id.

    Raises:
        UsageError: they name none, or different ones.
        NotFound: what they name is neither a folder nor a hub id.
    """
    named: dict[str, str] = {}
    for adapter in adapters:
        for source in adapter.files():
            if source.config.base:
                named.setdefault(_located(source.config.base, source.folder), str(source.folder))
    if not named:
        raise UsageError("the adapter's config names no base: name it with --base")
    if len(named) > 1:
        listed = ", ".join(f"'{folder}' names '{base}'" for base, folder in named.items())
        raise UsageError(f"the adapters were made for different bases ({listed}): name the one to use with --base")
    (base,) = named
    if not Path(base).is_dir() and not looks_like_hub_id(base):
        raise NotFound(f"there is no base '{base}', which adapter '{named[base]}' names: name another with --base")
    return base


def _located(base: str, adapter: Path) -> str:
    candidates = (Path(base), adapter / base)
    return next((str(path.resolve()) for path in candidates if path.is_dir()), base)
