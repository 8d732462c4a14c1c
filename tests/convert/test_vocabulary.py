"""As many rows as the config says, and one for each token: what is cut, what follows, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lorakit.convert.vocabulary import settled, tokens_of, with_vocabulary
from lorakit.errors import Refused, WrongBase

TABLE = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@pytest.mark.parametrize(
    ("found", "said", "tokens", "rows", "note"),
    [
        (100, 100, 90, 100, None),
        (100, 100, None, 100, None),
        (100, 100, 101, 100, "can't be used"),
        (128, 100, 100, 100, "cut from 128 to 100"),
        (128, 100, 110, 128, "vocab_size in config.json becomes 128"),
        (128, 100, None, 128, "vocab_size in config.json becomes 128"),
        (90, 100, 90, 90, "vocab_size in config.json becomes 90"),
    ],
)
def test_rows_config_and_tokenizer_agree_in_the_end(
    found: int, said: int, tokens: int | None, rows: int, note: str | None
) -> None:
    settled_as = settled({TABLE: found, HEAD: found}, said, tokens)
    assert settled_as.rows == rows
    assert (note is None) == (settled_as.note is None)
    assert (note or "") in (settled_as.note or "")


def test_tokens_without_a_row_are_refused() -> None:
    with pytest.raises(Refused, match=r"100 tokens.*rows for 90.*--only model"):
        settled({TABLE: 90}, 100, 100)


def test_tables_that_were_resized_differently_are_refused_unless_the_rest_is_padding() -> None:
    with pytest.raises(WrongBase, match=r"'lm_head.weight' has 120"):
        settled({TABLE: 110, HEAD: 120}, 100, 105)
    assert settled({TABLE: 110, HEAD: 120}, 100, 100).rows == 100


def test_every_part_of_a_config_follows() -> None:
    config = {"vocab_size": 100, "text_config": {"vocab_size": 100, "pad": 100}, "audio": {"vocab_size": 7}}
    assert with_vocabulary(config, 100, 128) == {
        "vocab_size": 128, "text_config": {"vocab_size": 128, "pad": 100}, "audio": {"vocab_size": 7},
    }  # fmt: skip


def test_the_tokens_of_a_tokenizer_are_counted_as_transformers_does(tmp_path: Path) -> None:
    vocabulary = {letter: number for number, letter in enumerate("abcdefg")}
    kinds = [models.BPE(vocab=vocabulary, merges=[]), models.Unigram([(letter, -1.0) for letter in vocabulary], 0)]
    for number, kind in enumerate(kinds):
        tokenizer = Tokenizer(kind)
        tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        fast.save_pretrained(tmp_path / str(number))
        assert tokens_of(tmp_path / str(number) / "tokenizer.json") == len(fast) == 9
