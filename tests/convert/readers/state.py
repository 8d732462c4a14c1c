"""What the tests of readers ask of a source: its state dict, read in pieces; a model of transformers that holds it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lorakit.convert.source import Source, SourceTensor
from lorakit.files.tensors import torch_dtype


def whole(tensor: SourceTensor, step: int | None = None) -> torch.Tensor:
    """The tensor, read `step` elements at a time."""
    count = math.prod(tensor.shape)
    step = step or max(1, count)
    parts = [tensor.read(begin, min(count, begin + step)) for begin in range(0, count, step)]
    read = torch.cat(parts) if parts else tensor.read(0, 0)
    assert read.dtype == torch_dtype(tensor.dtype)
    return read.reshape(tensor.shape)


def state_of(source: Source, step: int | None = None) -> dict[str, torch.Tensor]:
    return {name: whole(tensor, step) for name, tensor in source.tensors.items()}


def model_of(config: Path, state: dict[str, torch.Tensor]) -> Any:
    """transformers' model of that config with these weights, each of them, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config), dtype=torch.float32)
    model.load_state_dict(state)  # strict: no name too many, and none missing
    return model.eval()


def ensure_said(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """That transformers makes the same of the tokens as the trainer's own model did."""
    said = load_file(folder.with_suffix(".safetensors"))
    with torch.no_grad():
        logits = model_of(folder, state)(said["tokens"]).logits
    torch.testing.assert_close(logits, said["logits"], rtol=1e-4, atol=1e-5)


def ensure_converted(path: Path, out: Path, said: Path, **settings: Any) -> None:
    """That `lorakit convert` makes a folder of it with which transformers says what the trainer's own model said."""
    import lorakit

    lorakit.convert(path, out=out, **settings)
    expected = load_file(said)
    model = loaded(out)
    with torch.no_grad():
        torch.testing.assert_close(model(expected["tokens"]).logits, expected["logits"], rtol=1e-4, atol=1e-5)


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
