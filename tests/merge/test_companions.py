"""What stands beside the weights comes along as coherent groups, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.merge.companions import plan_companions, write_config

INLINE = {"chat_template": "inline"}


def folder(place: Path, **files: Any) -> Path:
    """`tokenizer_config__json={...}` becomes tokenizer_config.json; a name may hold `/` as `___`."""
    place.mkdir()
    for name, content in files.items():
        file = place / name.replace("___", "/").replace("__", ".")
        file.parent.mkdir(exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return place


def origins(base: Path, *adapters: Path) -> dict[str, str]:
    return {companion.name: companion.source.parent.name for companion in plan_companions(base, adapters)}


TOKENIZER: dict[str, Any] = {"tokenizer__json": {}, "tokenizer_config__json": {}, "special_tokens_map__json": {}}


def test_all_comes_from_the_base_when_the_adapter_has_nothing(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", config__json={}, generation_config__json={}, merges__txt="", **TOKENIZER)
    adapter = folder(tmp_path / "adapter", adapter_config__json={})
    assert origins(base, adapter) == dict.fromkeys(
        ["generation_config.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"],
        "base",
    )


def test_the_tokenizer_comes_whole_from_the_adapter(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", vocab__json={}, merges__txt="", added_tokens__json={}, **TOKENIZER)
    adapter = folder(tmp_path / "adapter", tokenizer__json={}, tokenizer_config__json={})
    assert origins(base, adapter) == {"tokenizer.json": "adapter", "tokenizer_config.json": "adapter"}


def test_the_first_adapter_that_has_a_group_gives_it(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", generation_config__json={}, preprocessor_config__json={}, **TOKENIZER)
    one = folder(tmp_path / "one", generation_config__json={})
    two = folder(tmp_path / "two", generation_config__json={}, tokenizer_config__json={}, processor_config__json={})
    assert origins(base, one, two) == {
        "generation_config.json": "one", "tokenizer_config.json": "two", "processor_config.json": "two",
    }  # fmt: skip


def test_weights_read_mes_and_training_states_never_come_along(tmp_path: Path) -> None:
    base = folder(
        tmp_path / "base", config__json={}, README__md="", model__safetensors="", pytorch_model__bin="",
        model__safetensors__index__json={}, lorakit__json={}, LICENSE="terms", original___x__json={},
    )  # fmt: skip
    adapter = folder(
        tmp_path / "adapter", README__md="", adapter_config__json={}, trainer_state__json={}, optimizer__pt="",
        training_args__bin="", adapter_model__safetensors="", train__py="",
    )  # fmt: skip
    assert origins(base, adapter) == {"LICENSE": "base"}


@pytest.mark.parametrize(
    ("base_files", "adapter_files", "expected"),
    [
        ({"chat_template__jinja": "b"}, {}, ("base", None)),
        ({"chat_template__jinja": "b"}, {"chat_template__jinja": "a"}, ("adapter", None)),
        ({"chat_template__jinja": "b"}, {"tokenizer_config__json": {}}, ("base", None)),
        ({"chat_template__jinja": "b"}, {"tokenizer_config__json": INLINE}, None),
        ({"tokenizer_config__json": INLINE}, {"tokenizer_config__json": {}}, ("base", "inline")),
        ({"tokenizer_config__json": INLINE}, {}, None),
        ({"tokenizer_config__json": INLINE}, {"chat_template__jinja": "a"}, ("adapter", None)),
        ({}, {}, None),
    ],
)
def test_the_chat_template_is_the_adapters_else_the_bases(
    tmp_path: Path, base_files: dict[str, Any], adapter_files: dict[str, Any], expected: tuple[str, str | None] | None
) -> None:
    base, adapter = folder(tmp_path / "base", **base_files), folder(tmp_path / "adapter", **adapter_files)
    found = {companion.name: companion for companion in plan_companions(base, [adapter])}
    template = found.get("chat_template.jinja")
    assert (template and (template.source.parent.name, template.text)) == expected


def test_named_templates_inside_a_config_become_files(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    base = folder(tmp_path / "base", tokenizer_config__json={"chat_template": named})
    adapter = folder(tmp_path / "adapter", tokenizer_config__json={})
    out = folder(tmp_path / "out")
    for companion in plan_companions(base, [adapter]):
        companion.write(out)
    assert (out / "chat_template.jinja").read_text() == "one"
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "two"


def test_code_comes_from_the_base_and_what_the_adapters_tokenizer_adds(tmp_path: Path) -> None:
    auto_map = {"AutoTokenizer": ["tokenization_x.X", None], "AutoModel": "modeling_x.X", "AutoOther": "org/x--y.Z"}
    base = folder(tmp_path / "base", modeling_x__py="", helper__py="")
    adapter = folder(
        tmp_path / "adapter", tokenizer_config__json={"auto_map": auto_map}, tokenization_x__py="", modeling_x__py="",
        train__py="",
    )  # fmt: skip
    assert origins(base, adapter) == {
        "modeling_x.py": "base", "helper.py": "base",
        "tokenization_x.py": "adapter", "tokenizer_config.json": "adapter",
    }  # fmt: skip


def test_the_config_keeps_its_bytes_unless_the_dtype_changes(tmp_path: Path) -> None:
    text = '{ "torch_dtype":"bfloat16",   "text_config": {"dtype": "bfloat16", "x": 1}}'
    base, kept, cast = (folder(tmp_path / name) for name in ("base", "kept", "cast"))
    (base / "config.json").write_text(text)
    write_config(base, kept, "keep")
    write_config(base, cast, "fp16")
    assert (kept / "config.json").read_text() == text
    assert json.loads((cast / "config.json").read_text()) == {
        "torch_dtype": "float16", "text_config": {"dtype": "float16", "x": 1},
    }  # fmt: skip


def test_a_config_without_a_dtype_gets_one(tmp_path: Path) -> None:
    base, cast = folder(tmp_path / "base", config__json={"a": 1}), folder(tmp_path / "cast")
    write_config(base, cast, "bf16")
    assert json.loads((cast / "config.json").read_text()) == {"a": 1, "torch_dtype": "bfloat16"}
