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
