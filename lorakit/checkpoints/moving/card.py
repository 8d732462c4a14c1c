"""The model card of a checkpoint that is pushed: what it is of, how good it was, and how it is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from lorakit import __version__
from lorakit.adapters.config import read_config
from lorakit.checkpoints.metadata import Metadata
from lorakit.errors import InvalidFile
from lorakit.files.hub import looks_like_hub_id

CARD = "README.md"
MADE = "made by lorakit"
_TEMPLATE = "[More Information Needed]"  # what PEFT and transformers write where a person should


def is_persons_own(text: str) -> bool:
    """Whether somebody wrote it, rather than a trainer or lorakit: then it is left alone."""
    return _TEMPLATE not in text and MADE not in text and bool(text.strip())


def checkpoint_card(folder: Path, checkpoint: Metadata, repository: str) -> str:
    """The text of a card for the Hub."""
    title = repository.rpartition("/")[2]
    base = checkpoint.base if checkpoint.base and looks_like_hub_id(checkpoint.base) else None
    what = "A LoRA adapter" if checkpoint.kind == "adapter" else "A model"
    of = f" of `{base or os.path.basename(checkpoint.base.rstrip('/'))}`" if checkpoint.base else ""
    at = "" if checkpoint.step is None else f", as it was at step {checkpoint.step}"
    lines = ["---", *_front(checkpoint, base), "---", "", f"# {title}", ""]
    lines += [f"{what}{of}{at}. This card was {MADE} {__version__}.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in _facts(folder, checkpoint)]
    return "\n".join([*lines, "", *_loading(checkpoint, repository, base), ""])


def _front(checkpoint: Metadata, base: str | None) -> list[str]:
    """YAML; JSON's strings are YAML's too."""
    front = [f"base_model: {json.dumps(base)}"] if base else []
    if checkpoint.kind != "adapter":
        return [*front, "library_name: transformers", "tags:", "- lorakit"]
    relation = ["base_model_relation: adapter"] if base else []
    return [*front, *relation, "library_name: peft", "tags:", "- lora", "- peft", "- lorakit"]


def _facts(folder: Path, checkpoint: Metadata) -> list[tuple[str, str]]:
    facts: list[tuple[str, str | None]] = [
        ("rank", _number(checkpoint.rank)), ("modules", _modules(folder)), ("step", _number(checkpoint.step)),
        ("epoch", _number(checkpoint.epoch)), ("training loss", _number(checkpoint.train_loss)),
        ("evaluation loss", _evaluated(checkpoint)),
    ]  # fmt: skip
    facts += [(name, _number(value)) for name, value in sorted((checkpoint.metrics or {}).items())]
    facts.append(("sha256", checkpoint.digest and f"`{checkpoint.digest}`"))
    return [(_cell(name), _cell(value)) for name, value in facts if value]


def _evaluated(checkpoint: Metadata) -> str | None:
    if checkpoint.eval_loss is None or checkpoint.eval_step == checkpoint.step:
        return _number(checkpoint.eval_loss)
    return f"{_number(checkpoint.eval_loss)} (of step {checkpoint.eval_step})"


def _modules(folder: Path) -> str | None:
    try:
        modules = read_config(folder).raw.get("target_modules")
    except InvalidFile:
        return None
    if isinstance(modules, str):
        return f"`{modules}`"
    return ", ".join(f"`{name}`" for name in sorted(map(str, modules))) if isinstance(modules, Sequence) else None


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    """What stands in a table: on one line, and closing no cell."""
    return " ".join(text.replace("|", "\\|").split())


def _loading(checkpoint: Metadata, repository: str, base: str | None) -> list[str]:
    if checkpoint.kind != "adapter":
        return [
            "```python", "from transformers import AutoModelForCausalLM", "",
            f'model = AutoModelForCausalLM.from_pretrained("{repository}")', "```", "",
            "```sh", f"vllm serve {repository}", "```",
        ]  # fmt: skip
    of = base or "BASE"
    name = repository.rpartition("/")[2]
    return [
        "With PEFT:", "",
        "```python", "from peft import PeftModel", "from transformers import AutoModelForCausalLM", "",
        f'base = AutoModelForCausalLM.from_pretrained("{of}")',
        f'model = PeftModel.from_pretrained(base, "{repository}")', "```", "",
        "With vLLM:", "",
        "```sh", f"vllm serve {of} --enable-lora --max-lora-rank {_allowed(checkpoint.rank)} "
        f"--lora-modules {name}={repository}", "```", "",
        "With lorakit, to serve it or to merge it into its base:", "",
        "```sh", f"lorakit pull {repository}", f"lorakit serve {of} --adapter {name}={name}",
        f"lorakit merge {name} --base {of} --out merged", "```",
    ]  # fmt: skip


def _allowed(rank: int | None) -> int:
    """The smallest rank that vLLM can be told and that is enough."""
    return next((allowed for allowed in (8, 16, 32, 64, 128, 256, 320, 512) if allowed >= (rank or 16)), rank or 16)
