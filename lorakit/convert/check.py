"""Would vLLM serve this adapter, and would it be right? The verdict, without starting anything.

vLLM itself answers 200 with the base's text, or with garbage, for adapters whose names or sizes don't fit the base, and
keeps what it failed to load half registered; so an engine sees only what passed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.delta import Delta, Term
from lorakit.adapters.keys import factor_name, parse_key
from lorakit.convert.adapters.plain_form import BaseView, PlainForm, plain_form, view_of
from lorakit.convert.adapters.served_layers import not_served
from lorakit.convert.answers import MERGE, OTHER_BASE, Check
from lorakit.convert.right_base import right_base
from lorakit.files.finite import Content
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import FLOATS
from lorakit.merge.base import BaseModel
from lorakit.merge.layers import is_transposed
from lorakit.merge.resolve import Resolver

__all__ = ["Check", "Verdict", "check_adapter", "check_numbers"]

ORDER = ("base", "readable", "features", "factors", "tensors", "dtype", "rank", "modules", "shapes")
LARGEST = 512  # the largest rank that vLLM serves at all


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answers, several of one name where several things are wrong, and `repairs`: what has to be written anew,
    exactly, before it is served.

    `plain` is what to write then, and `rename` gives its modules the names that the base has for them; `copies` are the
    tensors that it does without, as they equal the base's. Of its `modules`, `applied` would change what the base says.
    What is `stacked` is served as it is, and can't be written anew. `rank` is what an engine has to allow.
    """

    checks: tuple[Check, ...] = ()
    repairs: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    modules: int = 0
    applied: int | None = None
    plain: Adapter | None = None
    copies: tuple[str, ...] = ()
    stacked: tuple[str, ...] = ()
    rank: int = 0

    @property
    def problems(self) -> tuple[str, ...]:
        """What forbids serving, each with its cure."""
        return tuple(problem for check in self.checks if (problem := check.problem))

    @property
    def open_questions(self) -> tuple[str, ...]:
        """Why it is not known whether it may be served, and what helps."""
        return tuple(question for check in self.checks if (question := check.question))


def check_adapter(
    adapter: Adapter, base: BaseModel | None, *, max_rank: int | None = None, engine: str = "vllm"
) -> Verdict:
    """Judge an adapter by its config, its names and shapes, and the base's; without a base, what can be without.

    Of another `engine` than vLLM nothing is known here of the layers and ranks that it takes.
    """
    view = None if base is None else view_of(base)
    form = plain_form(adapter, view, engine=engine)
    deltas = form.adapter.deltas
    placed = _placed(deltas, view) if view else _Placed()
    others = [*not_served(deltas, base.config)] if base and engine == "vllm" else []
    ranks = _rank(form, max_rank) if engine == "vllm" or max_rank is not None else []
    found = [*form.obstacles, *others, *_dtypes(adapter), *ranks, *placed.problems]
    if base is not None:
        found.append(right_base(adapter, base))
    # PEFT looks for modules by their paths in memory, which are those that the adapter has
    rename = {} if engine == "peft" else placed.rename
    repairs = [*form.steps, *_repairs(adapter, rename)]
    if form.stacked and repairs:
        reason = f"beside factors of all experts at once it has {repairs[0]}"
        found.append(Check("features", False, reason, MERGE))
    wrong = [check for check in found if check.ok is False]
    if not deltas and not wrong and not form.obstacles and not form.stacked:
        found.append(Check("factors", False, "it holds no low-rank factors", "look at what its trainer saved"))
        wrong = found[-1:]
    fine = _fine(form, adapter, max_rank, known=base is not None)
    answered = {check.name for check in found}
    checks = sorted((*found, *(c for c in fine if c.name not in answered)), key=lambda check: ORDER.index(check.name))
    applied = None if placed.applied is None else placed.applied + len(form.stacked)
    return Verdict(
        tuple(checks), () if wrong else tuple(repairs), rename, len(deltas) + len(form.stacked), applied,
        form.adapter, form.copies, form.stacked, form.rank,
    )  # fmt: skip


def _fine(form: PlainForm, adapter: Adapter, max_rank: int | None, *, known: bool) -> list[Check]:
    """What is said where nothing is wrong."""
    unknown = True if known else None
    fine = [
        Check("features", True, "plain LoRA, which every vLLM has"),
        Check("tensors", True, "nothing but what belongs to a LoRA"),
    ]
    if form.adapter.deltas or form.stacked:
        fine += [
            Check("dtype", True, ", ".join(sorted({stored.dtype for stored in _stored(adapter)}))),
            Check("rank", True, f"rank {form.rank}" + (f", and {max_rank} is allowed" if max_rank else "")),
            Check("modules", unknown, "all are in the base" if known else "no base to look them up in"),
            Check("shapes", unknown, "all fit the base's" if known else "no base to compare them with"),
        ]
    return fine


