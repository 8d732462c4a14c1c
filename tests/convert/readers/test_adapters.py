"""LoRA of torchtune and litgpt in PEFT's layout, from checkpoints that they wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorakit.adapters.reading import WEIGHTS, load_adapter
from lorakit.convert.readers.adapters import as_peft, is_foreign
from lorakit.convert.readers.litgpt import read as read_litgpt
from lorakit.errors import Conflict, InvalidFile, NotFound, Refused
from tests.convert.readers.state import state_of
from tests.trainers.by_hand import kept
from tests.trainers.by_hand.small import make_base


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """What torchtune leaves where it writes no PEFT files: its own names alone."""
    folder = kept("torchtune", tmp_path / "torchtune") / "epoch_1"
    (folder / "adapter_model.safetensors").rename(tmp_path / "its_own.safetensors")
    return folder


@pytest.fixture
def lit(tmp_path: Path) -> Path:
    return kept("litgpt", tmp_path / "litgpt") / "final"


def test_torchtunes_names_become_those_that_torchtune_gives_peft(tuned: Path, tmp_path: Path) -> None:
    as_peft(tuned, tmp_path / "out")
    written, expected = load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "its_own.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    adapter = load_adapter(tmp_path / "out")
    assert (adapter.rank, adapter.delta("model.layers.0.self_attn.q_proj").scale) == (2, 2.0)


def test_dora_of_torchtune_keeps_its_magnitudes(tuned: Path, tmp_path: Path) -> None:
    state = torch.load(tuned / "adapter_model.pt", weights_only=True)
    state["layers.0.attn.q_proj.magnitude"] = torch.arange(32.0)
    torch.save(state, tuned / "adapter_model.pt")
    as_peft(tuned, tmp_path / "out")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    expected = torch.arange(32.0).view(2, 8, 2).transpose(1, 2).reshape(-1)
    assert torch.equal(written["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"], expected)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_dora"] is True


def test_without_alpha_the_scale_is_not_known(tuned: Path, tmp_path: Path) -> None:
    (tuned / "adapter_config.json").unlink()
    with pytest.raises(Refused, match=r"no adapter_config.json that says r and lora_alpha, which its scale"):
        as_peft(tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "refusal"),
    [("layers.0.attn.q_proj.odd", "holds 'layers.0.attn.q_proj.odd'"), ("odd.lora_a.weight", "holds 'odd.lora_a")],
)
def test_a_tensor_of_no_known_name_is_never_dropped(tuned: Path, tmp_path: Path, name: str, refusal: str) -> None:
    state = torch.load(tuned / "adapter_model.pt", weights_only=True)
    torch.save({**state, name: torch.ones(2, 2)}, tuned / "adapter_model.pt")
    with pytest.raises(Refused, match=refusal):
        as_peft(tuned, tmp_path / "out")


def test_torchtunes_model_of_an_unknown_order_is_refused(tuned: Path, tmp_path: Path) -> None:
    (tuned / "config.json").write_text(json.dumps({"model_type": "phi3"}))
    with pytest.raises(Refused, match="LoRA of a phi3 model, whose order of rows is not known here"):
        as_peft(tuned, tmp_path / "out")
    (tuned / "config.json").unlink()
    with pytest.raises(Refused, match=r"has no config.json: copy that of the base"):
        as_peft(tuned, tmp_path / "out")


def test_litgpts_lora_is_what_litgpt_merged(lit: Path, tmp_path: Path) -> None:
    """`final` holds the LoRA and the model that litgpt merged it into."""
    as_peft(lit, tmp_path / "out")
    base = load_file(make_base(tmp_path / "base") / "model.safetensors")
    merged = state_of(read_litgpt(lit))
    adapter = load_adapter(tmp_path / "out")
    assert set(adapter.modules) == {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"}
    for name in base:
        module = name.removesuffix(".weight")
        delta = adapter.delta(module).dense() if module in adapter.modules else 0.0
        expected = (base[name].double() + delta).bfloat16()
        torch.testing.assert_close(merged[name], expected, rtol=2**-7, atol=1e-5)
        assert torch.equal(merged[name], base[name]) == (module not in adapter.modules)


def test_litgpts_lora_of_a_step_names_its_base(lit: Path, tmp_path: Path) -> None:
    as_peft(lit.parent / "step-000002" / "lit_model.pth.lora", tmp_path / "out")
    adapter = load_adapter(tmp_path / "out")
    assert (adapter.rank, adapter.config.alpha) == (2, 4)
    assert adapter.base == "/tmp/lorakit-by-hand/base"


def test_every_layer_that_litgpt_can_train_has_a_name(lit: Path, tmp_path: Path) -> None:
    pairs = {"attn.proj": (32, 32), "mlp.fc_1": (48, 32), "mlp.fc_2": (48, 32), "mlp.proj": (32, 48)}
    state = {"lm_head.lora_A": torch.ones(2, 32), "lm_head.lora_B": torch.ones(259, 2)}
    for name, (out, into) in pairs.items():
        state[f"transformer.h.0.{name}.lora_A"] = torch.ones(2, into)
        state[f"transformer.h.0.{name}.lora_B"] = torch.ones(out, 2)
    torch.save({"model": state}, lit / "lit_model.pth.lora")
    as_peft(lit, tmp_path / "out")
    assert set(load_adapter(tmp_path / "out").modules) == {
        "lm_head", "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("state", "refusal"),
    [
        ({"transformer.h.0.attn.qkv.lora_A": torch.ones(6, 32)}, "no lora_A and lora_B"),
        ({"transformer.h.0.attn.qkv.odd": torch.ones(6, 32)}, "is no factor of a LoRA"),
        (
            {
                f"transformer.h.0.attn.qkv.lora_{part}": torch.ones(size)
                for part, size in {"A": (6, 32), "B": (64, 2)}.items()
            },
            "don't fit those of q_proj, v_proj, which were trained",
        ),
        ({"odd.lora_A": torch.ones(2, 32), "odd.lora_B": torch.ones(9, 2)}, "for which lorakit has no name"),
        ({"model": 3}, "something else than tensors by their names"),
    ],
)
def test_a_lora_of_litgpt_that_contradicts_itself_is_refused(
    lit: Path, tmp_path: Path, state: dict[str, torch.Tensor], refusal: str
) -> None:
    torch.save({"model": state}, lit / "lit_model.pth.lora")
    with pytest.raises(Refused, match=refusal):
        as_peft(lit, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model_config.yaml", "hyperparameters.yaml"])
def test_what_litgpt_writes_beside_it_is_needed(lit: Path, tmp_path: Path, name: str) -> None:
    (lit / name).unlink()
    with pytest.raises(Refused, match=f"no {name}, which litgpt writes beside it: copy it there"):
        as_peft(lit, tmp_path / "out")


def test_what_is_there_already_stays(lit: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(Conflict):
        as_peft(lit, tmp_path / "out")


def test_a_folder_without_an_adapter_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"neither adapter_model.safetensors nor adapter_model.pt nor lit_model"):
        as_peft(tmp_path, tmp_path / "out")


def test_whose_names_an_adapter_has_is_told(lit: Path, tuned: Path, tmp_path: Path) -> None:
    assert is_foreign(lit)
    assert is_foreign(tuned)
    assert not is_foreign(tmp_path)
    torch.save({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, tuned / "adapter_model.pt")
    assert not is_foreign(tuned)
    torch.save([1], tuned / "adapter_model.pt")
    with pytest.raises(InvalidFile):
        is_foreign(tuned)
