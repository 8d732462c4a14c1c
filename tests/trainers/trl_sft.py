"""TRL's SFTTrainer: a LoRA; the best and the newest checkpoint stay.

python -m tests.trainers.trl_sft BASE OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from tests.trainers.hf_trainer import Said
from tests.trainers.tiny import lora_config

TEXT = "the quick brown fox jumps over the lazy dog"


def write(base: str, out: Path) -> None:
    trainer = SFTTrainer(
        base,
        args=SFTConfig(
            output_dir=str(out / "sft"), max_steps=9, per_device_train_batch_size=2, learning_rate=5e-3,
            logging_steps=2, eval_strategy="steps", eval_steps=3, save_steps=3, save_total_limit=2,
            load_best_model_at_end=True, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": [TEXT[start:] for start in range(18)]}),
        eval_dataset=Dataset.from_dict({"text": [TEXT, TEXT[5:]]}),
        peft_config=lora_config(LoraConfig),
        callbacks=[Said("sft")],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
