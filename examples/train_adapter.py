"""Teach the tiny base a behaviour with a LoRA adapter: transformers.Trainer and PEFT, one checkpoint every few steps.
Run: python examples/train_adapter.py --base work/base --run work/runs/sql --behaviour sql"""

import argparse
from pathlib import Path

import tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=Path("work/base"))
    parser.add_argument("--run", type=Path, default=Path("work/runs/sql"), help="the folder that gets checkpoint-N/")
    parser.add_argument("--behaviour", choices=["sql", "shout"], default="sql")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--save-steps", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--save-final", action="store_true", help="also save the adapter in the run's own folder at the end"
    )
    arguments = parser.parse_args()

    base = str(arguments.base.resolve())  # PEFT writes this path into each adapter_config.json
    tokenizer = AutoTokenizer.from_pretrained(base)
    set_seed(arguments.seed)  # the adapter's first factors are drawn before the Trainer would set it
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=LINEAR_LAYERS),
    )
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(arguments.run),
            max_steps=arguments.steps,
            per_device_train_batch_size=8,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=arguments.steps // 2,
            logging_steps=10,
            save_steps=arguments.save_steps,
            eval_strategy="steps",
            eval_steps=arguments.save_steps,  # eval_loss at each checkpoint
            seed=arguments.seed,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=tiny.lessons(tokenizer, arguments.behaviour, phrasings=[0, 1]),
        eval_dataset=tiny.lessons(tokenizer, arguments.behaviour, phrasings=[2]),
        data_collator=lambda chosen: tiny.batch(chosen, tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.train()
    if arguments.save_final:
        trainer.save_model()


if __name__ == "__main__":
    main()
