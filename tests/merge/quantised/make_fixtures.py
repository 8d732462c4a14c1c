"""Quantised weights as the tools themselves write and read them: what the tests compare with.

Run by hand, in an environment that has the tool beside lorakit's own:

    python -m tests.merge.quantised.make_fixtures bitsandbytes tests/merge/quantised/data

`bitsandbytes` was 0.50.2, `gptqmodel` and `awq` were gptqmodel 7.7.0, `compressed` was llm-compressor 0.14.0.1 with
compressed-tensors 0.19.0; all with torch 2.13.0+cpu and transformers 5.19.0, on a CPU. A folder holds config.json,
`model.safetensors` (the tensors of KEPT alone), `expected.safetensors` (the same weights as the tool dequantises them,
in the dtype in which it does), and where the tool rounds to nearest, `source.safetensors`: what it quantised.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

KEPT = ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj")
SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 32}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}


def tiny(folder: Path, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, **HEADS, **sizes}, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)  # far from round numbers, as a trained one
    model.to(dtype).save_pretrained(folder)
    return folder


def keep(written: Path, kept: Path, expected: dict[str, torch.Tensor], source: Path | None = None) -> None:
    """Copy the config and the tensors of the weights in `expected` out of a folder that a tool wrote."""
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    config = json.loads((written / "config.json").read_text())
    config.pop("_name_or_path", None)
    config["quantization_config"].pop("meta", None)  # of gptqmodel: has a path of the machine
    (kept / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    modules = tuple(name.removesuffix(".weight") for name in expected)
    save_file(_tensors(written, modules), kept / "model.safetensors", metadata={"format": "pt"})
    save_file({name: value.contiguous() for name, value in expected.items()}, kept / "expected.safetensors")
    if source is not None:
        save_file(_tensors(source, modules), kept / "source.safetensors")
    for file in kept.iterdir():
        file.chmod(0o644)  # safetensors writes for its own user alone
    print(kept.name, {file.name: file.stat().st_size for file in sorted(kept.iterdir())})


def _tensors(folder: Path, modules: tuple[str, ...]) -> dict[str, torch.Tensor]:
    prefixes = tuple(f"{module}." for module in modules)
    return {name: value for name, value in load_file(folder / "model.safetensors").items() if name.startswith(prefixes)}


def bitsandbytes(data: Path, work: Path) -> None:
    import bitsandbytes.functional as bnb
    from transformers import BitsAndBytesConfig

    # Inputs in multiples of 64: bitsandbytes 0.50.2 dequantises others wrongly on a CPU with AVX-512, by a quarter.
    fits = {"intermediate_size": 128}
    large = {"intermediate_size": 320}  # 320 blocks of 64: more than one block of 256 absmax
    for name, settings, sizes, kept in (
        ("bnb-nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, fits, KEPT),
        ("bnb-fp4", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, {}, KEPT[:1]),
        ("bnb-nf4-stored-as-bf16", {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16}, {}, KEPT[:1]),
        ("bnb-nf4-double", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
         large, KEPT[1:]),
        ("bnb-int8", {"load_in_8bit": True}, {}, KEPT),
    ):  # fmt: skip
        source = tiny(work / f"{name}-source", **sizes)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**settings)
        )
        model.save_pretrained(work / name)
        expected = {}
        for module_name in kept:
            weight = model.get_submodule(module_name).weight
            if "load_in_8bit" in settings:
                value = bnb.int8_vectorwise_dequant(weight.CB if weight.CB is not None else weight.data, weight.SCB)
            else:
                value = bnb.dequantize_4bit(weight.data, weight.quant_state)
            expected[f"{module_name}.weight"] = value
        keep(work / name, data / name, expected, None if sizes is large else source)


def _calibration() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 64, (16, 48), generator=generator).tolist()
    return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]


def _gptqmodel(
    data: Path, work: Path, name: str, config: Any, kept: tuple[str, ...], dtype: torch.dtype, **sizes: int
) -> None:
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    source = tiny(work / f"{name}-source", dtype, **sizes)
    _tokenizer(source)
    model = GPTQModel.load(str(source), config, dtype=dtype)
    model.quantize(_calibration(), batch_size=4)
    model.save(str(work / name))
    loaded = GPTQModel.load(str(work / name), device="cpu", backend=BACKEND.TORCH, dtype=dtype)
    expected = {}
    for module_name in kept:
        module = loaded.model.get_submodule(module_name)
        print(name, type(module).__name__)
        if hasattr(module, "dequantize_weight"):
            value = module.dequantize_weight()
        else:
            parts = (module.qweight, module.qzeros, module.scales)
            value = dequantize_gemm(*parts, bits=module.bits, group_size=module.group_size)
        expected[f"{module_name}.weight"] = value.detach().T.contiguous()
    keep(work / name, data / name, expected)


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(64)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(folder)


def gptqmodel(data: Path, work: Path) -> None:
    from gptqmodel import QuantizeConfig

    half, brain = torch.float16, torch.bfloat16
    for name, settings, kept, dtype in (
        ("gptq-4bit", {"bits": 4}, KEPT, half),
        ("gptq-4bit-ordered", {"bits": 4, "desc_act": True, "sym": False}, KEPT, brain),
        ("gptq-4bit-v2", {"bits": 4, "sym": False, "format": "gptq_v2"}, KEPT[:1], brain),
        ("gptq-2bit", {"bits": 2, "sym": False}, KEPT[:1], half),
        ("gptq-3bit", {"bits": 3}, KEPT[1:], half),
        ("gptq-8bit", {"bits": 8}, KEPT[:1], brain),
    ):
        _gptqmodel(data, work, name, QuantizeConfig(**{"group_size": 32, "device": "cpu", **settings}), kept, dtype)


def awq(data: Path, work: Path) -> None:
    from gptqmodel import QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=32, quant_method="awq", format="gemm", device="cpu")
    sizes = {"intermediate_size": 128}  # it wants multiples of 64
    _gptqmodel(data, work, "awq-gemm", config, KEPT, torch.float16, **sizes)


def compressed(data: Path, work: Path) -> None:
    from compressed_tensors.compressors import decompress_module
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    for name, scheme in (
        ("ct-w4a16", {"scheme": "W4A16"}),
        ("ct-w4a16-asym", {"scheme": "W4A16_ASYM"}),
        ("ct-w8a8", {"scheme": "W8A8"}),
        ("ct-fp8-dynamic", {"scheme": "FP8_DYNAMIC"}),
    ):
        source = tiny(work / f"{name}-source", hidden_size=128, intermediate_size=128, num_attention_heads=4)
        model = AutoModelForCausalLM.from_pretrained(source)
        model = oneshot(model=model, recipe=QuantizationModifier(targets="Linear", ignore=["lm_head"], **scheme))
        model.save_pretrained(work / name, save_compressed=True)
        model = AutoModelForCausalLM.from_pretrained(work / name)
        module = model.get_submodule(KEPT[0])
        if not hasattr(module, "weight") or not module.weight.is_floating_point() or module.weight.itemsize == 1:
            decompress_module(module)
        keep(work / name, data / name, {f"{KEPT[0]}.weight": module.weight.detach()}, source)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        globals()[sys.argv[1]](Path(sys.argv[2]), Path(temporary))
