"""Is it the base that the adapter was trained on?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.adapters.reading import load_adapter
from lorakit.convert.answers import Check
from lorakit.convert.right_base import right_base
from lorakit.merge.base import read_base
from tests.folders import base_tensors, write_adapter, write_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def answer(folder: Path, base: Path, named: str | None = None, **noted: Any) -> Check:
    adapter = write_adapter(folder / "adapter", base_model_name_or_path=named)
    if noted:
        (adapter / "lorakit.json").write_text(json.dumps({"parents": [{"kind": "base", **noted}]}))
    return right_base(load_adapter(adapter), read_base(base))


@pytest.mark.parametrize("named", [None, "somebody/base", "somebody/other", "/nowhere/base"])
def test_a_name_alone_never_makes_it_the_wrong_one(tmp_path: Path, base: Path, named: str | None) -> None:
    found = answer(tmp_path, base, named)
    assert found.ok is True
    assert ("somebody/other" in str(found.reason)) == (named == "somebody/other")


def test_a_named_folder_with_other_values_does(tmp_path: Path, base: Path) -> None:
    other = write_base(tmp_path / "other", {name: value + 1 for name, value in base_tensors().items()})
    found = answer(tmp_path, base, str(other))
    assert found.ok is False
    assert str(other) in str(found.reason)
    assert found.cure


def test_a_named_folder_with_the_same_values_in_another_dtype_does_not(tmp_path: Path) -> None:
    half = write_base(tmp_path / "half", base_tensors(dtype="float16"))
    wide = {name: value.astype("float32") for name, value in base_tensors(dtype="float16").items()}
    whole = write_base(tmp_path / "whole", wide)
    assert answer(tmp_path / "one", half, str(whole)).ok is True
    assert answer(tmp_path / "two", whole, str(half)).ok is True


def test_a_folder_of_the_same_last_name_with_other_values_does_too(tmp_path: Path) -> None:
    mine = write_base(tmp_path / "one" / "llama")
    other = write_base(tmp_path / "two" / "llama", {name: value + 1 for name, value in base_tensors().items()})
    copy = write_base(tmp_path / "three" / "llama")
    assert answer(tmp_path / "a", other, str(mine)).ok is False
    assert answer(tmp_path / "b", copy, str(mine)).ok is True
    (tmp_path / "link").symlink_to(mine)
    assert answer(tmp_path / "c", tmp_path / "link", str(mine)).ok is True


def test_a_base_whose_config_was_edited_is_still_the_one_that_was_noted(tmp_path: Path, base: Path) -> None:
    noted = read_base(base)
    said = {"identity": noted.identity, "weights": noted.weights_digest, "path": str(base)}
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 99}))
    assert read_base(base).identity != noted.identity
    assert answer(tmp_path / "a", base, **said).ok is True
    del said["weights"]  # as notes of before had none, and the folder may hold other weights by now
    assert answer(tmp_path / "b", base, **said).ok is None


def test_the_values_of_the_base_that_was_noted_decide_where_it_is_here(tmp_path: Path, base: Path) -> None:
    half = write_base(tmp_path / "half", base_tensors(dtype="float16"))
    wide = {name: value.astype("float32") for name, value in base_tensors(dtype="float16").items()}
    noted = read_base(write_base(tmp_path / "wide", wide))
    said = {"identity": noted.identity, "path": str(noted.folder)}
    assert answer(tmp_path / "a", half, **said).ok is True
    other = write_base(tmp_path / "other", {name: value + 1 for name, value in base_tensors().items()})
    found = answer(tmp_path / "b", other, **said)
    assert found.ok is False
    assert str(noted.folder) in str(found.reason)


def test_what_lorakit_noted_of_the_base_decides_where_it_is_certain(tmp_path: Path, base: Path) -> None:
    identity = read_base(base).identity
    assert answer(tmp_path / "a", base, identity=identity).ok is True
    assert answer(tmp_path / "b", base, identity="llama-0123456789abcdef").ok is None
    assert answer(tmp_path / "c", base, identity="qwen2-0123456789abcdef").ok is False


@pytest.mark.parametrize("text", ["", "[]", '{"parents": 3}', '{"parents": [3, {"kind": "base"}]}'])
def test_a_note_that_says_nothing_is_no_note(tmp_path: Path, base: Path, text: str) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    (adapter / "lorakit.json").write_text(text)
    assert right_base(load_adapter(adapter), read_base(base)).ok is True
