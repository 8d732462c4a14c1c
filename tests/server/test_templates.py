"""Which chat template an adapter's requests need, beside what transformers reads from the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import Refused
from lorakit.server.engines.vllm import templated
from lorakit.server.requests.templates import OwnTemplates, own_templates, shared_templates, templates_in
from lorakit.store.catalog import Facts, Revision


def folder_of(place: Path, *, config: Any = None, **files: str) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (place / "tokenizer_config.json").write_text(json.dumps({"chat_template": config}))
    for name, text in files.items():
        file = place / ("chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return place


NAMED = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "T"}]


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [(None, {}, {}), ("A", {}, {"default": "A"}), (NAMED, {}, {"default": "A", "tool_use": "T"}),
     (None, {"default": "B"}, {"default": "B"}), ("A", {"default": "B"}, {"default": "B"}),
     (None, {"default": "B", "tool_use": "U"}, {"default": "B", "tool_use": "U"}), (7, {}, {}), ([7], {}, {})],
)  # fmt: skip
def test_a_folder_has_the_templates_that_its_files_say(
    tmp_path: Path, config: Any, files: dict[str, str], expected: dict[str, str]
) -> None:
    assert templates_in(folder_of(tmp_path / "a", config=config, **files)) == expected


def test_what_transformers_writes_is_read_as_it_reads_it(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    for number, template in enumerate(("X{{ 1 }}", {"default": "D", "tool_use": "T"})):
        folder = tmp_path / str(number)
        PreTrainedTokenizerFast(tokenizer_object=plain, chat_template=template).save_pretrained(folder)
        read = PreTrainedTokenizerFast.from_pretrained(folder).chat_template
        assert templates_in(folder) == (read if isinstance(read, dict) else {"default": read})


@pytest.mark.parametrize(
    ("own", "base", "expected"),
    [({"default": "A"}, {"default": "A"}, {}), ({}, {"default": "A"}, {}),
     ({"default": "B"}, {"default": "A"}, {"chat_template.jinja": "B"}),
     ({"default": "B"}, {}, {"chat_template.jinja": "B"}),
     ({"default": "A"}, {"default": "A", "tool_use": "T"}, {}),
     ({"default": "A", "tool_use": "U"}, {"default": "A", "tool_use": "T"},
      {"chat_template.jinja": "A", "chat_template.tool_use.jinja": "U"}),
     ({"tool_use": "U"}, {"default": "A"}, {}), ({"default": "A", "other": "O"}, {"default": "A"}, {})],
)  # fmt: skip
def test_an_adapter_keeps_its_templates_where_they_differ_from_its_bases(
    tmp_path: Path, own: dict[str, str], base: dict[str, str], expected: dict[str, str]
) -> None:
    assert own_templates(folder_of(tmp_path / "own", **own), folder_of(tmp_path / "base", **base)) == expected


def test_a_template_that_is_no_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="larger"):
        templates_in(folder_of(tmp_path, default="a" * (2**20 + 1)))


@pytest.mark.anyio
async def test_a_chat_with_tools_uses_the_template_for_tools(tmp_path: Path) -> None:
    def revision(id: int, **files: str) -> Revision:
        folder = tmp_path / str(id)
        folder.mkdir()
        for name, text in files.items():
            (folder / f"{name}.jinja").write_text(text)
        return Revision(id, "sql", "step", str(id), folder, Facts(), 8, 1, "", 0.0)

    known = OwnTemplates()
    both = revision(1, **{"chat_template": "A", "chat_template.tool_use": "T"})
    one, none = revision(2, chat_template="A"), revision(3)
    for asked, tools, expected in (
        (both, False, "A"), (both, True, "T"), (one, True, "A"), (one, False, "A"), (none, True, None),
    ):  # fmt: skip
        assert await known.of(asked, tools=tools) == expected
        assert await known.of(asked, tools=tools) == expected


def test_a_mix_is_asked_by_the_template_that_its_adapters_share_and_refused_where_they_share_none(
    tmp_path: Path,
) -> None:
    def revision(name: str, text: str | None) -> Revision:
        folder = tmp_path / name
        folder.mkdir()
        if text is not None:
            (folder / "chat_template.jinja").write_text(text)
        return Revision(1, name, "step", "0" * 64, folder, Facts(step=1), 8, 1, "", 0.0)

    a, b, c, plain, other = (revision(*each) for each in zip("abcde", ("A", "A", "C", None, None), strict=True))
    assert shared_templates([a, b]) == {"chat_template.jinja": "A"}
    assert shared_templates([plain, other]) == {}
    for different in ([a, b, c], [a, plain]):
        with pytest.raises(Refused, match=r"'a@step-1-00000000' and '.@step-1-00000000' have different"):
            shared_templates(different)


@pytest.mark.parametrize(
    ("path", "said", "expected"),
    [("/v1/chat/completions", {"messages": []}, {"chat_template": "T"}),
     ("/v1/chat/completions", {"messages": [], "chat_template": None}, {"chat_template": "T"}),
     ("/v1/chat/completions", {"messages": [], "chat_template": "mine"}, {}),
     ("/v1/completions", {"prompt": "a"}, {}), ("/tokenize", {"prompt": "a"}, {}),
     ("/tokenize", {"messages": []}, {"chat_template": "T"}),
     ("/v1/responses", {"input": "a"}, {"chat_template_kwargs": {"chat_template": "T"}}),
     ("/v1/messages", {"messages": [], "chat_template_kwargs": {"x": 1}},
      {"chat_template_kwargs": {"x": 1, "chat_template": "T"}}),
     ("/v1/responses", {"input": "a", "chat_template_kwargs": {"chat_template": "mine"}}, {})],
)  # fmt: skip
def test_vllm_is_told_of_a_template_where_a_route_reads_one(
    path: str, said: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert templated(path, said, "T") == expected