def check_numbers(content: Content) -> Check:
    """Whether every number is one."""
    if content.not_finite is None:
        return Check("finite", True, "no NaN and no infinity")
    reason = f"'{content.not_finite}' holds NaN or infinity"
    return Check("finite", False, reason, "the training diverged; use an earlier checkpoint")


def _rank(form: PlainForm, max_rank: int | None) -> list[Check]:
    rank = form.rank
    limit = LARGEST if max_rank is None else max_rank
    if rank <= limit:
        return []
    terms = [term for delta in form.adapter.deltas.values() for term in delta.terms]
    stored = any(isinstance(term, Term) and term.rank == rank for term in terms)
    found = f"it has rank {rank}" if stored else f"exactly as plain LoRA it has rank {rank}"
    shrink = f"shrink it (lorakit convert … --rank {limit}, or lorakit shrink … --rank {limit})"
    if form.stacked:  # which nothing shrinks
        shrink = MERGE
    if max_rank is None or rank > LARGEST:
        return [Check("rank", False, f"{found}, and vLLM serves {LARGEST} at most", shrink)]
    cure = f"{shrink}, or start the server with --max-lora-rank {rank}"
    return [Check("rank", False, f"{found}, but --max-lora-rank is {max_rank}", cure)]


def _stored(adapter: Adapter) -> Iterable[StoredTensor]:
    """What its factors are made from."""
    terms = [term for delta in adapter.deltas.values() for term in delta.stored]
    return [stored for term in terms for stored in (term.A, term.B)] or adapter.others


def _dtypes(adapter: Adapter) -> list[Check]:
    for stored in _stored(adapter):
        if stored.dtype not in FLOATS and adapter.deltas:
            reason = f"'{stored.name}' is stored as {stored.dtype}"
            return [Check("dtype", False, reason, "save the adapter in bf16, fp16 or fp32")]
    return []


@dataclass(frozen=True, slots=True)
class _Placed:
    """What the base calls the modules, what does not fit it, and how many do; None without a base."""

    rename: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[Check, ...] = ()
    applied: int | None = None


def _placed(deltas: Mapping[str, Delta], view: BaseView) -> _Placed:
    base, resolver = view.model.base, view.resolver
    rename: dict[str, str] = {}
    missing: list[str] = []
    misfits: list[str] = []
    for module, delta in deltas.items():
        found = resolver.weight_of(module)
        if found is None:
            if view.shapes_known or not any(name.startswith(f"{module}.") for name in base.tensors):
                missing.append(module)
            continue
        if found != f"{module}.weight":
            rename[module] = found.removesuffix(".weight")
        if view.shapes_known and not _fits(delta, view.tensors[found], found, base):
            misfits.append(
                f"'{module}' is for a weight {list(delta.shape)}, the base's '{found}' is "
                f"{list(view.tensors[found].shape)}"
            )
    twice = _meant_twice(deltas, rename)
    problems = (*_misfits(misfits), *_missing(missing, len(deltas), resolver), *twice)
    untrained = sum(delta.known_rank == 0 for delta in deltas.values())
    return _Placed(rename, problems, len(deltas) - len(missing) - len(misfits) - untrained)


def _meant_twice(deltas: Mapping[str, Delta], rename: Mapping[str, str]) -> Iterable[Check]:
    taken: dict[str, str] = {}
    for module in deltas:
        name = rename.get(module, module)
        if name in taken:
            reason = f"'{module}' and '{taken[name]}' both mean '{name}' of the base"
            yield Check("modules", False, reason, "save it anew from one class of the model")
            return
        taken[name] = module


def _misfits(found: list[str]) -> Iterable[Check]:
    if found:
        more = f", and {len(found) - 1} more don't fit" if len(found) > 1 else ""
        yield Check("shapes", False, f"{found[0]}{more}: the adapter was made for another base", OTHER_BASE)


def _missing(modules: list[str], every: int, resolver: Resolver) -> Iterable[Check]:
    if not modules:
        return
    missing = f"the base has no weight for {len(modules)} of its {every} modules ('{modules[0]}'"
    if otherwise := resolver.stored_otherwise(modules[0]):
        cure = "train it on layers as the base has them"
        yield Check("modules", False, f"{missing}): {otherwise}, and the sizes of its parts are not known here", cure)
        return
    near = resolver.nearest(modules[0], 1)
    nearest = f"; nearest: '{near[0]}'" if near else ""
    yield Check("modules", False, f"{missing}{nearest}): the adapter was made for another base", OTHER_BASE)


def _fits(delta: Delta, weight: StoredTensor, name: str, base: BaseModel) -> bool:
    return weight.shape == (delta.shape[::-1] if is_transposed(name, base) else delta.shape)


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
    if config.peft_type != "LORA":
        return found
    if config.rank_pattern or config.alpha_pattern:
        found.append("rank_pattern and alpha_pattern, which vLLM before 0.32 ignores")
    if any(config.raw.get(name) is None for name in ("lora_alpha", "target_modules")):
        found.append("a config without lora_alpha or target_modules")
    return found
