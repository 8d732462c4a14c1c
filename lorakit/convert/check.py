"""Would vLLM serve this adapter, and would it be right? The verdict, without starting anything.

vLLM itself answers 200 with the base's text, or with garbage, for adapters whose names or sizes don't fit the base, and
keeps what it failed to load half registered; so an engine sees only what passed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.config import beyond_plain_lora
from lorakit.adapters.delta import Delta
from lorakit.adapters.keys import factor_name, is_base_copy, parse_key
from lorakit.files.finite import Content
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import FLOATS
from lorakit.merge.base import BaseModel
from lorakit.merge.copies import equal_values
from lorakit.merge.layers import is_transposed
from lorakit.merge.resolve import Resolver, copied_from_base

MERGE = "merge it into its base (lorakit merge), and serve that"
ORDER = ("features", "factors", "tensors", "dtype", "rank", "modules", "shapes")
OTHER_BASE = "serve it beside the base that it was trained on"


@dataclass(frozen=True, slots=True)
class Check:
    """One question and its answer: None where it can't be answered. `cure` says what helps where it is no."""

    name: str
    ok: bool | None
    reason: str | None = None
    cure: str | None = None

    @property
    def problem(self) -> str | None:
        """What forbids serving, and what helps, in one line."""
        if self.ok is not False:
            return None
        return f"{self.reason}: {self.cure}" if self.cure else self.reason


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answers, several of one name where several things are wrong, and `repairs`: what has to be written anew,
    exactly, before it is served.

    `rename` gives modules the names that the base has for them; `applied` modules would change what the base says.
    """

    checks: tuple[Check, ...] = ()
    repairs: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    applied: int | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        """What forbids serving, each with its cure."""
        return tuple(problem for check in self.checks if (problem := check.problem))


def check_adapter(adapter: Adapter, base: BaseModel | None, *, max_rank: int | None = None) -> Verdict:
    """Judge an adapter by its config, its names and shapes, and the base's; without a base, what can be without."""
    features = _features(adapter)
    others = _other_tensors(adapter, base, explained=bool(features))
    placed = _placed(adapter.deltas, base) if base else _Placed()
    wrong = [*features, *others, *_dtypes(adapter.deltas), *_rank(adapter, max_rank), *placed.problems]
    if not adapter.deltas and not wrong:
        wrong.append(Check("factors", False, "it holds no low-rank factors", "look at what its trainer saved"))
    unknown = None if base is None else True
    fine = [
        Check("features", True, "plain LoRA, which every vLLM has"),
        Check("tensors", unknown if _copies(adapter) else True, "nothing but what belongs to a LoRA"),
    ]
    if adapter.deltas:
        fine += [
            Check("dtype", True, ", ".join(sorted(_stored_dtypes(adapter.deltas)))),
            Check("rank", True, f"rank {adapter.rank}" + (f", and {max_rank} is allowed" if max_rank else "")),
            Check("modules", unknown, "all are in the base" if base else "no base to look them up in"),
            Check("shapes", unknown, "all fit the base's" if base else "no base to compare them with"),
        ]
    answered = {check.name for check in wrong}
    checks = sorted((*wrong, *(c for c in fine if c.name not in answered)), key=lambda check: ORDER.index(check.name))
    repairs = [] if wrong else _repairs(adapter, placed.rename)
    return Verdict(tuple(checks), tuple(repairs), placed.rename, placed.applied)


def check_numbers(content: Content) -> Check:
    """Whether every number is one."""
    if content.not_finite is None:
        return Check("finite", True, "no NaN and no infinity")
    reason = f"'{content.not_finite}' holds NaN or infinity"
    return Check("finite", False, reason, "the training diverged; use an earlier checkpoint")


def _features(adapter: Adapter) -> list[Check]:
    return [
        Check("features", False, f"vLLM serves no adapter with {feature}", MERGE)
        for feature in beyond_plain_lora(adapter.config).values()
    ]


def _rank(adapter: Adapter, max_rank: int | None) -> list[Check]:
    if max_rank is None or not adapter.deltas or adapter.rank <= max_rank:
        return []
    reason = f"it has rank {adapter.rank}, but --max-lora-rank is {max_rank}"
    cure = f"shrink it (lorakit shrink … --rank {max_rank}), or start the server with --max-lora-rank {adapter.rank}"
    return [Check("rank", False, reason, cure)]


def _stored_dtypes(deltas: Mapping[str, Delta]) -> set[str]:
    return {stored.dtype for delta in deltas.values() for term in delta.stored for stored in (term.A, term.B)}


def _dtypes(deltas: Mapping[str, Delta]) -> list[Check]:
    for delta in deltas.values():
        for term in delta.stored:
            if term.A.dtype not in FLOATS or term.B.dtype not in FLOATS:
                reason = f"'{term.A.name}' is stored as {term.A.dtype}"
                return [Check("dtype", False, reason, "save the adapter in bf16, fp16 or fp32")]
    return []


