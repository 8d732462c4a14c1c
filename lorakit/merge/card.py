"""The model card of a merged model: what it was made of, by names that mean something elsewhere too."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit import __version__
from lorakit.files.hub import looks_like_hub_id
from lorakit.merge.report import MergeReport

CARD = "README.md"

_IN_CACHE = re.compile(r"^models--(.+)$")
_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*$", re.DOTALL | re.MULTILINE)
_LICENSE = re.compile(r"^(license|license_name|license_link): +([^\s>|&*!{\[#].*)$", re.MULTILINE)


def card(report: MergeReport, adapters: Sequence[Mapping[str, Any]]) -> str:
    """The text of the card. `adapters` are the parents that `lorakit.json` names, with their digests."""
    base = shown_name(report.plan.base.folder, report.plan.base.reference)
    lines = ["---", *_front(report, base), "---", "", f"# {_title(report)}", ""]
    lines += [f"A merge of {_count(len(adapters), 'adapter')} into `{base}`, made by lorakit {__version__}.", ""]
    lines += ["| | weight | sha256 |", "|---|---|---|", f"| base `{base}` | | |"]
    names = [shown_name(Path(str(parent["path"]))) for parent in adapters]
    for name, parent in zip(names, adapters, strict=True):
        lines.append(f"| adapter `{name}` | {parent['weight']:g} | `{parent['sha256']}` |")
    lines += [
        "",
        *_facts(report),
        "",
        "```",
        _command(report, base, list(zip(names, adapters, strict=True))),
        "```",
        "",
    ]
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"one {what}" if number == 1 else f"{number} {what}s"


def _title(report: MergeReport) -> str:
    return "Merged model" if report.out is None else report.out.absolute().name


def _front(report: MergeReport, base: str) -> list[str]:
    """YAML; JSON's strings are YAML's too."""
    front = [f"base_model: {json.dumps(base)}"] if looks_like_hub_id(base) and "/" in base else []
    front += ["library_name: transformers", "tags:", "- merge", "- lorakit"]
    return front + _license(report.plan.base.folder / CARD)


def _license(file: Path) -> list[str]:
    """The lines of the base's own card that name its license."""
    try:
        front = _FRONT.search(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return []
    return [f"{key}: {value.rstrip()}" for key, value in _LICENSE.findall(front[1])] if front else []


def _facts(report: MergeReport) -> list[str]:
    dtypes = sorted({tensor.dtype for shard in report.plan.shards for tensor in shard.target.tensors.values()})
    facts = [f"- stored as {', '.join(dtypes)}", f"- rounded to {report.settings.get('rounding', 'nearest')}"]
    if report.settings.get("rounding") == "stochastic":
        facts[-1] = f"- rounded stochastically, seed {report.settings.get('seed', 0)}"
    if report.survival is not None:
        facts.append(f"- {report.survival:.2%} of the change survived rounding")
    if report.unplaced:
        facts.append(f"- {_count(len(report.unplaced), 'adapter tensor')} without a place in the base left out")
    return facts


def _command(report: MergeReport, base: str, adapters: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    words = ["lorakit", "merge"]
    words += [name if parent["weight"] == 1 else f"{name}={parent['weight']:g}" for name, parent in adapters]
    words += ["--base", base, "--out", _title(report)]
    settings = {"dtype": report.plan.dtype, **report.settings}
    for key, usual in (
        ("dtype", "keep"), ("rounding", "nearest"), ("seed", 0), ("expert_layout", None), ("onto", None),
        ("quantize", None), ("max_shard_size", None),
    ):  # fmt: skip
        if settings.get(key, usual) != usual:
            words += [f"--{key.replace('_', '-')}", str(settings[key])]
    return shlex.join(words + (["--no-strict"] if report.unplaced else []))


def shown_name(folder: Path, reference: str | None = None) -> str:
    """A hub id where there is one, else the folder's own name; a checkpoint's with its run's."""
    if reference is not None and not Path(reference).is_dir() and looks_like_hub_id(reference):
        return reference
    folder = folder.absolute()
    for part in folder.parts:
        if match := _IN_CACHE.match(part):
            return match[1].replace("--", "/", 1)
    return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("checkpoint-") else folder.name
