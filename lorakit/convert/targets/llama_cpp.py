"""An adapter as llama.cpp takes it: one GGUF file.

llama.cpp scales each module by alpha over its own rank (src/llama-adapter.h, `get_scale`), and knows neither rsLoRA nor
alpha_pattern. With one rank, alpha = rank, and the scale in B, what it adds is what was trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.delta import Delta
from lorakit.adapters.writing import ensure_finite, written
from lorakit.convert.gguf_names import ARCHITECTURES, LAYOUTS, Layout, gguf_library
from lorakit.convert.readers.templates import head_size, renamed
from lorakit.errors import InvalidFile, Refused, UnsupportedAdapter, UsageError
from lorakit.merge.base import BaseModel
from lorakit.merge.layers import is_tied

if TYPE_CHECKING:
    import torch

FILE = "adapter.gguf"


@dataclass(frozen=True, slots=True)
class _Pair:
    """A module's change under llama.cpp's name of its weight, and the rows of a head where their order is Meta's."""

    weight: str
    delta: Delta
    head: int | None

    @property
    def shapes(self) -> tuple[int, int]:
        """Rows of B, and columns of A."""
        return self.delta.terms[0].shape


def write_gguf_adapter(adapter: Adapter, folder: Path, base: BaseModel | None) -> None:
    """`adapter.gguf` into a folder that is there; one module is in memory at a time.

    Raises:
        UsageError: there is no base, whose kind of model decides.
        Refused: llama.cpp's names for it are not known here, or `gguf` isn't installed.
        UnsupportedAdapter: a module has no counterpart in llama.cpp.
    """
    if base is None:
        raise UsageError("what llama.cpp calls an adapter's modules depends on the base: name it with --base")
    architecture, layout = _layout(base)
    pairs = [_pair(module, delta, layout, base, adapter) for module, delta in adapter.deltas.items()]
    rank = max(1, adapter.rank)
    gguf = gguf_library()
    writer = gguf.GGUFWriter(folder / FILE, architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
        for name, shape in _planned(pairs, rank):
            _plan(writer, name, shape)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for pair in pairs:
            for factor in _factors(pair, rank):
                writer.write_tensor_data(factor.numpy())
    finally:
        writer.close()


def _layout(base: BaseModel) -> tuple[str, Layout]:
    architecture = ARCHITECTURES.get(base.model_type)
    if architecture is None:
        raise Refused(
            f"what llama.cpp calls the tensors of a {base.model_type} model is not known here: write it with "
            f"--for peft, which llama.cpp's own convert_lora_to_gguf.py then reads right"
        )
    return architecture, LAYOUTS[architecture]


def _pair(module: str, delta: Delta, layout: Layout, base: BaseModel, adapter: Adapter) -> _Pair:
    name = renamed(f"{module}.weight", layout.places)
    if name is None:
        raise UnsupportedAdapter(
            f"adapter '{adapter.name}' changes '{module}', for which llama.cpp's {base.model_type} has no counterpart "
            f"that is known here: merge it into its base (lorakit merge), and convert that"
        )
    if name == "output.weight" and is_tied(base):
        raise UnsupportedAdapter(
            f"adapter '{adapter.name}' changes '{module}', and llama.cpp has no such tensor of a base whose head is "
            f"its embedding: merge it into its base (lorakit merge), which unties them, and convert that"
        )
    alternating = layout.alternating and module.endswith((".q_proj", ".k_proj"))
    size = head_size(base.config, f"'{base.folder}'") if alternating else None
    if size and delta.shape[0] % size:
        raise InvalidFile(f"'{module}' of '{adapter.name}' has {delta.shape[0]} rows, which are no heads of {size}")
    return _Pair(name, delta, size)


def _planned(pairs: list[_Pair], rank: int) -> Iterator[tuple[str, tuple[int, int]]]:
    for pair in pairs:
        out, into = pair.shapes
        a = (into, rank) if pair.delta.kind == "embedding" else (rank, into)
        yield f"{pair.weight}.lora_a", a
        yield f"{pair.weight}.lora_b", (out, rank)


def _plan(writer: Any, name: str, shape: tuple[int, int]) -> None:
    import numpy as np

    writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) * 4)


def _factors(pair: _Pair, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as they are stored; A of an embedding transposed, as llama.cpp takes rows of it."""
    a, b = written(pair.delta, rank)
    ensure_finite(pair.weight, a, b)
    if pair.head:
        b = b.view(-1, 2, pair.head // 2, rank).transpose(1, 2).reshape(b.shape)
    return (a.T if pair.delta.kind == "embedding" else a).contiguous(), b.contiguous()
