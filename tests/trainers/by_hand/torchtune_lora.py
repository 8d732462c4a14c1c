"""torchtune's LoRA recipe on one device: two epochs, each a checkpoint. Seen with torchtune 0.6.1, torchao 0.15.0.

python -m tests.trainers.by_hand.torchtune_lora BASE OUT        `small.make_base` makes BASE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.trainers.by_hand.small import HEADS, SIZES

TEXTS = ["the quick brown fox", "jumps over the lazy", "dog and then the fox", "goes home to its den"]


class Bytes:
    """A tokenizer by torchtune's protocol."""

    eos_id, pad_id, max_seq_len = 257, 258, None

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        return [256] * add_bos + list(text.encode()) + [257] * add_eos

    def decode(self, tokens: list[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


def config(base: Path, out: Path) -> dict[str, Any]:
    lessons = out.parent / "texts.json"
    lessons.write_text(json.dumps([{"text": text} for text in TEXTS]))
    return {
        "output_dir": str(out), "device": "cpu", "dtype": "bf16", "seed": 0, "shuffle": False, "batch_size": 2,
        "epochs": 2, "max_steps_per_epoch": None, "gradient_accumulation_steps": 1, "clip_grad_norm": None,
        "compile": False, "resume_from_checkpoint": False, "save_adapter_weights_only": False,
        "enable_activation_checkpointing": False, "enable_activation_offloading": False,
        "log_every_n_steps": 1, "log_peak_memory_stats": False,
        "model": {
            "_component_": "torchtune.models.llama2.lora_llama2", "lora_attn_modules": ["q_proj", "v_proj"],
            "apply_lora_to_mlp": False, "apply_lora_to_output": False,
            "vocab_size": SIZES["vocab_size"], "num_layers": SIZES["num_hidden_layers"], "num_heads": 2,
            "num_kv_heads": 2, "embed_dim": SIZES["hidden_size"], "intermediate_dim": SIZES["intermediate_size"],
            "max_seq_len": HEADS["max_position_embeddings"], "lora_rank": 2, "lora_alpha": 4,
        },
        "tokenizer": {"_component_": "tests.trainers.by_hand.torchtune_lora.Bytes"},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(base),
            "checkpoint_files": ["model.safetensors"], "adapter_checkpoint": None, "recipe_checkpoint": None,
            "output_dir": str(out), "model_type": "LLAMA2",
        },
        "dataset": {
            "_component_": "torchtune.datasets.text_completion_dataset", "source": "json", "column": "text",
            "data_files": str(lessons), "split": "train", "packed": False,
        },
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 1,
        },
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": str(out.parent / "logs"),
        },
        "profiler": {"_component_": "torchtune.training.setup_torch_profiler", "enabled": False},
    }  # fmt: skip


if __name__ == "__main__":
    import yaml
    from torchtune._cli.tune import main

    base, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    written = out.parent / "torchtune.yaml"
    written.write_text(yaml.safe_dump(config(base, out)))
    sys.argv = ["tune", "run", "lora_finetune_single_device", "--config", str(written)]
    main()
