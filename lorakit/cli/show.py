"""`lorakit show`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.shared import json_option, note, print_json
from lorakit.cli.tables import print_table, printable, size_in_words
from lorakit.errors import LorakitError, NotFound, Refused

if TYPE_CHECKING:
    from rich.tree import Tree

    from lorakit.mix.lineage import Lineage

_STATES = {
    "gone": "gone", "changed": "changed since", "above": "told of above", "deeper": "its own parents are left out",
    "unsaved": "never saved",
}  # fmt: skip


@click.command("show")
@click.argument("path")
@json_option
def command(path: str, as_json: bool) -> None:
    """Say what a folder holds, and what it was made of: an adapter, a merged model, or a folder of adapters.

    PATH may be the name of an adapter in the store as well.

    \b
    lorakit show mixed
    lorakit show stages --json
    """
    folder = _folder(path)
    adapters = [] if _holds_something(folder) else _adapters_in(folder)
    if not (adapters or _holds_something(folder)):
        raise Refused(f"'{folder}' is neither an adapter nor a model, holds no adapters, and lorakit did not write it")
    if adapters:
        stages = [_stage(adapter) for adapter in adapters]
        if as_json:
            print_json({"path": str(folder), "kind": "folder of adapters", "adapters": stages})
        else:
            _print_stages(stages)
        return
    from lorakit.mix.lineage import lineage_of

    lineage = lineage_of(folder)
    facts = _facts(folder)
    if as_json:
        print_json({**facts, "lineage": lineage.as_dict()})
    else:
        _print_facts(facts, lineage)
        if lineage.parents:
            print()
            _print_tree(lineage)


def _folder(path: str) -> Path:
    """Raises NotFound when there is neither a folder nor a name in the store."""
    if Path(path).is_dir():
        return Path(path)
    from lorakit.store.locate import stored_revision

    revision = stored_revision(path)
    if revision is None:
        raise NotFound(f"there is no folder '{path}', and no such name in the store")
    return revision.folder


def _holds_something(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("adapter_config.json", "config.json", "lorakit.json"))


def _adapters_in(folder: Path) -> list[Path]:
    """In the order of their names, numbers by their value."""
    found = [path for path in folder.iterdir() if (path / "adapter_config.json").is_file()]
    return sorted(found, key=lambda path: [(int(n or 0), word) for n, word in re.findall(r"(\d*)(\D*)", path.name)])


def _facts(folder: Path) -> dict[str, Any]:
    if (folder / "adapter_config.json").is_file():
        return _adapter_facts(folder)
    if (folder / "config.json").is_file():
        return _model_facts(folder)
    return {"path": str(folder.absolute()), "kind": "folder"}


def _adapter_facts(folder: Path) -> dict[str, Any]:
    from lorakit.adapters.reading import load_adapter
    from lorakit.files.safetensors import read_header

    adapter = load_adapter(folder)
    header = read_header(adapter.files()[0].file)
    return {
        "path": str(folder.absolute()),
        "kind": "adapter",
        "peft_type": adapter.config.peft_type,
        "base": adapter.base,
        "rank": adapter.rank,
        "modules": len(adapter.deltas),
        "tensors": len(header.tensors),
        "dtypes": sorted({stored.dtype for stored in header.tensors.values()}),
        "bytes": header.size,
    }


def _model_facts(folder: Path) -> dict[str, Any]:
    from lorakit.merge.base import read_base

    model = read_base(folder)
    return {
        "path": str(folder.absolute()),
        "kind": "model",
        "model_type": model.model_type,
        "quantised": model.quantised,
        "tensors": len(model.tensors),
        "dtypes": sorted({stored.dtype for stored in model.tensors.values()}),
        "bytes": sum(shard.size for shard in model.shards),
    }


def _stage(folder: Path) -> dict[str, Any]:
    """What the table of several adapters says of one; what can't be read has the reason in place of its numbers."""
    from math import sqrt

    from lorakit.adapters.reading import load_adapter
    from lorakit.adapters.truncation import one_thread
    from lorakit.mix.lineage import lineage_of

    try:
        lineage, adapter = lineage_of(folder), load_adapter(folder)
        with one_thread():
            norm = sqrt(sum(delta.norm() ** 2 for delta in adapter.deltas.values()))
    except LorakitError as error:
        return {"name": folder.name, "reason": str(error)}
    return {
        "name": folder.name,
        "operation": lineage.operation,
        "rank": adapter.rank,
        "norm": norm,
        "error": lineage.error,
    }


