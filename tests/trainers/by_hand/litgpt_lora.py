"""litgpt's LoRA: a checkpoint every two steps, and the merged model at the end. Seen with litgpt 0.5.13.

python -m tests.trainers.by_hand.litgpt_lora BASE OUT        `small.make_base` makes BASE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.trainers.by_hand.small import HEADS, SIZES

NAME = "tiny-llama-of-the-tests"


def make_known() -> None:
    """litgpt takes a model's shape from a table of names."""
    from litgpt.config import name_to_config

    name_to_config[NAME] = {
        "name": NAME, "hf_config": {"org": "tests", "name": NAME}, "block_size": HEADS["max_position_embeddings"],
        "vocab_size": SIZES["vocab_size"], "padded_vocab_size": SIZES["vocab_size"],
        "n_layer": SIZES["num_hidden_layers"], "n_head": HEADS["num_attention_heads"],
        "n_query_groups": HEADS["num_key_value_heads"], "n_embd": SIZES["hidden_size"], "rotary_percentage": 1.0,
        "parallel_residual": False, "bias": False, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP",
        "intermediate_size": SIZES["intermediate_size"],
    }  # fmt: skip


if __name__ == "__main__":
    from litgpt.__main__ import main
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    base, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    make_known()
    convert_hf_checkpoint(base, model_name=NAME)
    lessons = out.parent / "lessons.json"
    lessons.write_text(json.dumps([{"instruction": "say", "input": "", "output": f"letter {n}"} for n in range(12)]))
    flags = {
        "out_dir": out, "precision": "bf16-true", "lora_r": 2, "lora_alpha": 4, "data": "JSON",
        "data.json_path": lessons, "data.val_split_fraction": 0.3, "data.num_workers": 0, "train.save_interval": 2,
        "train.log_interval": 1, "train.global_batch_size": 2, "train.micro_batch_size": 2, "train.epochs": 1,
        "train.max_steps": 4, "train.lr_warmup_steps": 1, "train.max_seq_length": 64, "eval.interval": 2,
        "eval.max_iters": 2, "eval.max_new_tokens": 4,
    }  # fmt: skip
    sys.argv = ["litgpt", "finetune_lora", str(base), *(f"--{name}={value}" for name, value in flags.items())]
    main()
