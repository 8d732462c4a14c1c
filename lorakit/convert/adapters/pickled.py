"""An adapter that PEFT, or what came before it, saved as a pickle (`adapter_model.bin`), as safetensors.

No pickle runs: tensors are byte ranges of the file, and are copied as such.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from lorakit.adapters.reading import WEIGHTS
from lorakit.errors import InvalidFile
from lorakit.files.folders import copy_file, write_all
from lorakit.files.safetensors import planned_header
from lorakit.files.tensors import tensor_bytes
from lorakit.files.torch_file import StoredTorchTensor, read_torch_file
from lorakit.files.torch_tensors import load_torch_range

PICKLED = ("adapter_model.bin", "adapter_model.pt")
ELEMENTS = 1 << 22  # that are in memory at once


def as_safetensors(path: Path, place: Path) -> None:
    """The same adapter in a new folder `place`.

    Raises:
        InvalidFile: the file is damaged, or holds something else than tensors by their names.
    """
    file = next(path / name for name in PICKLED if (path / name).is_file())
    found = read_torch_file(file)
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, StoredTorchTensor) for name, tensor in found.items()
    ):
        raise InvalidFile(f"'{file}' holds more than an adapter's tensors by their names: save it as safetensors")
    place.mkdir(parents=True)
    copy_file(path / "adapter_config.json", place / "adapter_config.json")
    planned = [(name, tensor.dtype, tensor.shape) for name, tensor in found.items()]
    head, header = planned_header(place / WEIGHTS, planned, {"format": "pt"})
    with (place / WEIGHTS).open("xb") as stream:
        os.truncate(stream.fileno(), header.size)
        write_all(stream.fileno(), head, 0)
        for name, tensor in found.items():
            start, count = header.tensors[name].start, math.prod(tensor.shape)
            for begin in range(0, count, ELEMENTS):
                block = load_torch_range(name, tensor, begin, min(begin + ELEMENTS, count))
                write_all(stream.fileno(), tensor_bytes(block), start + begin * tensor.itemsize)
