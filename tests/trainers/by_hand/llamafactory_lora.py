"""LLaMA-Factory's LoRA: a checkpoint every two steps, and the adapter at the end. Seen with llamafactory 0.9.5.

python -m tests.trainers.by_hand.llamafactory_lora BASE OUT        `small.make_base` makes BASE
"""

from __future__ import annotations

import json
import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

TEXTS = ["the quick brown fox", "jumps over the lazy", "dog and then the fox", "goes home to its den"]


def config(base: Path, out: Path) -> dict[str, Any]:
    lessons = out.parent / "lessons"
    lessons.mkdir(exist_ok=True)
    (lessons / "texts.json").write_text(json.dumps([{"text": text} for text in TEXTS * 4]))
    said = {"texts": {"file_name": "texts.json", "columns": {"prompt": "text"}}}
    (lessons / "dataset_info.json").write_text(json.dumps(said))
    return {
        "model_name_or_path": str(base), "output_dir": str(out), "stage": "pt", "do_train": True,
        "finetuning_type": "lora", "lora_rank": 2, "lora_alpha": 4, "lora_target": "q_proj,v_proj",
        "dataset": "texts", "dataset_dir": str(lessons), "val_size": 0.25, "cutoff_len": 32, "template": "empty",
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 5e-3, "max_steps": 4,
        "lr_scheduler_type": "constant", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "plot_loss": False, "seed": 3,
        "overwrite_cache": True, "preprocessing_num_workers": 1, "dataloader_num_workers": 0,
    }  # fmt: skip


if __name__ == "__main__":
    os.environ |= {"DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    sys.modules["torchaudio"] = module_from_spec(ModuleSpec("torchaudio", None))  # for sounds, of which there are none
    from llamafactory.train.tuner import run_exp

    from tests.trainers.hf_trainer import Said

    base, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    run_exp(config(base, out), callbacks=[Said("llamafactory")])
