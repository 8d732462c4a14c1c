"""The files beside the weights: config, tokenizer, chat template, generation config, preprocessors, custom code.

Each group comes as a whole from the first adapter folder that has it, else from the base, so that no file is paired
with one of another origin. `config.json` is always the base's: it describes the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lorakit.files.folders import copy_file, read_json, write_json

CONFIG = "config.json"
TORCH_NAMES: Mapping[str, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "tekken.json",
)  # fmt: skip
CHAT_TEMPLATE = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
GENERATION = ("generation_config.json",)
PREPROCESSOR = ("*preprocessor_config.json", "processor_config.json", "image_processor_config.json")
GROUPS = (GENERATION, PREPROCESSOR)

# What a base may hold besides the groups, and a copy of it should: settings of libraries, and its terms.
ALSO_FROM_BASE = ("*.json", "*.jinja", "*.txt", "LICENSE*", "NOTICE*", "USE_POLICY*")
NEVER = (
    CONFIG, "*.index.json", "adapter_config.json", "trainer_state.json", "lorakit.json", "*_results.json", "README*",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Companion:
    """A file that comes along: its place in the result, and the file it comes from.

    `text` is a chat template that stands inside the `tokenizer_config.json` of `source`.
    """

    name: str
    source: Path
    text: str | None = None

    def write(self, folder: Path) -> None:
        target = folder / self.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.text is None:
            copy_file(self.source, target)
        else:
            target.write_text(self.text, encoding="utf-8")


def plan_companions(base: Path, adapters: Sequence[Path], code: Path | None = None) -> tuple[Companion, ...]:
    """Which files come along, and from where; Python's from `code`, if that is not the base. `config.json` is apart:
    see `write_config`.
    """
    grouped = {name for names in (TOKENIZER, CHAT_TEMPLATE, *GROUPS) for name in _matching(base, names)}
    chosen = [Companion(name, base / name) for name in _matching(base, ALSO_FROM_BASE) if name not in grouped]
    tokenizer = next((folder for folder in adapters if (folder / "tokenizer_config.json").is_file()), base)
    chosen += _files(tokenizer, TOKENIZER)
    chosen += _chat_template(base, adapters, tokenizer)
    for group in GROUPS:
        chosen += _files(next((folder for folder in adapters if _matching(folder, group)), base), group)
    chosen += _custom_code(code or base, tokenizer)
    return tuple(sorted(chosen, key=lambda companion: companion.name))


def _matching(folder: Path, patterns: Sequence[str]) -> list[str]:
    found = {str(file.relative_to(folder)) for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(name for name in found if not any(fnmatch(name, never) for never in NEVER))


def _files(folder: Path, patterns: Sequence[str]) -> list[Companion]:
    return [Companion(name, folder / name) for name in _matching(folder, patterns)]


def _chat_template(base: Path, adapters: Sequence[Path], tokenizer: Path) -> list[Companion]:
    for folder in (*adapters, base):
        if files := _files(folder, CHAT_TEMPLATE):
            return files
        inside = _templates_inside(folder)
        if inside:
            place = folder / "tokenizer_config.json"
            return [Companion(name, place, text) for name, text in inside.items()] if folder != tokenizer else []
    return []


def _templates_inside(folder: Path) -> dict[str, str]:
    """The chat templates in `tokenizer_config.json`, by the names they have as files of their own."""
    template = _read_if_there(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, str):
        return {"chat_template.jinja": template}
    entries = [entry for entry in template if isinstance(entry, dict)] if isinstance(template, list) else []
    named = [(entry.get("name"), entry.get("template")) for entry in entries]
    return {
        "chat_template.jinja" if name == "default" else f"additional_chat_templates/{Path(name).name}.jinja": text
        for name, text in named
        if isinstance(name, str) and isinstance(text, str)
    }


def _custom_code(base: Path, tokenizer: Path) -> list[Companion]:
    """The Python files of the base; the tokenizer's folder adds what its own config names and the base lacks."""
    code = {name: base / name for name in _matching(base, ("*.py",))}
    for name in _modules_named(tokenizer / "tokenizer_config.json"):
        if (tokenizer / name).is_file() and name not in code:
            code[name] = tokenizer / name
    return [Companion(name, source) for name, source in code.items()]


def _modules_named(config: Path) -> set[str]:
    """The files that `auto_map` names: `{"AutoTokenizer": ["tokenization_x.Tokenizer", null]}`."""
    auto_map = _read_if_there(config).get("auto_map")
    values = auto_map.values() if isinstance(auto_map, dict) else []
    classes = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return {f"{name.split('.')[0]}.py" for name in classes if isinstance(name, str) and "--" not in name}


def _read_if_there(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def write_config(base: Path, folder: Path, dtype: str, changed: Mapping[str, Any] | None = None) -> None:
    """The base's `config.json`, or the changed one; with another dtype, wherever it names one, the new one stands."""
    if dtype == "keep" and changed is None:
        copy_file(base / CONFIG, folder / CONFIG)
        return
    config = dict(changed) if changed is not None else read_json(base / CONFIG)
    if dtype != "keep":
        name = TORCH_NAMES[dtype]
        section = config.pop("quantization_config", None)
        config = with_dtype(config, name) | ({} if section is None else {"quantization_config": section})
        if not config.keys() & {"dtype", "torch_dtype"}:
            config["torch_dtype"] = name
    write_json(folder / CONFIG, config)


def with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The config with another dtype wherever it names one."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            changed[key] = name
        else:
            changed[key] = with_dtype(value, name) if isinstance(value, dict) else value
    return changed
