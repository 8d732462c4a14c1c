"""Adapters whose prompts vLLM would read otherwise than they were trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.convert.own_tokens import foreign_tokens, same_tokens

VOCABULARY = {"a": 0, "b": 1, "c": 2}


def tokenizer(folder: Path, vocabulary: Any = VOCABULARY, added: Any = (), *, pad: Any = None, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [{"id": id, "content": content, "special": True} for content, id in added]
    said = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": tokens, **more}
    (folder / "tokenizer.json").write_text(json.dumps(said))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad} if pad else {}))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tokenizer(tmp_path / "base", added=[("<s>", 3)])


@pytest.mark.parametrize(
    "said",
    [{"added": [("<s>", 3)]}, {"added": [("<s>", 3)], "padding": {"length": 8}},
     {"added": [("<s>", 3), ("[PAD]", 4)], "pad": "[PAD]"},
     {"added": [("<s>", 3), ("[PAD]", 4)], "pad": {"content": "[PAD]"}},
     {"vocabulary": {**VOCABULARY, "<s>": 3}}, {"vocabulary": [["a", 0.0], ["b", 0.0], ["c", 0.0], ["<s>", 0.0]]}],
    ids=["the same", "written otherwise", "padding", "padding as an object", "one vocabulary", "a list of pieces"],
)  # fmt: skip
def test_a_tokenizer_that_reads_as_the_bases_is_served(tmp_path: Path, base: Path, said: dict[str, Any]) -> None:
    assert foreign_tokens(tokenizer(tmp_path / "own", **said), base) is None


def test_added_tokens_are_named_with_the_cure(tmp_path: Path, base: Path) -> None:
    added = [("<s>", 3), *((f"<|t{number}|>", number + 4) for number in range(7)), ("[PAD]", 11)]
    said = same_tokens(tokenizer(tmp_path / "own", added=added, pad="[PAD]"), base).problem
    assert said is not None
    assert said.startswith("its tokenizer adds 7 tokens ('<|t0|>', '<|t1|>', '<|t2|>', '<|t3|>', '<|t4|>', …)")
    assert "lorakit merge" in said


def test_a_tokenizer_of_another_family_is_another(tmp_path: Path, base: Path) -> None:
    said = foreign_tokens(tokenizer(tmp_path / "own", {"a": 0, "b": 2, "c": 1}), base)
    assert said is not None
    assert "another than the base's ('b' is 2 in one)" in said


def test_without_a_tokenizer_on_both_sides_there_is_nothing_to_compare(tmp_path: Path, base: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert foreign_tokens(empty, base) is None
    assert foreign_tokens(base, empty) is None


def test_tokens_that_an_older_form_adds_are_seen_too(tmp_path: Path, base: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "added_tokens.json").write_text('{"<s>": 3}')
    assert foreign_tokens(own, base) is None
    (own / "added_tokens.json").write_text('{"<s>": 3, "<new>": 4}')
    assert "'<new>'" in str(foreign_tokens(own, base))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": 3}', '{"model": {"vocab": {}}, "added_tokens": [3]}'])
def test_what_can_not_be_read_is_refused(tmp_path: Path, base: Path, text: str) -> None:
    own = tokenizer(tmp_path / "own")
    (own / "tokenizer.json").write_text(text)
    assert "can't be read" in str(foreign_tokens(own, base))


def test_what_transformers_writes_after_training_is_the_bases_and_with_a_new_token_is_not(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=VOCABULARY, merges=[])))
    fast.save_pretrained(tmp_path / "base")
    fast.add_special_tokens({"pad_token": "[PAD]"})
    fast.save_pretrained(tmp_path / "padded")
    assert foreign_tokens(tmp_path / "padded", tmp_path / "base") is None
    fast.add_tokens(["<think>"])
    fast.save_pretrained(tmp_path / "own")
    assert "'<think>'" in str(foreign_tokens(tmp_path / "own", tmp_path / "base"))
