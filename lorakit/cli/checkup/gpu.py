"""GPUs, their driver, and whether this torch can use them."""

from __future__ import annotations

import csv
import ctypes
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lorakit.cli.checkup.finding import Finding
from lorakit.cli.checkup.software import Torch

NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.free", "--format=csv,noheader,nounits")


@dataclass(frozen=True, slots=True)
class Gpu:
    """Memory in MiB."""

    name: str
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Driver:
    """NVIDIA's: its version, and the newest CUDA that it runs; empty where it does not say."""

    version: str
    cuda: tuple[int, ...]


def of_gpu(gpus: Sequence[Gpu], driver: Driver | None, torch: Torch | None, visible: str | None) -> Finding:
    """`visible` is CUDA_VISIBLE_DEVICES, None where it is not set."""
    if not gpus and driver is None:
        if torch is not None and torch.usable:
            return Finding("GPU", "ok", f"torch finds one (ROCm {torch.hip})")
        return Finding("GPU", "ok", "none: lorakit computes on the CPU, and serves with vLLM's build for it")
    what = ", ".join(f"{gpu.name} ({gpu.free / 1024:.1f} of {gpu.total / 1024:.1f} GiB free)" for gpu in gpus)
    runs = f", up to CUDA {'.'.join(map(str, driver.cuda))}" if driver and driver.cuda else ""
    what = f"{what or 'none that the driver shows'}; driver {driver.version if driver else 'unknown'}{runs}"
    if torch is None or torch.usable:
        return Finding("GPU", "ok", what)
    if visible is not None and visible.strip() in ("", "-1"):
        return Finding(
            "GPU", "warning", what, f"CUDA_VISIBLE_DEVICES='{visible}' hides it", "unset CUDA_VISIBLE_DEVICES"
        )
    if torch.cuda is None:
        why = f"this torch ({torch.version}) was built without CUDA, and can't use it"
        return Finding("GPU", "warning", what, why, "pip install torch from https://download.pytorch.org/whl/")
    if driver and driver.cuda and _numbers(torch.cuda)[:1] > driver.cuda[:1]:
        why = f"torch was built for CUDA {torch.cuda}, which is too new for this driver"
        major = driver.cuda[0]
        return Finding("GPU", "problem", what, why, f"upgrade the driver, or install torch for CUDA {major}.x")
    why = f"torch can't use it: {torch.why_not or 'it does not say why'}"
    return Finding("GPU", "problem", what, why, "see that nvidia-smi works here, in a container with --gpus all")


def parsed_gpus(lines: Sequence[str]) -> tuple[list[Gpu], str]:
    """What nvidia-smi lists, and the driver's version."""
    rows = [[word.strip() for word in row] for row in csv.reader(lines)]
    rows = [row for row in rows if len(row) == 4]
    return [Gpu(name, _whole(total), _whole(free)) for name, _, total, free in rows], rows[0][1] if rows else ""


def gpus_here() -> tuple[list[Gpu], Driver | None]:
    """What the driver says; nothing where there is none."""
    lines: list[str] = []
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=20, check=True)
        lines = done.stdout.splitlines()
    gpus, version = parsed_gpus(lines)
    cuda = _cuda_of_driver()
    if not version:
        with suppress(OSError, IndexError):
            version = Path("/proc/driver/nvidia/version").read_text().split("Kernel Module")[1].split()[0]
    return gpus, Driver(version or "unknown", cuda) if version or cuda else None


def visible_here() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def _cuda_of_driver() -> tuple[int, ...]:
    try:
        library, found = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(found)) != 0:
            return ()
    except (OSError, AttributeError):
        return ()
    return found.value // 1000, found.value % 1000 // 10


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _whole(text: str) -> int:
    return int(text) if text.isdigit() else 0
