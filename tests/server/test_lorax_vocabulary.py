"""What is known of a base's tokens by their ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.server.dialects.lorax.vocabulary import Vocabulary, read_vocabulary


def byte_level(folder: Path) -> Vocabulary:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: id for id, letter in enumerate(letters)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens(["plain"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return read_vocabulary(folder)


def test_a_vocabulary_knows_special_tokens_and_reads_others(tmp_path: Path) -> None:
    vocabulary = byte_level(tmp_path)
    assert list(vocabulary.special.values()) == ["</s>"]
    assert [vocabulary.text(vocabulary.tokenizer.token_to_id(one)) for one in ("a", "Ġ", "plain", "</s>")] == [
        "a", " ", "plain", "</s>"
    ]  # fmt: skip


def test_sentencepiece_keeps_its_spaces(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE(vocab={"▁sky": 0, "sky": 1}, merges=[], unk_token="sky"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert [read_vocabulary(tmp_path).text(id) for id in (0, 1)] == [" sky", "sky"]


@pytest.mark.parametrize("text", [None, "", "{}", "no"])
def test_a_base_without_a_tokenizer_that_can_be_read_has_no_vocabulary(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    vocabulary = read_vocabulary(tmp_path)
    assert not vocabulary.reads
    assert not vocabulary.special
