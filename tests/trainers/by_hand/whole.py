"""Whole models as torchtune and litgpt write them, with the logits of their own implementations beside them.

python -m tests.trainers.by_hand.whole torchtune     with torchtune 0.6.1, torchao 0.15.0 (see keep.py)
python -m tests.trainers.by_hand.whole litgpt        with litgpt 0.5.13

Writes NAME_whole.tar.gz: a folder a model, and beside each FOLDER.safetensors: `tokens`, and `logits` in float32.
"""

from __future__ import annotations

import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

from tests.trainers.by_hand import HERE
from tests.trainers.by_hand.keep import without_owner
from tests.trainers.by_hand.small import SIZES

WORK = Path("/tmp/lorakit-whole")
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
KINDS = {"llama": "LLAMA2", "qwen2": "QWEN2"}  # as torchtune names them
SAME = {**SIZES, "hidden_size": 64, **HEADS, "tie_word_embeddings": False}  # heads of 32, as vLLM wants them


def make_base(kind: str, folder: Path) -> Path:
    """A Llama or Qwen2 in bfloat16 in which two heads of queries share one of keys, each number at random."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SAME))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def say(folder: Path, model: Any) -> None:
    """What the trainer's own model makes of a few tokens."""
    import torch
    from safetensors.torch import save_file

    tokens = torch.arange(3, 11).view(1, -1)
    with torch.no_grad():
        logits = model.float()(tokens)
    save_file({"tokens": tokens, "logits": logits.contiguous()}, folder.with_suffix(".safetensors"))


def torchtune(work: Path) -> None:
    from torchtune.models.llama2 import llama2
    from torchtune.models.qwen2 import qwen2
    from torchtune.training import (
        FullModelHFCheckpointer,
        FullModelMetaCheckpointer,
        FullModelTorchTuneCheckpointer,
    )

    sizes = {
        "vocab_size": SIZES["vocab_size"], "num_layers": SIZES["num_hidden_layers"], "num_heads": 2, "num_kv_heads": 1,
        "embed_dim": SAME["hidden_size"], "intermediate_dim": SIZES["intermediate_size"], "max_seq_len": 64,
    }  # fmt: skip
    for name, kind, writer in (
        ("own", "llama", FullModelTorchTuneCheckpointer),
        ("meta", "llama", FullModelMetaCheckpointer),
        ("qwen2", "qwen2", FullModelTorchTuneCheckpointer),
    ):
        base = make_base(kind, WORK / f"base-{name}")
        said = {"checkpoint_dir": str(base), "checkpoint_files": ["model.safetensors"], "recipe_checkpoint": None}
        reader = FullModelHFCheckpointer(**said, output_dir=str(WORK / "unused"), model_type=KINDS[kind])
        loaded = reader.load_checkpoint()
        model = llama2(**sizes, norm_eps=1e-6) if kind == "llama" else qwen2(**sizes, norm_eps=1e-6, rope_base=10000.0)
        model.load_state_dict(loaded["model"])
        checkpointer = writer(**said, output_dir=str(WORK / name), model_type=KINDS[kind])
        checkpointer.save_checkpoint(loaded, epoch=0)
        (WORK / name / "epoch_0").rename(work / name)
        shutil.copy(base / "config.json", work / name / "config.json")
        say(work / name, model)


def litgpt(work: Path) -> None:
    import torch
    from litgpt import GPT, Config
    from litgpt.config import name_to_config
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    for kind in ("llama", "qwen2"):
        base = make_base(kind, work / kind)
        name = f"tiny-{kind}" if kind == "llama" else "Qwen2.5-tiny"
        name_to_config[name] = {
            "name": name, "hf_config": {"org": "tests", "name": name}, "block_size": 64,
            "vocab_size": SIZES["vocab_size"], "padded_vocab_size": SIZES["vocab_size"],
            "n_layer": SIZES["num_hidden_layers"], "n_head": 2, "n_query_groups": 1, "n_embd": SAME["hidden_size"],
            "rotary_percentage": 1.0, "parallel_residual": False, "bias": False, "attn_bias": kind == "qwen2",
            "norm_class_name": "RMSNorm", "norm_eps": 1e-6, "mlp_class_name": "LLaMAMLP",
            "intermediate_size": SIZES["intermediate_size"],
        }  # fmt: skip
        convert_hf_checkpoint(base, model_name=name)
        model = GPT(Config.from_file(base / "model_config.yaml"))
        model.load_state_dict(torch.load(base / "lit_model.pth", weights_only=True))
        say(base, model)
        (base / "model.safetensors").unlink()  # what is left is what a training writes


if __name__ == "__main__":
    shutil.rmtree(WORK, ignore_errors=True)
    work = WORK / "work"
    work.mkdir(parents=True)
    {"torchtune": torchtune, "litgpt": litgpt}[sys.argv[1]](work)
    with tarfile.open(HERE / f"{sys.argv[1]}_whole.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        for folder in sorted(work.iterdir()):
            archive.add(folder, folder.name, filter=without_owner)
    shutil.rmtree(WORK)
