"""Adapters for PEFT itself: under the names that it looks for, and as they are where no plain LoRA is the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorakit.convert.adapters.convert import convert_adapter
from lorakit.errors import Refused
from tests.convert.adapters.test_convert import PARAMETERS, WEIGHTS, answers_with, is_served_form, with_raw_names
from tests.merge.kinds import Kind, answers, make_kind, on_disk, open_model


def as_on_the_hub(folder: Path, base: Path) -> Path:
    """The files of a GPT-2, whose names lack what the names in memory begin with."""
    shutil.copytree(base, folder)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in on_disk(base).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", ["gpt2", "llava"])
def test_peft_gets_the_names_of_the_running_model(tmp_path: Path, bases: Callable[[str], Path], family: str) -> None:
    base = as_on_the_hub(tmp_path / "base", bases("gpt2")) if family == "gpt2" else bases(family)
    kind = Kind({"use_rslora": True, "fan_in_fan_out": family == "gpt2"})
    adapter = make_kind(tmp_path / "adapter", base, family, kind)
    report = convert_adapter(adapter, tmp_path / "out", base=str(base), target="peft")
    assert (dict(report.renamed), report.notes) == ({}, ())
    assert is_served_form(tmp_path / "out")
    wanted = answers_with(base, family, adapter)
    assert not torch.allclose(wanted, answers(open_model(base, family, "float32"), family), atol=1e-2)
    torch.testing.assert_close(answers_with(base, family, tmp_path / "out"), wanted, rtol=1e-4, atol=1e-4)


OF_PEFT = {
    "dora": ("llama", Kind({"use_dora": True})),
    "lora_bias": ("qwen2", Kind({"lora_bias": True, "target_modules": ["q_proj", "v_proj"]})),
    "a saved norm": ("llama", Kind({"modules_to_save": ["norm"]})),
    "one parameter of experts": ("gpt-oss", Kind({"target_parameters": PARAMETERS[1:]})),
    "experts of which each is a tensor on disk": ("qwen3-moe", Kind({"target_parameters": PARAMETERS})),
    "unconverted pissa": ("llama", Kind({"init_lora_weights": "pissa"}, starts_from_base=True)),
}


@pytest.mark.parametrize("name", OF_PEFT)
def test_what_peft_alone_has_is_copied_for_peft(tmp_path: Path, bases: Callable[[str], Path], name: str) -> None:
    family, kind = OF_PEFT[name]
    adapter = make_kind(tmp_path / "adapter", bases(family), family, kind)
    report = convert_adapter(adapter, tmp_path / "out", base=str(bases(family)), target="peft")
    for file in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (adapter / file).read_bytes()
    assert (report.error, report.dtype, dict(report.renamed)) == (0.0, "keep", {})
    assert any("copied as it is" in note for note in report.notes)


def test_what_peft_would_not_find_by_its_name_is_not_copied(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    kind = Kind({"use_dora": True}, change=with_raw_names)
    adapter = make_kind(tmp_path / "adapter", bases("llama"), "llama", kind)
    with pytest.raises(Refused, match="no plain LoRA has"):
        convert_adapter(adapter, tmp_path / "out", base=str(bases("llama")), target="peft")


@pytest.mark.parametrize(("target", "server"), [("sglang", "SGLang"), ("llama.cpp", "llama.cpp"), ("vllm", "vLLM")])
def test_a_refusal_speaks_of_the_server_that_was_named(
    tmp_path: Path, bases: Callable[[str], Path], target: str, server: str
) -> None:
    adapter = make_kind(tmp_path / "adapter", bases("llama"), "llama", Kind({"use_dora": True}))
    with pytest.raises(Refused, match=f"^{server} serves no adapter with use_dora"):
        convert_adapter(adapter, tmp_path / "out", base=str(bases("llama")), target=target)
