"""Adapters of PEFT's other methods are mixed as what they add, where that is exactly of low rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file

import lorakit
from lorakit.errors import UnsupportedAdapter
from tests.models import load, make_adapter, make_base

TARGETS = ["q_proj", "down_proj"]
KINDS: dict[str, Any] = {
    "loha": LoHaConfig(r=2, alpha=5, target_modules=TARGETS, modules_to_save=["lm_head"]),
    "lokr": LoKrConfig(r=2, alpha=5, target_modules=TARGETS),
    "vera": VeraConfig(r=4, target_modules=TARGETS),
    "ia3": IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("opened") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    folders = {"lora": make_adapter(base.parent / "lora", base, target_modules=TARGETS, r=3)}
    for name, config in KINDS.items():
        torch.manual_seed(5)
        model = get_peft_model(load(base), config)
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            torch.nn.init.normal_(parameter, std=0.3)
        folders[name] = base.parent / name
        model.save_pretrained(folders[name])
    return folders


def change(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT's own merge adds, in float64."""
    plain = dict(load(base, "float64").state_dict())
    merged = PeftModel.from_pretrained(load(base, "float64"), adapter, autocast_adapter_dtype=False).merge_and_unload()
    return {name: tensor - plain[name] for name, tensor in merged.state_dict().items()}


@pytest.mark.parametrize("kind", ["loha", "lokr", "vera"])
def test_a_mix_with_another_method_is_what_both_add(
    base: Path, adapters: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    mixed = lorakit.mix([(adapters[kind], 0.7), (adapters["lora"], -0.3)], base=base, trained="average")
    found = change(base, mixed.save(tmp_path / "out"))
    one, two = change(base, adapters[kind]), change(base, adapters["lora"])
    for name, tensor in found.items():
        expected = one[name] if name.startswith("lm_head") else 0.7 * one[name] - 0.3 * two[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5, msg=name)
    stage = json.loads((tmp_path / "out" / "lorakit.json").read_text())["parents"][0]
    assert (stage["operation"], stage["settings"], stage["weight"]) == ("as_lora", {"peft_type": kind.upper()}, 0.7)


def test_the_algebra_takes_them_too(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    value = 2 * lorakit.load_adapter(adapters["lokr"]) - lorakit.load_adapter(adapters["lora"])
    found = change(base, value.save(tmp_path / "out"))
    one, two = change(base, adapters["lokr"]), change(base, adapters["lora"])
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 2 * one[name] - two[name], rtol=1e-4, atol=1e-5, msg=name)


def test_one_that_is_named_twice_is_taken_once(adapters: dict[str, Path]) -> None:
    mixed = lorakit.mix([adapters["loha"], adapters["loha"]], trained="average")
    assert mixed.rank == 4
    name = "model.layers.0.self_attn.q_proj"
    once = lorakit.load_adapter(adapters["lokr"])
    assert lorakit.mix([(once, 0.5), (adapters["lokr"], 0.5)]).delta(name).rank == (1.0 * once).delta(name).rank


def test_shrinking_one_gives_the_best_lora(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    small = lorakit.shrink(adapters["loha"], rank=2)
    name = "model.layers.0.self_attn.q_proj.weight"
    dense, found = change(base, adapters["loha"])[name], change(base, small.save(tmp_path / "out"))[name]
    u, s, vh = torch.linalg.svd(dense)
    torch.testing.assert_close(found, (u[:, :2] * s[:2]) @ vh[:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.lm_head.weight"],
        load_file(adapters["loha"] / "adapter_model.safetensors")["base_model.model.lm_head.weight"],
    )


def test_a_method_that_needs_the_base_says_what_helps(adapters: dict[str, Path]) -> None:
    with pytest.raises(UnsupportedAdapter, match=r"IA3.*extract"):
        lorakit.mix([(adapters["ia3"], 1.0), (adapters["lora"], 1.0)])


def test_a_base_that_is_not_named_anywhere(adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "vera"
    folder.mkdir()
    for file in adapters["vera"].iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(UnsupportedAdapter, match=r"doesn't say how large the layers are.*--base"):
        lorakit.mix([(folder, 1.0)])
