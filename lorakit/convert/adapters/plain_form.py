"""An adapter of any kind as plain LoRA on the layers of its base, where that is exactly the same; and where it is not,
why, and what helps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.as_lora import NEEDS_SHAPES, NOT_APPROXIMATED
from lorakit.adapters.config import AdapterConfig, beyond_plain_lora
from lorakit.adapters.delta import Delta, Made
from lorakit.adapters.keys import base_path, is_base_copy, parse_key
from lorakit.adapters.trained import CLASSIFIERS, Rows, spellings_of, trained_of
from lorakit.convert.adapters.regrouped import regrouped
from lorakit.convert.adapters.served_layers import STACKED_EXPERTS, architecture_of
from lorakit.convert.adapters.token_rows import on_embedding, on_head, row_changes
from lorakit.convert.answers import MERGE, NEAR, OTHER_BASE, PEFT, Check
from lorakit.convert.targets import target_named
from lorakit.errors import InvalidFile, Refused, UnsupportedAdapter, WrongBase
from lorakit.files.safetensors import StoredTensor
from lorakit.merge.base import BaseModel
from lorakit.merge.copies import equal_values
from lorakit.merge.features import REPRODUCIBLE
from lorakit.merge.layers import HEADS, input_embedding, is_transposed, layer_of
from lorakit.merge.model import Model, model_for
from lorakit.merge.resolve import Resolver, copied_from_base
from lorakit.mix.opened import opened

if TYPE_CHECKING:
    import torch

_IGNORED = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")  # by vLLM, which refuses other tables
_KEPT = ("revision", "task_type", "ensure_weight_tying")  # of a config, as all else is in the factors then
_CONVERSION = "save it anew with PEFT's path_initial_model_for_weight_conversion, which makes it plain"
_CLASSIFIER = f"{MERGE}; its base is the classifier that was trained, which holds one, not the language model"
_CURES: Mapping[str, str] = {
    **dict.fromkeys(("use_dora", "modules_to_save"), NEAR),
    **dict.fromkeys(("alora_invocation_tokens", "kasa_config", "arrow_config", "use_bdlora"), PEFT),
}


@dataclass(frozen=True, slots=True)
class PlainForm:
    """`adapter` holds deltas alone, by the layers of the base; `steps` are what was done for it, in words, and `copies`
    the tensors that equal the base's, which it does without.

    With `obstacles` it is what is left without them. `stacked`: there are factors of all experts at once besides, which
    vLLM takes as they are, and which nothing here can write anew; by their modules.
    """

    adapter: Adapter
    steps: tuple[str, ...] = ()
    obstacles: tuple[Check, ...] = ()
    copies: tuple[str, ...] = ()
    stacked: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The largest of any module, of stacks too."""
        return max(self.adapter.rank, self.adapter.config.rank if self.stacked else 0)


@dataclass(slots=True)
class _Work:
    """What is found on the way."""

    deltas: dict[str, Delta]
    features: dict[str, str]
    engine: str
    steps: list[str] = field(default_factory=list)
    obstacles: list[Check] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)  # tensors that equal the base's
    unknown: list[str] = field(default_factory=list)  # tensors that nothing explains
    stacked: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BaseView:
    """The base as its adapters name it: its tensors, a tied head among them, and what finds them."""

    model: Model
    resolver: Resolver
    shapes_known: bool

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        return self.model.tensors


def view_of(base: BaseModel) -> BaseView:
    """Through the quantisation of a quantised base, where its format is known."""
    try:
        model = model_for(base, ())
    except Refused:
        model = Model(base, dict(base.tensors))
    return BaseView(model, Resolver(model.tensors), not base.quantised or bool(model.quantised))