def _print_stages(stages: Sequence[dict[str, Any]]) -> None:
    rows = [
        (
            stage["name"],
            stage.get("operation") or "-",
            str(stage.get("rank", "-")),
            f"{stage['norm']:.4g}" if "norm" in stage else "-",
            "-" if stage.get("error") is None else f"{stage['error']:.3g}",
        )
        for stage in stages
    ]
    print_table(("name", "operation", "rank", "norm", "error"), rows)
    for stage in stages:
        if "reason" in stage:
            note(f"note: {printable(stage['reason'])}")


def _print_facts(facts: dict[str, Any], lineage: Lineage) -> None:
    version = f" {lineage.version}" if lineage.version else ""
    written = f", written by lorakit {lineage.operation}{version}" if lineage.operation else ""
    details = ", ".join(str(facts[key]) for key in ("peft_type", "model_type", "quantised") if facts.get(key))
    kind = f"{facts['kind']} ({details})" if details else facts["kind"]
    lines = {
        "path": facts["path"],
        "kind": f"{kind}{written}",
        "base": facts.get("base"),
        "rank": facts.get("rank"),
        "modules": facts.get("modules"),
        "tensors": f"{facts['tensors']} in {', '.join(facts['dtypes'])}" if "tensors" in facts else None,
        "size": size_in_words(facts["bytes"]) if "bytes" in facts else None,
        "settings": " ".join(f"{key}={value}" for key, value in lineage.settings.items() if value is not None) or None,
        "error": None if lineage.error is None else f"{lineage.error:.3g} of the norm was cut off",
        "survival": None if lineage.survival is None else f"{lineage.survival:.2%} of the change survived rounding",
    }
    for name, value in lines.items():
        if value is not None:
            print(f"{name:<9} {printable(str(value))}")


def _print_tree(lineage: Lineage) -> None:
    if not sys.stdout.isatty():
        print("\n".join(_lines(lineage)))
        return
    from rich.console import Console

    Console().print(_rich_tree(lineage), soft_wrap=True)


def _lines(lineage: Lineage) -> Iterator[str]:
    yield _label(lineage)
    for number, parent in enumerate(lineage.parents, 1):
        last = number == len(lineage.parents)
        first, *rest = _lines(parent)
        yield f"{'└── ' if last else '├── '}{first}"
        for line in rest:
            yield f"{'    ' if last else '│   '}{line}"


def _rich_tree(lineage: Lineage) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    style = "red" if lineage.state in ("gone", "changed") else "dim" if lineage.state in ("above", "deeper") else ""
    tree = Tree(Text(_label(lineage), style=style))
    tree.children.extend(_rich_tree(parent) for parent in lineage.parents)
    return tree


def _label(lineage: Lineage) -> str:
    weight = "" if lineage.weight is None else f"{lineage.weight:g} × "
    role = "base " if lineage.role == "base" else ""
    said = [lineage.operation] if lineage.operation else []
    if lineage.operation and "method" in lineage.settings:
        said.append(str(lineage.settings["method"]))
    if lineage.rank is not None:
        said.append(f"rank {lineage.rank}")
    if lineage.error:
        said.append(f"error {lineage.error:.3g}")
    said += [*lineage.parts, *([_STATES[lineage.state]] if lineage.state in _STATES else [])]
    name = f"{weight}{role}{lineage.path or lineage.operation}"
    return printable(f"{name}  ({', '.join(said)})" if said else name)
