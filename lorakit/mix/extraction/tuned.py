"""What is extracted from: a model on disk, or an adapter of any kind, merged into its base tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lorakit.adapters.adapter import Adapter
from lorakit.checkpoints.locate import find_checkpoint, nothing_named, open_adapter
from lorakit.errors import UsageError
from lorakit.files.hub import looks_like_hub_id
from lorakit.files.safetensors import Header, StoredTensor
from lorakit.files.tensors import load_tensor, tensor_bytes, torch_dtype
from lorakit.merge.base import BaseModel, base_named_by, read_base
from lorakit.merge.plan import ComputeTensor, MergePlan, plan_merge

if TYPE_CHECKING:
    import torch

    from lorakit.merge.blocks import Adder
    from lorakit.merge.execute import Sources


class Tuned(Protocol):
    """A tuned model: its names and shapes, and its tensors one by one."""

    model: BaseModel
    is_stored: bool  # whether the tensors that `model` names are on disk with these values

    def load(self, stored: StoredTensor) -> torch.Tensor:
        """One tensor of `model`."""

    def files(self) -> list[Path]:
        """All that is read for its tensors."""

    def parents(self) -> list[dict[str, Any]]:
        """What lorakit.json says of it."""

    def ensure_unchanged(self) -> None:
        """Raises Conflict when a file was written again since its header was read."""


class TunedModel:
    """A model folder."""

    is_stored = True

    def __init__(self, model: BaseModel) -> None:
        self.model = model

    def load(self, stored: StoredTensor) -> torch.Tensor:
        return load_tensor(stored)

    def files(self) -> list[Path]:
        return [shard.file for shard in self.model.shards]

    def parents(self) -> list[dict[str, Any]]:
        return [parent_of(self.model, "tuned")]

    def ensure_unchanged(self) -> None:
        self.model.ensure_unchanged()


class MergedAdapter:
    """What merging an adapter in float32 would write, computed as it is asked for.

    A tensor of `model` has the name and the shape of the result, and the place of what it is made from.
    """

    is_stored = False

    def __init__(self, adapter: Adapter, plan: MergePlan, adder: Adder, sources: Sources) -> None:
        self._adapter = adapter
        self._plan = plan
        self._adder = adder
        self._sources = sources
        self._computed = {tensor.target.name: tensor for tensor in plan.computed if tensor.steps}
        parts = [(part.source, part.target) for shard in plan.shards for part in shard.copied]
        parts += [(part.source, part.target) for part in plan.computed]
        tensors = {to.name: replace(source, name=to.name, shape=to.shape) for source, to in parts}
        base = plan.base
        shard = Header(base.shards[0].file, 0, 0, tensors, {})
        config = base.config if plan.config is None else plan.config
        self.model = BaseModel(adapter.name, base.folder, config, (shard,), None, ())

    def load(self, stored: StoredTensor) -> torch.Tensor:
        import torch

        tensor = self._computed.get(stored.name)
        if tensor is None:
            return load_tensor(stored)
        threads = torch.get_num_threads()
        output = _InMemory(tensor)
        self._adder.write(tensor, self._sources.of(tensor.source), output)
        torch.set_num_threads(threads)
        return output.whole

    def files(self) -> list[Path]:
        return [shard.file for shard in self._plan.base.shards] + [source.file for source in self._adapter.files()]

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process, which opens the files itself."""
        return merged_adapter, (self._adapter, self._plan, self._adder.device)

    def parents(self) -> list[dict[str, Any]]:
        return [{"kind": "adapter"} | source.as_parent() for source in self._adapter.sources]

    def ensure_unchanged(self) -> None:
        self._adapter.ensure_unchanged()


class _InMemory:
    """Takes in the blocks of one tensor."""

    def __init__(self, tensor: ComputeTensor) -> None:
        import torch

        self.whole = torch.empty(tensor.target.shape, dtype=torch_dtype(tensor.target.dtype))
        self._bytes = tensor_bytes(self.whole)

    def put(self, tensor: ComputeTensor, offset: int, view: memoryview) -> None:
        self._bytes[offset : offset + len(view)] = view


def merged_adapter(adapter: Adapter, plan: MergePlan, device: str) -> MergedAdapter:
    """Computed on `device`, with files that stay open as long as the process runs."""
    from lorakit.merge.blocks import Adder, usable_device
    from lorakit.merge.execute import Sources

    return MergedAdapter(adapter, plan, Adder(usable_device(device), 1, lambda _: None), Sources())


@contextmanager
def opened(
    tuned: str | os.PathLike[str], base: str | os.PathLike[str] | None, device: str
) -> Iterator[tuple[Tuned, BaseModel]]:
    """The tuned model and its base.

    Raises:
        UsageError: no base is named, and the tuned one is no adapter, which names its own.
        NotFound, Refused: as `read_base` and `open_adapter`, and as `plan_merge` for an adapter.
    """
    name = os.fspath(tuned)
    found = find_checkpoint(name)
    if found is None and not looks_like_hub_id(name):
        raise nothing_named(name)
    name = name if found is None else str(found)
    if found is None or not _is_adapter(found):
        if base is None:
            raise UsageError(f"name the model that '{name}' was trained from with --base")
        yield TunedModel(read_base(name)), read_base(base)
        return
    from lorakit.merge.blocks import Adder, usable_device
    from lorakit.merge.execute import Sources

    adapter = open_adapter(name)
    model = read_base(base_named_by([adapter]) if base is None else base)
    plan = plan_merge(model, [adapter], dtype="fp32")
    sources = Sources()
    try:
        yield MergedAdapter(adapter, plan, Adder(usable_device(device), 1, lambda _: None), sources), model
    finally:
        sources.close()


def parent_of(model: BaseModel, kind: str) -> dict[str, Any]:
    """What lorakit.json says of a model."""
    path = str(model.folder.absolute())
    said = {"path": path, "reference": model.reference, "identity": model.identity, "weights": model.weights_digest}
    return {"kind": kind, **said}


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
