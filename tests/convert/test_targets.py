"""Adapters for PEFT, LoRAX, SGLang and llama.cpp: what each is given adds exactly what was trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open

from lorakit.adapters.reading import load_adapter
from lorakit.convert.targets import TARGETS, write_for
from lorakit.convert.targets.llama_cpp import FILE
from lorakit.errors import Refused, UnsupportedAdapter, UsageError
from lorakit.merge.base import BaseModel, read_base
from tests.convert.readers.gguf_files import KEYS, tiny

TOKENS = torch.arange(3, 23).view(1, -1)
ODD_SCALES = {
    "r": 4, "lora_alpha": 7, "use_rslora": True, "rank_pattern": {"v_proj": 2, "layers.1.mlp.up_proj": 6},
    "alpha_pattern": {"o_proj": 3},
}  # fmt: skip
BIASED = {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PARENTS = {part: "self_attn" if part in LINEAR[:4] else "mlp" for part in LINEAR}


class Trained:
    """An adapter that PEFT wrote, the base it was made for, and what PEFT makes of both."""

    def __init__(self, folder: Path, kind: str = "llama", base: Mapping[str, Any] | None = None, **config: Any) -> None:
        self.base, self.adapter = folder / "base", folder / "adapter"
        model = tiny(kind, **(base or {}))
        model.save_pretrained(self.base)
        config = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "init_lora_weights": False, **config}
        self.model = get_peft_model(model, LoraConfig(**config)).eval()
        for name, parameter in self.model.named_parameters():
            if "lora_" in name and "bias" in name:
                torch.nn.init.normal_(parameter)
        self.model.save_pretrained(self.adapter, save_embedding_layers=False)

    def said(self) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.model(TOKENS).logits
        return logits

    def deltas(self) -> dict[str, torch.Tensor]:
        """By module path, in the base's layout: what PEFT itself adds."""
        layers = {name: layer for name, layer in self.model.named_modules() if hasattr(layer, "get_delta_weight")}
        return {
            name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach()
            for name, layer in layers.items()
        }

    def opened(self) -> BaseModel:
        return read_base(self.base)

    def write(self, target: str, folder: Path, *, base: bool = True) -> Path:
        folder.mkdir()
        write_for(target, load_adapter(self.adapter), folder, self.opened() if base else None)
        return folder