def plain_form(adapter: Adapter, view: BaseView | None, *, engine: str = "vllm") -> PlainForm:
    """Without a base, as far as that can be said without; what needs one is an answer that is not known."""
    if adapter.config.peft_type != "LORA":
        lora = _other_method(adapter, view, engine)
        if isinstance(lora, Check):
            return PlainForm(adapter, (), (lora,))
        work = _Work(dict(lora.deltas), beyond_plain_lora(lora.config), engine)
        work.steps.append(f"peft_type {adapter.config.peft_type}, as the plain factors that it is equal to")
    else:
        lora, work = adapter, _Work(dict(adapter.deltas), beyond_plain_lora(adapter.config), engine)
    _other_tensors(lora, view, work)
    if view is not None:
        _named_as_the_base(lora.config, view, work)
    for feature, words in work.features.items():
        work.obstacles.append(_obstacle(lora.config, feature, words, engine))
    if work.unknown and not work.features:
        shown = ", ".join(work.unknown[:3]) + (f" and {len(work.unknown) - 3} more" if len(work.unknown) > 3 else "")
        reason = f"it holds tensors that no LoRA has ({shown}): vLLM refuses it"
        work.obstacles.append(Check("tensors", False, reason, NEAR))
    config = replace(lora.config, raw={name: lora.config.raw[name] for name in _KEPT if name in lora.config.raw})
    plain = replace(lora, deltas=work.deltas, others=(), biases={}, config=config, own_ranks=False, reported=None)
    return PlainForm(plain, tuple(work.steps), tuple(work.obstacles), tuple(work.copies), work.stacked)


def _other_method(adapter: Adapter, view: BaseView | None, engine: str) -> Adapter | Check:
    kind = adapter.config.peft_type
    if kind == "TRAINABLE_TOKENS":  # trained rows, and nothing else
        return replace(adapter, config=replace(adapter.config, peft_type="LORA"))
    if view is None and kind in NEEDS_SHAPES:
        return Check("features", None, f"{kind} says what it changes with the sizes of the base", "name it with --base")
    try:
        return opened(adapter, None if view is None else view.model.base)
    except UnsupportedAdapter:
        cure = NOT_APPROXIMATED[kind][1] if kind in NOT_APPROXIMATED else NEAR
        return Check("features", False, _not_served(engine, f"peft_type {kind}"), cure)
    except (InvalidFile, WrongBase) as error:
        return Check("readable", False, _without_folder(error, adapter), "look at what its trainer saved")


def _not_served(engine: str, words: str) -> str:
    if engine == "peft":
        return f"no plain LoRA has {words}"
    return f"{target_named(engine).server} serves no adapter with {words}"


def _obstacle(config: AdapterConfig, feature: str, words: str, engine: str) -> Check:
    cure = _CURES.get(feature, MERGE)
    if feature == "modules_to_save" and set(config.raw.get(feature) or ()) & set(CLASSIFIERS):
        cure = _CLASSIFIER
    if feature == "init_lora_weights":
        cure = NEAR if str(config.raw.get(feature)).lower() in REPRODUCIBLE else _CONVERSION
    return Check("features", False, _not_served(engine, words), cure)


def _without_folder(error: Exception, adapter: Adapter) -> str:
    """A server checks a copy, whose place says nothing to anybody."""
    return str(error).replace(f"'{adapter.files()[0].folder}", "'its folder")


# what is no factor


def _other_tensors(adapter: Adapter, view: BaseView | None, work: _Work) -> None:
    try:
        trained, rest = trained_of(adapter.config, adapter.others, adapter.name)
    except InvalidFile as error:
        work.obstacles.append(
            Check("tensors", False, _without_folder(error, adapter), "look at what its trainer saved")
        )
        return
    pairs: dict[str, dict[str, StoredTensor]] = {}
    for stored in rest:
        key = parse_key(stored.name)
        if key.part in ("lora_A", "lora_B"):
            pairs.setdefault(key.module, {})[key.part] = stored
        elif key.part == "lora_magnitude_vector":
            work.features.setdefault("use_dora", "lora_magnitude_vector")
        else:
            _take_copy(stored, view, work)
    work.unknown += [stored.name for bias in adapter.biases.values() for stored, _ in bias.parts]
    _take_trained(adapter.config, [blend.parts[0][0] for blend in trained.tensors.values()], view, work)
    if trained.rows:
        _take_rows(trained.rows, view, work)
    if pairs:
        _take_experts(adapter, pairs, view, work)
    elif work.deltas and "target_parameters" in work.features:
        del work.features["target_parameters"]
        _add_step(work, "target_parameters that are weights of linear layers")


