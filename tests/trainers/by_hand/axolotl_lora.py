"""axolotl's LoRA, with lorakit's plugin: a checkpoint every two steps, and the adapter at the end. Seen with 0.19.0.

python -m tests.trainers.by_hand.axolotl_lora BASE OUT [SETTINGS]        `small.make_base` makes BASE

SETTINGS, in JSON, replace those below. With `{"max_steps": 3000, "num_epochs": 1000, "lorakit": {…}}` it trains long
enough to be asked (lorakit save OUT), interrupted (Ctrl+C), and resumed (`"auto_resume_from_checkpoints": true`).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

TEXTS = ["the quick brown fox", "jumps over the lazy", "dog and then the fox", "goes home to its den"]


def config(base: Path, out: Path, **settings: Any) -> dict[str, Any]:
    lessons = out.parent / "texts.jsonl"
    lessons.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 4))
    return {
        "base_model": str(base), "output_dir": str(out), "dataset_prepared_path": str(out.parent / "prepared"),
        "datasets": [{"path": str(lessons), "ds_type": "json", "type": "completion"}], "val_set_size": 0.25,
        "adapter": "lora", "lora_r": 2, "lora_alpha": 4, "lora_target_modules": ["q_proj", "v_proj"],
        "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False,
        "sequence_len": 32, "micro_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 5e-3,
        "optimizer": "adamw_torch", "lr_scheduler": "constant", "max_steps": 4, "num_epochs": 1,
        "save_steps": 2, "eval_steps": 2, "logging_steps": 1, "bf16": False, "fp16": False, "tf32": False,
        "flash_attention": False, "gradient_checkpointing": False, "seed": 3, "special_tokens": {"pad_token": "<pad>"},
        "plugins": ["lorakit.training.axolotl.LorakitPlugin", "tests.trainers.by_hand.axolotl_said.SaidPlugin"],
        **settings,
    }  # fmt: skip


if __name__ == "__main__":
    import yaml

    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    base, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    written = out.parent / "axolotl.yaml"
    settings = json.loads(sys.argv[3]) if sys.argv[3:] else {}
    written.write_text(yaml.safe_dump(config(base, out, **settings)))
    from axolotl.cli.main import main

    sys.argv = ["axolotl", "train", str(written), "--launcher", "python"]
    main()
