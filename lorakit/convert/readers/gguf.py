"""GGUF as llama.cpp writes it: plain tensors by their bytes, quantised ones as the numbers that they stand for."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.convert.gguf_names import BUFFERS, LAYOUTS, Layout, gguf_library
from lorakit.convert.readers.pieced import with_config
from lorakit.convert.readers.rows import TURNED, HalvedHeads
from lorakit.convert.readers.templates import ensure_apart, renamed
from lorakit.convert.readers.torch_files import without_ema
from lorakit.convert.source import PlainTensor, Source, SourceTensor
from lorakit.errors import Incomplete, InvalidFile, Refused
from lorakit.files.folders import file_state
from lorakit.files.gguf import GgufHeader, GgufTensor, read_gguf_header
from lorakit.files.regular import opened
from lorakit.files.safetensors import DTYPE_BITS, StoredTensor

if TYPE_CHECKING:
    import torch

PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class Dequantised:
    """A quantised tensor as float32, block by block, as gguf's own functions have it: `block` numbers in `nbytes`."""

    file: Path
    tensor: GgufTensor
    block: int
    nbytes: int

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def read(self, begin: int, end: int) -> torch.Tensor:
        import numpy as np
        import torch

        if begin >= end:
            return torch.empty(0)
        gguf = gguf_library()
        first, last = begin // self.block, -(-end // self.block)
        count = (last - first) * self.nbytes
        with opened(self.file) as stream:
            stored = os.pread(stream.fileno(), count, self.tensor.start + first * self.nbytes)
        if len(stored) < count:
            raise InvalidFile(f"'{self.file}' became shorter while '{self.tensor.name}' was read")
        blocks = np.frombuffer(stored, dtype=np.uint8).reshape(last - first, self.nbytes)
        numbers = gguf.dequantize(blocks, gguf.GGMLQuantizationType(self.tensor.kind))
        return torch.from_numpy(numbers).reshape(-1)[begin - first * self.block : end - first * self.block].float()


@dataclass(frozen=True, slots=True)
class Lowered:
    """Less 1, in float32: Gemma's norms, to which llama.cpp adds it."""

    of: SourceTensor

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    def read(self, begin: int, end: int) -> torch.Tensor:
        return self.of.read(begin, end).float() - 1


def read(path: Path, *, weights: str = "model") -> Source:
    """Open a GGUF file, all parts of one that was split, or the one in a folder.

    Raises:
        UsageError: EMA weights are asked for, which it can't hold.
        NotFound: there is no such file.
        Incomplete: a part of a split one is missing.
        InvalidFile: it is damaged.
        Refused: its architecture, or a type in it, is not known; it is an adapter; or `gguf` isn't installed.
    """
    without_ema(path, weights)
    headers = [read_gguf_header(file) for file in _files(path)]
    first = headers[0]
    layout = _layout(first)
    tensors: dict[str, SourceTensor] = {}
    buffers: list[str] = []
    quantised = False
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in BUFFERS:
                buffers.append(name)
                continue
            stored = _stored(tensor, header)
            quantised |= isinstance(stored, Dequantised)
            target = renamed(name, layout.names) or name
            ensure_apart([target], tensors, f"'{header.file}', or a part before it,")
            tensors[target] = _laid_out(stored, target, layout, first)
    beside = with_config(first.file.parent)
    left_out = {"rotary embeddings, which are computed": tuple(buffers)} if buffers else {}
    notes = ("its quantised tensors are written as the float32 that they stand for",) if quantised else ()
    return Source(path, "gguf", tensors, left_out, beside, {one.file: file_state(one.file) for one in headers}, notes)


def _layout(header: GgufHeader) -> Layout:
    """Raises Refused where it is no model, or one whose names are not known."""
    if header.values.get("general.type") == "adapter":
        raise Refused(f"'{header.file}' is an adapter in llama.cpp's form: convert the one that it was made from")
    layout = LAYOUTS.get(header.architecture)
    if layout is None:
        raise Refused(
            f"'{header.file}' is a {header.architecture or 'nameless'} model, whose tensors lorakit has no names for; "
            f"it has those of {', '.join(LAYOUTS)}: load it with transformers (gguf_file=…), and save that"
        )
    return layout


def _files(path: Path) -> Sequence[Path]:
    """The parts in their order."""
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        stems = {match["stem"] if (match := _SPLIT.fullmatch(file.name)) else file.name for file in found}
        if len(stems) != 1:
            said = ", ".join(file.name for file in found) or "none"
            raise Refused(f"'{path}' should hold one GGUF model, and holds {said}: name the file")
        path = found[0]
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    names = [f"{match['stem']}-{part:05}-of-{match['parts']}.gguf" for part in range(1, int(match["parts"]) + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing or not names:
        raise Incomplete(f"'{path.parent}' lacks {missing[0] if missing else 'all'} of {match['parts']} parts")
    return [path.parent / name for name in names]


def _stored(tensor: GgufTensor, header: GgufHeader) -> SourceTensor:
    """Raises InvalidFile where it reaches behind the end of its file."""
    dtype = PLAIN.get(tensor.kind)
    found: SourceTensor
    if dtype is not None:
        nbytes = math.prod(tensor.shape) * DTYPE_BITS[dtype] // 8
        stored = StoredTensor(tensor.name, header.file, dtype, tensor.shape, tensor.start, tensor.start + nbytes)
        found = PlainTensor(stored)
    else:
        block, size = _block(tensor, header)
        if not tensor.shape or tensor.shape[-1] % block:
            raise InvalidFile(f"'{header.file}': the rows of '{tensor.name}' are no whole blocks of {block}")
        nbytes = math.prod(tensor.shape) // block * size
        found = Dequantised(header.file, tensor, block, size)
    if tensor.start + nbytes > header.size:
        raise InvalidFile(f"'{header.file}' is cut short: '{tensor.name}' reaches behind its end")
    return found


def _block(tensor: GgufTensor, header: GgufHeader) -> tuple[int, int]:
    """Numbers and bytes of one block."""
    gguf = gguf_library()
    try:
        kind: Any = gguf.GGMLQuantizationType(tensor.kind)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        gguf.dequantize(_zeros(size), kind)  # some types can only be written
    except (ValueError, KeyError, NotImplementedError):
        raise Refused(
            f"'{header.file}': '{tensor.name}' is quantised in a way (type {tensor.kind}) that the gguf package does "
            f"not undo: take a file of another type, F16 or Q8_0"
        ) from None
    return int(block), int(size)


def _zeros(size: int) -> Any:
    import numpy as np

    return np.zeros((1, size), dtype=np.uint8)


def _laid_out(tensor: SourceTensor, target: str, layout: Layout, header: GgufHeader) -> SourceTensor:
    """In transformers' order, and with its numbers."""
    if layout.raised and target.endswith("norm.weight"):
        return Lowered(tensor)
    if not (layout.alternating and target.endswith(TURNED)):
        return tensor
    width, heads = header.number("embedding_length"), header.number("attention.head_count")
    size = header.number("attention.key_length") or (width // heads if width and heads else 0)
    if size < 2 or size % 2 or not tensor.shape or tensor.shape[0] % size:
        raise InvalidFile(f"'{header.file}': '{target}' is {list(tensor.shape)}: these are no heads of {size} rows")
    return HalvedHeads(tensor, size)
