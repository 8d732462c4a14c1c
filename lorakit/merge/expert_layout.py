"""How the factors of all experts were packed, where their shapes don't say: by what the adapter tells of its writer.

Two things have differed, and reading either wrongly gives a delta of the right size that is noise. The order of B's
columns: PEFT has the expert fastest, Unsloth had the rank fastest until September 2026, and writes `lora_B_layout`
since (unslothai/unsloth-zoo#1232). And which side of a parameter is the input: PEFT changed it in 0.19.0 and in 0.19.1.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from lorakit.adapters.config import AdapterConfig
from lorakit.errors import UnsupportedAdapter, UsageError

LAYOUTS = ("peft", "peft-0.18", "unsloth")  # answers to what an adapter leaves open; what it does say counts more

_MARKS = {"rank_major": False, "grouped_by_expert": True}
_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?(.*)")


def check_layout(layout: str | None) -> None:
    """Raises UsageError when there is no such layout."""
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"there is no expert layout '{layout}': it is one of {', '.join(LAYOUTS)}")


def is_grouped_by_expert(config: AdapterConfig, folder: Path, *, name: str, layout: str | None) -> bool:
    """Whether B's columns are those of the first expert, then those of the second, and so on.

    Raises:
        UnsupportedAdapter: the adapter is of Unsloth's making and doesn't say.
    """
    mark = config.raw.get("lora_B_layout")
    if mark is not None:
        if mark not in _MARKS:
            raise UnsupportedAdapter(f"adapter '{name}' has the unknown lora_B_layout {mark!r}")
        return _MARKS[mark]
    if layout is None and _names_unsloth(config, folder):
        raise UnsupportedAdapter(
            f"adapter '{name}' has LoRA on all experts at once and comes from Unsloth, which until September 2026 "
            f"ordered lora_B otherwise than PEFT; its file does not say in which order it is: say so with "
            f"--expert-layout unsloth (trained with such a version) or --expert-layout peft"
        )
    return layout == "unsloth"


def _names_unsloth(config: AdapterConfig, folder: Path) -> bool:
    if "unsloth" in json.dumps(dict(config.raw)).lower():
        return True
    readme = folder / "README.md"
    return readme.is_file() and "unsloth" in readme.read_text(encoding="utf-8", errors="replace").lower()


def has_input_first(config: AdapterConfig, *, name: str, module: str, layout: str | None, is_transposed: bool) -> bool:
    """Whether the factors of a (experts, n, n) parameter take its second axis for the input.

    `is_transposed`: the model's class says so of itself, as those of GPT-OSS and Aria do.

    Raises:
        UnsupportedAdapter: no release of PEFT is named, and none by the layout.
    """
    release = _release(config, layout)
    if release is None:
        raise UnsupportedAdapter(
            f"adapter '{name}': the experts of '{module}' are square, and which side is the input depends on the "
            f"version of PEFT, which its config does not name (peft_version): say --expert-layout peft for 0.19.1 and "
            f"later, or --expert-layout peft-0.18"
        )
    if release < (0, 19, 0):
        return True
    return not is_transposed if release < (0, 19, 1) else is_transposed


def _release(config: AdapterConfig, layout: str | None) -> tuple[int, int, int] | None:
    match = _VERSION.match(str(config.raw.get("peft_version") or ""))
    if match is not None:
        release = int(match[1]), int(match[2]), int(match[3] or 0)
        # a development version between the two changes may have either
        if not ("dev" in match[4] and (0, 18, 1) <= release <= (0, 19, 1)):
            return release
    if layout is None:
        return None
    return (0, 18, 0) if layout == "peft-0.18" else (0, 19, 1)
