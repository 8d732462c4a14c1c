"""lorakit gets LoRA checkpoints used: merged, mixed, converted and served.

`import lorakit` costs no torch import: each name loads its module on first use.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lorakit.adapters.adapter import Adapter as Adapter
    from lorakit.adapters.delta import Delta as Delta
    from lorakit.adapters.reading import load_adapter as load_adapter
    from lorakit.adapters.report import MixReport as MixReport
    from lorakit.convert.convert import convert as convert
    from lorakit.convert.report import ConvertReport as ConvertReport
    from lorakit.errors import LorakitError as LorakitError
    from lorakit.merge.merge import merge as merge
    from lorakit.merge.report import MergeReport as MergeReport
    from lorakit.merge.unmerge import UnmergeReport as UnmergeReport
    from lorakit.merge.unmerge import unmerge as unmerge
    from lorakit.merge.verify import VerifyReport as VerifyReport
    from lorakit.merge.verify import verify as verify
    from lorakit.mix.compare import CompareReport as CompareReport
    from lorakit.mix.compare import compare as compare
    from lorakit.mix.diff import DiffReport as DiffReport
    from lorakit.mix.diff import diff as diff
    from lorakit.mix.diff_tensors import TensorsReport as TensorsReport
    from lorakit.mix.diff_tensors import diff_tensors as diff_tensors
    from lorakit.mix.extraction.extract import extract as extract
    from lorakit.mix.extraction.report import ExtractReport as ExtractReport
    from lorakit.mix.mix import mix as mix
    from lorakit.mix.search import SearchReport as SearchReport
    from lorakit.mix.search import search as search
    from lorakit.mix.shrink import shrink as shrink

_HOME = {
    "Adapter": "lorakit.adapters.adapter",
    "load_adapter": "lorakit.adapters.reading",
    "Delta": "lorakit.adapters.delta",
    "ConvertReport": "lorakit.convert.report",
    "convert": "lorakit.convert.convert",
    "LorakitError": "lorakit.errors",
    "MergeReport": "lorakit.merge.report",
    "merge": "lorakit.merge.merge",
    "UnmergeReport": "lorakit.merge.unmerge",
    "unmerge": "lorakit.merge.unmerge",
    "VerifyReport": "lorakit.merge.verify",
    "verify": "lorakit.merge.verify",
    "ExtractReport": "lorakit.mix.extraction.report",
    "extract": "lorakit.mix.extraction.extract",
    "MixReport": "lorakit.adapters.report",
    "mix": "lorakit.mix.mix",
    "SearchReport": "lorakit.mix.search",
    "search": "lorakit.mix.search",
    "shrink": "lorakit.mix.shrink",
    "CompareReport": "lorakit.mix.compare",
    "compare": "lorakit.mix.compare",
    "DiffReport": "lorakit.mix.diff",
    "diff": "lorakit.mix.diff",
    "TensorsReport": "lorakit.mix.diff_tensors",
    "diff_tensors": "lorakit.mix.diff_tensors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lorakit' has no attribute '{name}'")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps `lorakit.merge` the function: importing the folder of that name would put the folder in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