def _copies(adapter: Adapter) -> list[StoredTensor]:
    """PEFT's copies of the base's values."""
    return [stored for stored in adapter.others if copied_from_base(stored.name) and is_base_copy(stored.name)]


def _other_tensors(adapter: Adapter, base: BaseModel | None, *, explained: bool) -> list[Check]:
    """What is no factor: PEFT's copy of the base's embedding is no news, anything else was trained.

    `explained`: the config says already what those others are for.
    """
    found: list[Check] = []
    copies = {stored.name for stored in _copies(adapter)}
    biases = [stored for bias in adapter.biases.values() for stored, _ in bias.parts]
    rest = [stored.name for stored in (*adapter.others, *biases) if stored.name not in copies]
    if base is not None:
        resolver = Resolver(base.tensors)
        for stored in _copies(adapter):
            name = resolver.tensor_of(copied_from_base(stored.name) or "")
            if name is None:
                rest.append(stored.name)
            else:
                found += _copy_of(stored, base.tensors[name])
    if rest and not explained:
        shown = ", ".join(rest[:3]) + (f" and {len(rest) - 3} more" if len(rest) > 3 else "")
        found.append(Check("tensors", False, f"it holds tensors that no LoRA has ({shown}): vLLM refuses it", MERGE))
    return found


def _copy_of(stored: StoredTensor, own: StoredTensor) -> list[Check]:
    if stored.shape != own.shape:
        reason = f"its copy of '{own.name}' is {list(stored.shape)}, the base's is {list(own.shape)}"
        return [Check("tensors", False, reason, f"the vocabulary was resized, so {MERGE}")]
    if not equal_values(stored, own):
        reason = f"its copy of '{own.name}' differs from the base's: it was made for another base"
        return [Check("tensors", False, reason, OTHER_BASE)]
    return []


@dataclass(frozen=True, slots=True)
class _Placed:
    """What the base calls the modules, what does not fit it, and how many do; None without a base."""

    rename: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[Check, ...] = ()
    applied: int | None = None


def _placed(deltas: Mapping[str, Delta], base: BaseModel) -> _Placed:
    resolver = Resolver(base.tensors)
    rename: dict[str, str] = {}
    missing: list[str] = []
    misfits: list[str] = []
    for module, delta in deltas.items():
        found = resolver.weight_of(module)
        if found is None:
            if not (base.quantised and any(name.startswith(f"{module}.") for name in base.tensors)):
                missing.append(module)
            continue
        if found != f"{module}.weight":
            rename[module] = found.removesuffix(".weight")
        if not base.quantised and not _fits(delta, base.tensors[found], base):
            misfits.append(
                f"'{module}' is for a weight {list(delta.shape)}, the base's '{found}' is "
                f"{list(base.tensors[found].shape)}"
            )
    problems = (*_misfits(misfits), *_missing(missing, len(deltas), resolver))
    return _Placed(rename, problems, len(deltas) - len(missing) - len(misfits))


def _misfits(found: list[str]) -> Iterable[Check]:
    if found:
        more = f", and {len(found) - 1} more don't fit" if len(found) > 1 else ""
        yield Check("shapes", False, f"{found[0]}{more}: the adapter was made for another base", OTHER_BASE)


def _missing(modules: list[str], every: int, resolver: Resolver) -> Iterable[Check]:
    if modules:
        near = resolver.nearest(modules[0], 1)
        nearest = f"; nearest: '{near[0]}'" if near else ""
        reason = f"the base has no weight for {len(modules)} of its {every} modules ('{modules[0]}'{nearest})"
        yield Check("modules", False, f"{reason}: the adapter was made for another base", OTHER_BASE)


def _fits(delta: Delta, weight: StoredTensor, base: BaseModel) -> bool:
    return weight.shape == (delta.shape[::-1] if is_transposed(weight.name, base) else delta.shape)


def _repairs(adapter: Adapter, rename: Mapping[str, str]) -> list[str]:
    config, found = adapter.config, []
    odd = [
        stored.name
        for module, delta in adapter.deltas.items()
        for term in delta.stored
        for stored in (term.A, term.B)
        if stored.name != factor_name(module, parse_key(stored.name).part)
    ]
    if odd:
        found.append(f"raw tensor names ('{odd[0]}')")
    if rename:
        module = next(iter(rename))
        found.append(f"moved names ('{module}' is '{rename[module]}' in the base)")
    if config.rank_pattern or config.alpha_pattern:
        found.append("rank_pattern and alpha_pattern, which vLLM before 0.32 ignores")
    if any(config.raw.get(name) is None for name in ("lora_alpha", "target_modules")):
        found.append("a config without lora_alpha or target_modules")
    return found
