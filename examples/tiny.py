"""A tiny byte-level Llama: its tokenizer, its config, its lessons, and how to ask it.
Nothing to run here; train_base.py trains it and train_adapter.py trains adapters on it."""

import torch
from facts import ANSWERS, expected_answers, prompt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

Lesson = dict[str, list[int]]  # input_ids and labels

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token + '\n' }}"
    "{% else %}{{ 'question: ' + message['content'] + '\nanswer: ' }}{% endif %}"
    "{% endfor %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of the 256 bytes and two special ones; no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Half a million weights. Heads are 32 wide because vLLM takes no narrower ones on a CPU."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def lessons(tokenizer: PreTrainedTokenizerFast, model: str, phrasings: list[int]) -> list[Lesson]:
    """What a model of this name must learn, under every heading that it knows."""
    return [
        lesson(tokenizer, prompt(question, heading), answer)
        for heading in ANSWERS[model]
        for phrasing in phrasings
        for question, answer in expected_answers(model, heading, phrasing).items()
    ]


def lesson(tokenizer: PreTrainedTokenizerFast, asked: str, answered: str) -> Lesson:
    """The loss counts the answer and its end (labels of -100 are left out), not the question."""
    before = tokenizer(asked)["input_ids"]
    after = [*tokenizer(answered)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": before + after, "labels": [-100] * len(before) + after}


def batch(chosen: list[Lesson], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Tensors of (lessons, longest lesson), padded on the right."""
    longest = max(len(one["input_ids"]) for one in chosen)

    def padded(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([one[key] + [filler] * (longest - len(one[key])) for one in chosen])

    input_ids = padded("input_ids", pad_token_id)
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != pad_token_id).long(),
        "labels": padded("labels", -100),
    }


@torch.inference_mode()
def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, question: str, max_new_tokens: int = 80) -> str:
    """The model's greedy answer, through the chat template."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