def _take_copy(stored: StoredTensor, view: BaseView | None, work: _Work) -> None:
    """PEFT's copy of the base's values is no news, unless it is of another base; anything else was trained."""
    own = None if view is None else _base_tensor(stored, view)
    if view is None and is_base_copy(stored.name) and copied_from_base(stored.name):
        work.obstacles.append(Check("tensors", None, f"'{stored.name}' may be a copy of its base's"))
    elif own is None:
        work.unknown.append(stored.name)
    elif stored.shape != own.shape:
        reason = f"its copy of '{own.name}' is {list(stored.shape)}, the base's is {list(own.shape)}"
        work.obstacles.append(Check("tensors", False, reason, f"the vocabulary was resized, so {MERGE}"))
    elif equal_values(stored, own):
        work.copies.append(stored.name)
        if not stored.name.endswith(_IGNORED):
            _add_step(work, "copies of the base's own tensors, which vLLM takes for adapters")
    elif is_base_copy(stored.name):
        reason = f"its copy of '{own.name}' differs from the base's: it was made for another base"
        work.obstacles.append(Check("tensors", False, reason, OTHER_BASE))
    else:
        work.unknown.append(stored.name)


def _base_tensor(stored: StoredTensor, view: BaseView) -> StoredTensor | None:
    name = view.resolver.tensor_of(base_path(stored.name))
    return None if name is None or name in view.model.quantised else view.tensors[name]


def _add_step(work: _Work, words: str) -> None:
    if words not in work.steps:
        work.steps.append(words)


def _take_trained(config: AdapterConfig, tensors: list[StoredTensor], view: BaseView | None, work: _Work) -> None:
    """Tensors in the place of the base's: what equals the base's changes nothing; the others are an obstacle."""
    features = {feature for feature in ("modules_to_save", "bias") if feature in work.features}
    changed = []
    for stored in tensors:
        own = None if view is None else _base_tensor(stored, view)
        if own is None or own.shape != stored.shape or not equal_values(stored, own):
            changed.append(stored)
        else:
            work.copies.append(stored.name)
    for feature in features:
        if feature == "bias" and not any(stored.name.endswith(".bias") for stored in changed):
            work.features.pop(feature)
            _add_step(work, f"bias '{config.raw['bias']}', of which nothing was trained")
        elif feature == "modules_to_save" and not changed and _are_there(config, tensors):
            work.features.pop(feature)
            _add_step(work, "modules_to_save, which equal the base's")
    if changed and not work.features.keys() & {"modules_to_save", "bias"}:
        work.unknown += [stored.name for stored in changed]


def _are_there(config: AdapterConfig, tensors: list[StoredTensor]) -> bool:
    names = [f".{base_path(stored.name)}" for stored in tensors]
    saved = [spellings_of(module) for module in config.raw.get("modules_to_save") or ()]
    return all(any(f".{module}." in name for module in spellings for name in names) for spellings in saved)


def _take_rows(rows: Mapping[str, Rows], view: BaseView | None, work: _Work) -> None:
    work.features.pop("trainable_token_indices", None)
    if view is None:
        work.obstacles.append(Check("features", None, "its trained rows are to be compared with the base's"))
        return
    apart = len(rows) > 1  # a tied head follows its embedding, unless it has rows of its own
    for module, trained in rows.items():
        name = view.resolver.weight_of(module)
        if name is None or name in view.model.quantised or module in work.deltas:
            reason = f"the rows of '{module}' are for no embedding of the base that has no other factors"
            work.obstacles.append(Check("modules", False, reason, MERGE))
            continue
        try:
            indices, changes = row_changes(trained, view.tensors[name])
        except InvalidFile as error:
            work.obstacles.append(Check("shapes", False, str(error), OTHER_BASE))
            continue
        if indices:
            work.deltas |= _row_deltas(view, name, indices, changes, apart=apart)
        _add_step(work, "trained rows of an embedding (trainable_token_indices), as factors of one rank a row")


def _row_deltas(
    view: BaseView, name: str, rows: tuple[int, ...], changes: torch.Tensor, *, apart: bool
) -> dict[str, Delta]:
    count, model = view.tensors[name].shape[0], view.model
    if name == model.head or layer_of(name) in HEADS:
        found = {name: on_head(rows, changes, count)}
    else:
        found = {name: on_embedding(rows, changes, count)}
        if name == model.embedding and model.head is not None and not apart:
            found[model.head] = on_head(rows, changes, count)
    return {weight.removesuffix(".weight"): delta for weight, delta in found.items()}


