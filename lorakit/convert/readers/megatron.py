"""Megatron's and NeMo's distributed checkpoints, exported by NVIDIA's Megatron-Bridge where that is installed.

Its layouts change with each kind of parallelism and each version of Megatron-Core, which the bridge follows. Of it one
call is used: AutoBridge.from_hf_pretrained(BASE).export_ckpt(CHECKPOINT, OUT), in a process of its own.
"""

from __future__ import annotations

import atexit
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from lorakit.convert.described import is_described
from lorakit.convert.readers import huggingface
from lorakit.convert.readers.torch_files import without_ema
from lorakit.convert.source import Source
from lorakit.errors import LorakitError, Refused
from lorakit.files.plain_yaml import read_yaml

_PROGRAM = """
import sys
from megatron.bridge import AutoBridge
base, checkpoint, out = sys.argv[1:]
AutoBridge.from_hf_pretrained(base).export_ckpt(megatron_path=checkpoint, hf_path=out)
"""
_ITERATION = re.compile(r"iter_(\d{1,18})")
_LINES = 5  # of what a failed export said


def read(path: Path, *, weights: str = "model") -> Source:
    """Export the checkpoint into a folder of its own, which is gone when this process ends, and open that. What is read
    there is as large as the model: TMPDIR says where.

    Raises:
        Refused: Megatron-Bridge is not installed, or the checkpoint doesn't say which base it was made from.
        LorakitError: the export failed.
    """
    without_ema(path, weights)
    checkpoint = newest_iteration(path)
    base = _base_of(checkpoint) or _base_of(path)
    by_hand = (
        f"from megatron.bridge import AutoBridge; AutoBridge.from_hf_pretrained({base or 'BASE'!r})"
        f".export_ckpt({str(checkpoint)!r}, 'exported')"
    )
    if not _is_installed():
        raise Refused(
            f"'{path}' is a checkpoint of Megatron, which Megatron-Bridge exports: pip install 'lorakit[megatron]', or "
            f"run this where it is installed, and convert 'exported': python -c \"{by_hand}\""
        )
    if base is None:
        raise Refused(f"'{path}' does not say which model of Hugging Face's it is: python -c \"{by_hand}\"")
    out = Path(mkdtemp(prefix="lorakit-megatron-"))
    atexit.register(shutil.rmtree, out, ignore_errors=True)
    _export(base, checkpoint, out / "exported")
    return huggingface.read(out / "exported")


def newest_iteration(path: Path) -> Path:
    """The `iter_N` of a run with the largest N, or the path itself."""
    found = [(int(match[1]), entry) for entry in path.iterdir() if (match := _ITERATION.fullmatch(entry.name))]
    return max(found)[1] if found else path


def _is_installed() -> bool:
    try:
        return find_spec("megatron.bridge") is not None
    except ModuleNotFoundError:  # not even `megatron`
        return False


def _base_of(folder: Path) -> str | None:
    """What `run_config.yaml` calls `hf_model_id`, wherever in it; else the folder, where it has a config.json."""
    file = folder / "run_config.yaml"
    said = _found(read_yaml(file), "hf_model_id") if file.is_file() else None
    if said is not None:
        return said
    return str(folder) if is_described(folder) else None


def _found(settings: Mapping[str, Any], key: str) -> str | None:
    """The text that stands under this key, at the least depth."""
    waiting: list[Any] = [settings]
    seen: set[int] = set()  # YAML may name one mapping in many places
    for value in waiting:
        if isinstance(value, Mapping) and id(value) not in seen:
            seen.add(id(value))
            own = value.get(key)
            if isinstance(own, str) and own:
                return own
            waiting += value.values()
    return None


def _export(base: str, checkpoint: Path, out: Path) -> None:
    command = [sys.executable, "-c", _PROGRAM, base, str(checkpoint), str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode or not huggingface.is_model_folder(out):
        said = " | ".join(done.stdout.strip().splitlines()[-_LINES:]) or "it said nothing"
        raise LorakitError(f"Megatron-Bridge could not export '{checkpoint}' as {base}: {said}")
