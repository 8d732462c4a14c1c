"""Quantised folders: those that the real tools wrote, and small ones made here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lorakit.files.safetensors import read_header
from lorakit.files.tensors import tensor_bytes
from lorakit.merge.quantised import QuantisedWeight, quantised_weights

DATA = Path(__file__).parent / "data"
FOLDERS = sorted(folder.name for folder in DATA.iterdir())


def weights_in(folder: Path) -> dict[str, QuantisedWeight]:
    config = json.loads((folder / "config.json").read_text())
    return quantised_weights(config, read_header(folder / "model.safetensors").tensors)


def made(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """A folder of these tensors whose config has these quantisation settings."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", **config, "quantization_config": settings}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def one(folder: Path) -> QuantisedWeight:
    (weight,) = weights_in(folder).values()
    return weight


def expected(name: str) -> dict[str, torch.Tensor]:
    """As the tool dequantised them, in its dtype."""
    return load_file(DATA / name / "expected.safetensors")


def source(name: str) -> dict[str, torch.Tensor]:
    """What the tool had quantised."""
    return load_file(DATA / name / "source.safetensors")


def random(*shape: int, seed: int = 0, scale: float = 0.05) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def with_delta(weight: torch.Tensor, ratio: float, seed: int = 1) -> torch.Tensor:
    """The weight after a merge of rank 4, `ratio` times as large as the weight."""
    delta = random(weight.shape[0], 4, seed=seed) @ random(4, weight.shape[1], seed=seed + 1)
    return weight + delta * (ratio * weight.norm() / delta.norm())


def assert_stored(weight: QuantisedWeight, packed: Mapping[str, torch.Tensor]) -> None:
    """That these are, byte for byte, what stands in the file, and fit where it stands."""
    assert packed.keys() == {role for role, part in weight.parts.items() if part in weight.rewritten}
    for role, tensor in packed.items():
        part = weight.parts[role]
        assert tuple(tensor.shape) == part.shape
        with part.file.open("rb") as stream:
            stream.seek(part.start)
            assert bytes(tensor_bytes(tensor)) == stream.read(part.nbytes), role