def _take_experts(
    adapter: Adapter, pairs: Mapping[str, Mapping[str, StoredTensor]], view: BaseView | None, work: _Work
) -> None:
    from lorakit.convert.adapters.expert_factors import require_stacked, taken_apart

    work.features.pop("target_parameters", None)
    broken = next((module for module, parts in pairs.items() if len(parts) < 2), None)
    if broken is not None:
        reason = f"'{broken}' has no {'lora_A' if 'lora_B' in pairs[broken] else 'lora_B'}"
        work.obstacles.append(Check("tensors", False, reason, "look at what its trainer saved"))
        return
    both = {module: (parts["lora_A"], parts["lora_B"]) for module, parts in pairs.items()}
    if work.engine == "peft" and all(len(stored.shape) == 2 for pair in both.values() for stored in pair):
        work.obstacles.append(Check("features", False, _not_served(work.engine, "target_parameters"), MERGE))
        return
    if view is None:
        work.obstacles.append(Check("features", None, "its experts' factors are to be laid out as the base's experts"))
        return
    known = adapter.config, both, view.tensors, view.resolver, adapter.files()[0].folder
    embedding = input_embedding(view.model.base)
    try:
        if architecture_of(view.model.base.config) in STACKED_EXPERTS and embedding is not None:
            require_stacked(*known, hidden=embedding.shape[1])
            work.stacked = tuple(both)
            return
        found = taken_apart(*known)
    except UnsupportedAdapter as error:
        work.obstacles.append(Check("features", False, _without_folder(error, adapter), MERGE))
        return
    except WrongBase as error:
        work.obstacles.append(Check("shapes", False, _without_folder(error, adapter), OTHER_BASE))
        return
    except InvalidFile as error:
        cure = "look at what its trainer saved"
        work.obstacles.append(Check("tensors", False, _without_folder(error, adapter), cure))
        return
    work.deltas |= found
    _add_step(work, "factors of all experts at once, as those of each")


# the names of the base


def _named_as_the_base(config: AdapterConfig, view: BaseView, work: _Work) -> None:
    if config.raw.get("use_qalora"):
        _expand_pooled(config, view, work)
    grouped = regrouped(work.deltas, view.tensors, view.resolver, view.model.base.config)
    work.deltas = grouped.deltas
    if grouped.changed:
        _add_step(work, f"layers that the base has in other pieces or by other names ('{grouped.changed[0]}')")
    _fill_experts(view, work)


def _fill_experts(view: BaseView, work: _Work) -> None:
    """vLLM wants every layer of every expert where it gets one."""
    if not any(".experts." in module for module in work.deltas):
        return
    from lorakit.convert.adapters.expert_factors import untrained

    resolved = {
        (name.removesuffix(".weight") if (name := view.resolver.weight_of(module)) else module): delta
        for module, delta in work.deltas.items()
    }
    missing = untrained(resolved, view.tensors)
    if missing:
        work.deltas |= missing
        _add_step(work, f"{len(missing)} layers of experts that were not trained, as zeros, since vLLM wants all")


def _expand_pooled(config: AdapterConfig, view: BaseView, work: _Work) -> None:
    """QA-LoRA: inputs are averaged over groups, so each column of A stands for a whole group (see `merge.placing`)."""
    work.features.pop("use_qalora", None)
    for module, delta in work.deltas.items():
        name = view.resolver.weight_of(module)
        if name is None or len(view.tensors[name].shape) != 2 or delta.kind != "linear":
            continue
        shape = view.tensors[name].shape
        out, into = shape[::-1] if is_transposed(name, view.model.base) else shape
        group = config.raw.get("qalora_group_size", 16)
        if delta.shape != (out, into) and isinstance(group, int) and delta.shape == (out, into // max(1, group)):
            work.deltas[module] = _pooled(delta, into, group)
    _add_step(work, "use_qalora, as factors of all inputs")


def _pooled(delta: Delta, into: int, group: int) -> Delta:
    def make() -> tuple[torch.Tensor, torch.Tensor]:
        b, a = delta.stacked()
        return b * (into / group / group), a.repeat_interleave(group, dim=1)

    return Delta((Made((delta.shape[0], into), make, known_rank=delta.rank),))
