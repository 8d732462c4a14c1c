"""Chat templates that an adapter brings along: vLLM knows its base's alone, and takes another one with each request.

In a revision's folder they are files; where they are the base's own, there are none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import Refused
from lorakit.files.folders import read_json
from lorakit.server.file_work import file_work
from lorakit.store.catalog import Revision

DEFAULT = "default"
TOOL_USE = "tool_use"  # transformers and vLLM use the template of this name where a request has tools
FILES: Mapping[str, str] = {DEFAULT: "chat_template.jinja", TOOL_USE: "chat_template.tool_use.jinja"}
_LARGEST = 1 << 20  # bytes
_REMEMBERED = 4096

Templates = Mapping[str, str]


def templates_in(folder: Path) -> Templates:
    """The chat templates of a model or an adapter, by name; files of their own count more than what a config says.

    Raises:
        Refused: one is larger than any template is.
        InvalidFile: a config can't be read.
    """
    found = _in_config(folder / "chat_template.json") | _in_config(folder / "tokenizer_config.json")
    files = {DEFAULT: folder / FILES[DEFAULT]}
    files |= {file.stem: file for file in (folder / "additional_chat_templates").glob("*.jinja")}
    return found | {name: _text(file) for name, file in files.items() if file.is_file()}


def _in_config(file: Path) -> dict[str, str]:
    said: Any = read_json(file).get("chat_template") if file.is_file() else None
    if isinstance(said, str):
        return {DEFAULT: said}
    named = [entry for entry in said if isinstance(entry, dict)] if isinstance(said, list) else []
    return {str(entry.get("name")): str(entry.get("template")) for entry in named}


def _text(file: Path) -> str:
    with file.open("rb") as stream:
        raw = stream.read(_LARGEST + 1)
    if len(raw) > _LARGEST:
        raise Refused(f"its chat template '{file}' is larger than {_LARGEST} bytes")
    return raw.decode("utf-8", "replace")


def own_templates(adapter: Path, base: Path) -> Templates:
    """Those that an adapter's requests need, by the name of a file for each; none where the base's do."""
    theirs = templates_in(base)
    own = {name: text for name, text in templates_in(adapter).items() if name in FILES}
    if DEFAULT not in own or all(theirs.get(name) == text for name, text in own.items()):
        return {}
    return {FILES[name]: text for name, text in own.items()}


def shared_templates(revisions: Sequence[Revision]) -> Templates:
    """What a mix of these is asked by, by the name of a file for each; none where the base's do.

    Raises:
        Refused: there is none that is right for all of them.
    """
    found = [_stored(revision.folder) for revision in revisions]
    other = next((place for place, templates in enumerate(found) if templates != found[0]), 0)
    if other:
        names = f"'{revisions[0].name}' and '{revisions[other].name}'"
        raise Refused(f"{names} have different chat templates, so no chat with a mix of them is right: train with one")
    return {FILES[name]: text for name, text in found[0].items()} if found else {}


class OwnTemplates:
    """Those of revisions, read from their folders when they are first asked for."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Templates] = OrderedDict()

    async def of(self, revision: Revision, *, tools: bool) -> str | None:
        """The template for a chat with a revision, with tools or without; None for the base's."""
        found = self._known.get(revision.digest)
        if found is None:
            found = self._known[revision.digest] = await file_work(_stored, revision.folder)
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return found.get(TOOL_USE if tools and TOOL_USE in found else DEFAULT)


def _stored(folder: Path) -> Templates:
    return {name: _text(folder / file) for name, file in FILES.items() if (folder / file).is_file()}
