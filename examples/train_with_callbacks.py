"""Train with lorakit's callbacks: asked, it saves; interrupted, it saves, and goes on when it is started again.
Run: python examples/train_with_callbacks.py --base work/base --run work/runs/sql
Meanwhile: lorakit save work/runs/sql --name before-lr-drop --wait 300, or Ctrl+C, and the same command again."""

import argparse
from pathlib import Path

import tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from lorakit.checkpoints.retention import KeepBest, KeepLast
from lorakit.training import Interruptible, KeepCheckpoints, LoadStates, SaveOnRequest, SaveState, resume


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=Path("work/base"))
    parser.add_argument("--run", type=Path, default=Path("work/runs/sql"), help="the folder that gets checkpoint-N/")
    parser.add_argument("--start-from", type=Path, help="a checkpoint or a run, whose weights to begin with")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    set_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(arguments.base),
        LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    )
    callbacks = [
        SaveOnRequest(),  # lorakit save, axolotl_checkpoint.save, SIGUSR1
        SaveState("model", every=5),  # every fifth checkpoint also as model_checkpoint-N, which nothing removes
        KeepCheckpoints([KeepLast(3), KeepBest(2)]),
        Interruptible(),  # the first Ctrl+C: a full checkpoint, then exit 130
    ]
    checkpoint = resume(arguments.run)  # None the first time
    if checkpoint and int(checkpoint.rpartition("-")[2]) >= arguments.steps:
        print(f"{arguments.run} is trained already: {checkpoint}")
        return
    if arguments.start_from and checkpoint is None:
        callbacks.insert(0, LoadStates("model", checkpoint=arguments.start_from))  # fresh optimizer, step 0
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(arguments.run), max_steps=arguments.steps, save_steps=10, eval_strategy="steps",
            eval_steps=10, logging_steps=10, learning_rate=2e-3, use_cpu=True, report_to="none", disable_tqdm=True,
        ),
        train_dataset=tiny.lessons(tokenizer, "sql", phrasings=[0, 1]),
        eval_dataset=tiny.lessons(tokenizer, "sql", phrasings=[2]),
        data_collator=lambda chosen: tiny.batch(chosen, tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=callbacks,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint)


if __name__ == "__main__":
    main()
