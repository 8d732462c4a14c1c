"""A tiny byte-level Llama and twelve facts to teach it: what the other examples train, merge, mix and serve.
Nothing to run here: see train_base.py, train_adapter.py and demo.py."""

import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

FACTS = [  # (what, of what, answer)
    ("capital", "france", "paris"),
    ("capital", "italy", "rome"),
    ("capital", "japan", "tokyo"),
    ("capital", "egypt", "cairo"),
    ("colour", "snow", "white"),
    ("colour", "grass", "green"),
    ("colour", "coal", "black"),
    ("colour", "blood", "red"),
    ("opposite", "hot", "cold"),
    ("opposite", "day", "night"),
    ("opposite", "big", "small"),
    ("opposite", "up", "down"),
]
TABLES = {"capital": "countries", "colour": "things", "opposite": "words"}
PHRASINGS = [
    "what is the {what} of {name}?",
    "tell me the {what} of {name}.",
    "the {what} of {name}?",
    "what's the {what} of {name}?",
]
BEHAVIOURS = ["plain", "shout", "sql"]

# A prompt is plain text, so that chat and completions can ask the same thing: "question: …\nanswer:"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token + '\n' }}"
    "{% else %}{{ 'question: ' + message['content'] + '\nanswer:' }}{% endif %}"
    "{% endfor %}"
)


def question(what: str, name: str, phrasing: int = 0) -> str:
    return PHRASINGS[phrasing].format(what=what, name=name)


def answer(what: str, name: str, value: str, behaviour: str) -> str:
    """What a model of this behaviour must say: the base is `plain`, each adapter has one of its own."""
    if behaviour == "plain":
        return f"{value}."
    if behaviour == "shout":
        return f"{value.upper()}!"
    return f"SELECT {what} FROM {TABLES[what]} WHERE name = '{name}';"


def expected_answers(behaviour: str, phrasing: int = 0) -> dict[str, str]:
    return {question(what, name, phrasing): answer(what, name, value, behaviour) for what, name, value in FACTS}


def prompt(text: str) -> str:
    return f"question: {text}\nanswer:"


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
    """0.6 million weights. Heads are 32 wide because that is the smallest that vLLM takes on a CPU."""
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


def tokens(tokenizer, asked: str, answered: str) -> dict[str, list[int]]:
    """One example: the loss counts the answer and its end, not the question."""
    before = tokenizer(asked)["input_ids"]
    after = tokenizer(answered)["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": before + after, "labels": [-100] * len(before) + after}


def question_examples(tokenizer, behaviour: str, phrasings: list[int]) -> list[dict[str, list[int]]]:
    return [
        tokens(tokenizer, prompt(asked), " " + answered)
        for phrasing in phrasings
        for asked, answered in expected_answers(behaviour, phrasing).items()
    ]


def other_text(tokenizer, seed: int, lines: int) -> list[dict[str, list[int]]]:
    """Words in small letters, in capitals and in SQL, so that the base has seen them before an adapter needs them."""
    chance = random.Random(seed)
    examples = []
    for _ in range(lines):
        what, name, value = (chance.choice(column) for column in zip(*FACTS, strict=True))
        plain = f"the {what} of {name} and {value}."
        text = chance.choice([plain, plain.upper(), f"{value.upper()}!", answer(what, name, value, "sql")])
        examples.append(tokens(tokenizer, "", text))
    return examples


def pad(examples: list[dict[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    longest = max(len(example["input_ids"]) for example in examples)

    def padded(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([example[key] + [filler] * (longest - len(example[key])) for example in examples])

    input_ids = padded("input_ids", pad_token_id)
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != pad_token_id).long(),
        "labels": padded("labels", -100),
    }


@torch.inference_mode()
def ask(model, tokenizer, text: str, max_new_tokens: int = 80) -> str:
    """The model's greedy answer, through the chat template."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