def said_by_peft(base: Path, folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


def modules_in(folder: Path) -> set[str]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as opened:
        return {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in opened.keys()}  # noqa: SIM118


@pytest.mark.parametrize("target", ["peft", "vllm", "lorax", "sglang"])
def test_a_folder_adds_what_was_trained(tmp_path: Path, target: str) -> None:
    trained = Trained(tmp_path, **ODD_SCALES)
    folder = trained.write(target, tmp_path / "out")
    torch.testing.assert_close(said_by_peft(trained.base, folder), trained.said(), rtol=1e-4, atol=1e-5)
    assert not load_adapter(folder).config.rank_pattern
    assert load_adapter(folder).config.scale_of("model.layers.0.self_attn.q_proj") == 1.0


def test_peft_keeps_embeddings(tmp_path: Path) -> None:
    trained = Trained(tmp_path, "qwen2", target_modules=["embed_tokens"])
    folder = trained.write("peft", tmp_path / "out", base=False)
    torch.testing.assert_close(said_by_peft(trained.base, folder), trained.said(), rtol=1e-4, atol=1e-5)


# LoRAX and SGLang


def test_lorax_sees_each_kind_of_module_in_every_layer(tmp_path: Path) -> None:
    trained = Trained(tmp_path, target_modules=r".*layers\.1\.(self_attn\.q_proj|mlp\.down_proj)")
    folder = trained.write("lorax", tmp_path / "out")
    expected = {f"model.layers.{layer}.{kind}" for layer in (0, 1) for kind in ("self_attn.q_proj", "mlp.down_proj")}
    assert modules_in(folder) == expected
    torch.testing.assert_close(said_by_peft(trained.base, folder), trained.said(), rtol=1e-4, atol=1e-5)


def test_sglang_sees_the_parts_of_what_it_holds_in_one(tmp_path: Path) -> None:
    trained = Trained(tmp_path, target_modules=r".*layers\.1\.(self_attn\.k_proj|mlp\.(up|down)_proj)")
    folder = trained.write("sglang", tmp_path / "out")
    expected = {f"model.layers.1.{PARENTS[part]}.{part}" for part in LINEAR if part != "o_proj"}
    assert modules_in(folder) == expected
    torch.testing.assert_close(said_by_peft(trained.base, folder), trained.said(), rtol=1e-4, atol=1e-5)


def test_the_base_is_asked_for_where_it_decides(tmp_path: Path) -> None:
    trained = Trained(tmp_path, target_modules=["q_proj"])
    with pytest.raises(
        UsageError, match=r"only the weights of the base say which layers there are: name it with --base$"
    ):
        trained.write("lorax", tmp_path / "lorax", base=False)
    with pytest.raises(UsageError, match=r"SGLang holds '.*k_proj', .* only the weights of the base say its size"):
        trained.write("sglang", tmp_path / "sglang", base=False)
    with pytest.raises(UsageError, match="depends on the base: name it with --base"):
        trained.write("llama.cpp", tmp_path / "llama", base=False)
    quantised = replace(trained.opened(), config={"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(UsageError, match="name it with --base, as it was before it was quantised"):
        write_for("lorax", load_adapter(trained.adapter), tmp_path, quantised)
    whole = Trained(tmp_path / "whole")
    assert modules_in(whole.write("sglang", tmp_path / "whole" / "out", base=False)) == set(whole.deltas())


@pytest.mark.filterwarnings("ignore:Adapter 'default'.* have invalid shape")  # PEFT takes its own biases for broken
def test_what_a_server_would_leave_out_in_silence_is_refused(tmp_path: Path) -> None:
    rows = Trained(tmp_path / "rows", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(UnsupportedAdapter, match=r"'model.embed_tokens', which LoRAX would leave out .*lorakit merge"):
        rows.write("lorax", tmp_path / "lorax")
    biases = Trained(tmp_path / "bias", "qwen2", **BIASED)
    for target in TARGETS:
        with pytest.raises(UnsupportedAdapter, match=r"lora_bias"):
            biases.write(target, tmp_path / f"biases-{target}")
    dora = Trained(tmp_path / "dora", use_dora=True)
    with pytest.raises(UnsupportedAdapter, match=r"can't be written for SGLang exactly: it has use_dora"):
        dora.write("sglang", tmp_path / "dora" / "out")


def test_an_unknown_server_is_named_with_the_nearest(tmp_path: Path) -> None:
    trained = Trained(tmp_path, target_modules=["q_proj"])
    with pytest.raises(UsageError, match=r"known for 'llamacpp': did you mean llama.cpp\?"):
        trained.write("llamacpp", tmp_path / "out")
    with pytest.raises(UsageError, match=r"there are vllm, peft, lorax, sglang, llama.cpp"):
        write_for("tgi", load_adapter(trained.adapter), tmp_path)


# llama.cpp


def read_back(file: Path) -> tuple[Any, dict[str, np.ndarray]]:
    import gguf

    reader = gguf.GGUFReader(file)
    return reader, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def what_llama_cpp_adds(file: Path, config: Any) -> dict[str, torch.Tensor]:
    """By transformers' module paths: alpha over each module's rank, times B A, the order of rows undone."""
    import gguf

    reader, tensors = read_back(file)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    wanted = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == KEYS[config.model_type])
    names = gguf.get_tensor_name_map(wanted, config.num_hidden_layers)
    layers = range(config.num_hidden_layers)
    parts = [f"model.layers.{layer}.{PARENTS[part]}.{part}" for layer in layers for part in LINEAR]
    found = {}
    for module in (*parts, "model.embed_tokens", "lm_head"):
        weight = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if f"{weight}.lora_a" not in tensors:
            continue
        a, b = tensors.pop(f"{weight}.lora_a"), tensors.pop(f"{weight}.lora_b")
        scale = alpha / b.shape[1]
        delta = (a @ b.T if module.endswith("embed_tokens") else b @ a) * scale
        if KEYS[config.model_type] == "llama" and module.endswith(("q_proj", "k_proj")):
            rows, into = delta.shape
            delta = delta.reshape(-1, config.head_dim // 2, 2, into).swapaxes(1, 2).reshape(rows, into)
        found[module] = torch.from_numpy(delta)
    assert not tensors
    return found


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_llama_cpp_adds_what_peft_adds(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("gguf", reason="pip install 'lorakit[gguf]'")
    trained = Trained(tmp_path, kind, **ODD_SCALES)
    folder = trained.write("llama.cpp", tmp_path / "out")
    added, expected = what_llama_cpp_adds(folder / FILE, trained.model.config), trained.deltas()
    assert added.keys() == expected.keys()
    for module, delta in expected.items():
        torch.testing.assert_close(added[module], delta, rtol=1e-4, atol=1e-6)


def test_llama_cpp_gets_embedding_and_head(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="pip install 'lorakit[gguf]'")
    trained = Trained(tmp_path, target_modules=["embed_tokens", "lm_head", "q_proj"], use_rslora=True)
    folder = trained.write("llama.cpp", tmp_path / "out")
    added, expected = what_llama_cpp_adds(folder / FILE, trained.model.config), trained.deltas()
    assert added.keys() == expected.keys()
    for module, delta in expected.items():
        torch.testing.assert_close(added[module], delta, rtol=1e-4, atol=1e-6)


def test_a_file_for_llama_cpp_says_what_llama_cpp_asks_of_it(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="pip install 'lorakit[gguf]'")
    trained = Trained(tmp_path, **ODD_SCALES)
    reader, tensors = read_back(trained.write("llama.cpp", tmp_path / "out") / FILE)
    said = {name: reader.fields[name].contents() for name in ("general.type", "general.architecture", "adapter.type")}
    assert said == {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    assert {array.dtype for array in tensors.values()} == {np.dtype("float32")}
    assert all(name.endswith((".weight.lora_a", ".weight.lora_b")) for name in tensors)
    ranks = {array.shape[1] for name, array in tensors.items() if name.endswith("lora_b")}
    assert ranks == {int(reader.fields["adapter.lora.alpha"].contents())}


def test_what_llama_cpp_has_no_place_for_is_refused(tmp_path: Path) -> None:
    tied = Trained(tmp_path / "tied", target_modules=["lm_head"])
    config = json.loads((tied.base / "config.json").read_text())
    (tied.base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(UnsupportedAdapter, match="no such tensor of a base whose head is its embedding"):
        tied.write("llama.cpp", tmp_path / "tied" / "out")
    other = replace(tied.opened(), config={"model_type": "olmo"})
    with pytest.raises(Refused, match=r"a olmo model is not known here: write it with --for peft"):
        write_for("llama.cpp", load_adapter(tied.adapter), tmp_path, other)


def test_without_the_extra_llama_cpp_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(tmp_path, target_modules=["q_proj"])
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(Refused, match=r"pip install 'lorakit\[gguf\]'"):
        trained.write("llama.cpp", tmp_path / "out")
