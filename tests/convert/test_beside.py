"""What stands beside the weights: whose config, whose tokenizer, and every id that ends an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorakit.convert.beside import chosen, find_beside
from lorakit.convert.vocabulary import tokens_of
from lorakit.errors import Refused
from tests.server.real import make_tiny_model


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def write(folder: Path, name: str, **said: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(said))
    return folder


def sources(own: Path | None, like: Path | None) -> dict[str, Path]:
    return {one.name: one.source.parent for one in find_beside(own, like).companions}


def test_what_the_training_has_comes_before_what_its_model_has(like: Path, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(like).save_pretrained(tmp_path / "run")
    found = sources(tmp_path / "run", like)
    assert set(found.values()) == {tmp_path / "run"}
    assert sources(None, like).keys() == found.keys()


def test_the_config_is_the_trainings_own(like: Path, tmp_path: Path) -> None:
    own = write(tmp_path / "run", "config.json", model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=7)
    assert find_beside(own, like).config["hidden_size"] == 7
    assert find_beside(tmp_path, like).config["hidden_size"] == 64
    with pytest.raises(Refused, match="--like"):
        find_beside(tmp_path, None)


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": 3}, {"eos_token_id": 5}, [3, 5, 257]),
        ({"eos_token_id": [3, 4]}, {"text_config": {"eos_token_id": [4, 6]}}, [3, 4, 6, 257]),
        ({"temperature": 0.5}, {"eos_token_id": None}, 257),
        ({"eos_token_id": 257}, {"eos_token_id": 257}, 257),
        (None, {"eos_token_id": 5}, [5, 257]),
        (None, {"eos_token_id": 257}, None),
    ],
)
def test_each_id_that_ends_an_answer_is_kept_once(
    like: Path, tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any], ends: Any
) -> None:
    """257 is what the tokenizer says."""
    own = write(tmp_path / "run", "config.json", model_type="llama", architectures=["LlamaForCausalLM"], **config)
    AutoTokenizer.from_pretrained(like).save_pretrained(own)
    if generation is not None:
        write(own, "generation_config.json", **generation)
    found = find_beside(own, None).generation
    assert (found or {}).get("eos_token_id") == ends
    assert {**(found or {}), **(generation or {})}.items() >= (generation or {}).items()


def test_the_parts_are_the_tokenizers_and_the_rest(like: Path) -> None:
    every = find_beside(None, like).companions
    tokenizers = {one.name for one in chosen(every, ["tokenizer"])}
    assert tokenizers == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {one.name for one in chosen(every, ["model", "tokenizer"])} == {one.name for one in every}


def test_settings_of_other_programs_are_no_config_of_a_model(like: Path, tmp_path: Path) -> None:
    own = write(tmp_path / "run", "config.json", lr=0.001, model="x")
    assert find_beside(own, like).config["model_type"] == "llama"
    with pytest.raises(Refused, match="says a model_type"):
        find_beside(own, None)


@pytest.mark.parametrize("theirs", [True, False])
def test_code_comes_from_where_the_config_comes_that_names_it(like: Path, tmp_path: Path, theirs: bool) -> None:
    own = write(tmp_path / "own", "config.json", model_type="ours", auto_map={"AutoModel": "modeling_ours.Ours"})
    base = write(tmp_path / "base", "config.json", **json.loads((like / "config.json").read_text()))
    (own / "modeling_ours.py").write_text("own = 1")
    if theirs:
        (base / "modeling_ours.py").write_text("another = 1")
    assert sources(own, base)["modeling_ours.py"] == own


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tokenizer.json", {"added_tokens": 5}),
        ("tokenizer.json", {"added_tokens": [5], "model": []}),
        ("tokenizer_config.json", {"chat_template": [{"name": "x"}, 3, {"name": ["y"], "template": "z"}]}),
        ("tokenizer_config.json", {"eos_token": {"content": {"a": 1}}}),
    ],
)
def test_what_a_tokenizer_should_not_say_is_no_obstacle(like: Path, tmp_path: Path, name: str, said: Any) -> None:
    own = tmp_path / "own"
    AutoTokenizer.from_pretrained(like).save_pretrained(own)
    (own / "chat_template.jinja").unlink()
    write(own, name, **said)
    beside = find_beside(own, like)
    assert beside.tokenizer == own / "tokenizer.json"
    assert tokens_of(own / "tokenizer.json") in (None, 256, 259)
