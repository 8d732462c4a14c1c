"""What of a fine-tuned model can become low-rank factors, and what can't: from names, dtypes and shapes alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from lorakit.adapters.delta import Kind
from lorakit.adapters.patterns import names
from lorakit.errors import NotFound, Refused, WrongBase
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import FLOATS
from lorakit.merge.base import BaseModel
from lorakit.merge.layers import EMBEDDINGS, HEADS, is_transposed, layer_of
from lorakit.merge.model import Model, model_for
from lorakit.merge.resolve import Resolver

# Other embeddings than that of the vocabulary's input, by the names that transformers' classes give them.
OTHER_EMBEDDINGS = frozenset({
    "wpe", "embed_positions", "position_embedding", "position_embeddings", "token_type_embeddings",
    "relative_attention_bias", "embed_tokens_per_layer", "tokens_embed", "positions_embed",
})  # fmt: skip
ROUTERS = frozenset({"gate", "router"})  # beside experts: no linear layer of its class, so PEFT has no factors for it
SHARED = "shared.weight"  # of T5: the weight of three modules, of which PEFT would change one
SHOWN = 4


@dataclass(frozen=True, slots=True)
class Pair:
    """One weight in both models, that factors can carry; `module` is its path in the tuned one.

    `transposed`: stored as (in, out), or an embedding's (vocabulary, features). `head`: the tied head, which is the
    same weight.
    """

    module: str
    tuned: StoredTensor
    base: StoredTensor
    kind: Kind = "linear"
    transposed: bool = False
    head: str | None = None

    @property
    def cost(self) -> int:
        """Parameters of one rank."""
        return sum(self.tuned.shape) * (1 if self.head is None else 2)


@dataclass(frozen=True, slots=True)
class Uncarried:
    """A tensor that no plain LoRA factors can carry, and why; `base` is None where its shape changed."""

    tuned: StoredTensor
    base: StoredTensor | None
    reason: str

    @property
    def module(self) -> str:
        return self.tuned.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class ExtractPlan:
    """Every tensor of the tuned model once, but those that were left out by their names.

    `head`: the tied head of both models, which is the weight of their `embedding` and stands in no list.
    """

    tuned: BaseModel
    base: BaseModel
    pairs: tuple[Pair, ...]
    uncarried: tuple[Uncarried, ...]
    left_out: tuple[str, ...] = ()
    embedding: str | None = None
    head: str | None = None

    @property
    def parts(self) -> list[Pair | Uncarried]:
        """What is to be measured."""
        return [*self.pairs, *self.uncarried]

    @property
    def nbytes(self) -> int:
        """How much is read of the tuned model."""
        return sum(part.tuned.nbytes for part in self.parts)


def plan_extract(
    tuned: BaseModel, base: BaseModel, *, include: Collection[str] = (), exclude: Collection[str] = ()
) -> ExtractPlan:
    """Pair the tensors of both models. `include` and `exclude` are patterns of module paths, or ends of them.

    Raises:
        Refused: one of the two is quantised.
        WrongBase: a name is in one of the two alone, or a shape differs by more than a vocabulary's rows.
        NotFound: a pattern names nothing.
    """
    for model in (tuned, base):
        if model.quantised:
            raise Refused(
                f"'{model.reference}' is quantised (by {model.quantised}): name the model in 16 or 32 bit, "
                f"as a difference of quantised weights is mostly their rounding"
            )
    mine, theirs, tied = _with_heads(tuned, base)
    wanted, left_out = _chosen(mine.tensors, include, exclude)
    besides, ignored = _chosen(theirs.tensors, include, exclude)
    _ensure_meant((*include, *exclude), (*wanted, *left_out, *besides, *ignored))
    base_names = _base_names(wanted, left_out, besides, mine, theirs)
    pairs: list[Pair] = []
    uncarried: list[Uncarried] = []
    for name in wanted:
        stored, other = replace(mine.tensors[name], name=name), theirs.tensors[base_names[name]]
        reason = _reason(stored, other, mine)
        if reason is not None:
            uncarried.append(Uncarried(stored, other if other.shape == stored.shape else None, reason))
            continue
        head = mine.head.removesuffix(".weight") if tied and mine.head and name == mine.embedding else None
        is_embedding = layer_of(name) in EMBEDDINGS | OTHER_EMBEDDINGS
        kind: Kind = "embedding" if is_embedding else "linear"
        transposed = is_embedding or is_transposed(name, tuned)
        pairs.append(Pair(name.removesuffix(".weight"), stored, other, kind, transposed, head))
    both = (mine.embedding, mine.head) if tied else (None, None)
    return ExtractPlan(tuned, base, tuple(pairs), tuple(uncarried), tuple(left_out), *both)


def _with_heads(tuned: BaseModel, base: BaseModel) -> tuple[Model, Model, bool]:
    """Both with their tied heads by name, where only one of the two is tied; and whether both are."""
    mine, theirs = model_for(tuned, ()), model_for(base, ())
    speaks = _is_language_model(tuned)
    tied = speaks and mine.head is not None and theirs.head is not None
    for model in (mine, theirs):
        if model.head is not None and (tied or not (speaks or model.head in model.base.tensors)):
            del model.tensors[model.head]
    return mine, theirs, tied


def _chosen(every: Iterable[str], include: Collection[str], exclude: Collection[str]) -> tuple[list[str], list[str]]:
    wanted: list[str] = []
    left_out: list[str] = []
    for name in every:
        path = name.removesuffix(".weight")
        included = not include or any(names(pattern, path) for pattern in include)
        (wanted if included and not any(names(pattern, path) for pattern in exclude) else left_out).append(name)
    return wanted, left_out


def _ensure_meant(patterns: Iterable[str], every: Collection[str]) -> None:
    for pattern in patterns:
        if not any(names(pattern, name.removesuffix(".weight")) for name in every):
            raise NotFound(f"'{pattern}' names no module of the two models; they have, for one, '{next(iter(every))}'")


def _base_names(
    wanted: Collection[str], left_out: Iterable[str], besides: Iterable[str], mine: Model, theirs: Model
) -> dict[str, str]:
    """What the base calls each tensor, below another prefix perhaps.

    Raises:
        WrongBase: names the tensors that only one of the two has.
    """
    resolver = Resolver(theirs.tensors)
    found = {name: other for name in wanted if (other := resolver.tensor_of(name)) is not None}
    taken = {*found.values(), *(resolver.tensor_of(name) for name in left_out)}
    only_mine = [name for name in wanted if name not in found]
    only_theirs = [name for name in besides if name not in taken]
    if only_mine or only_theirs:
        said = [
            f"only '{model.base.reference}' has {_listed(alone)}"
            for model, alone in ((mine, only_mine), (theirs, only_theirs))
            if alone
        ]
        raise WrongBase(f"{'; '.join(said)}: name the base that it was trained from, or exclude such tensors")
    if len(set(found.values())) < len(found):
        raise WrongBase(f"two tensors of '{mine.base.reference}' mean the same one of base '{theirs.base.reference}'")
    return found


def _reason(stored: StoredTensor, other: StoredTensor, model: Model) -> str | None:
    """Why no factors can carry this tensor's change; None where they can.

    Raises:
        WrongBase: the shapes differ, and not by the rows of a vocabulary.
    """
    layer, module = layer_of(stored.name), stored.name.rpartition(".")[0]
    if stored.shape != other.shape:
        tables = EMBEDDINGS | HEADS | OTHER_EMBEDDINGS | {"shared"}
        if layer.removesuffix(".bias") not in tables and module.rpartition(".")[2] not in tables | {"bias"}:
            raise WrongBase(
                f"'{stored.name}' is {list(stored.shape)} in '{model.base.reference}' and {list(other.shape)} in the "
                f"base: it was trained from another one"
            )
        return f"its vocabulary was resized from {other.shape[0]} to {stored.shape[0]} rows"
    if stored.dtype not in FLOATS or other.dtype not in FLOATS:
        return f"it is stored as {stored.dtype}"
    if stored.name.endswith(".bias"):
        return "a bias"
    if stored.name == SHARED and model.base.config.get("is_encoder_decoder"):
        return "the embedding of encoder and decoder at once"
    if len(stored.shape) < 2:
        return "a vector"
    if len(stored.shape) > 2:
        return "experts in one tensor" if ".experts." in stored.name else "a convolution's kernel, or a stack"
    if not stored.name.endswith(".weight"):
        return "a parameter that is no layer's weight"
    if layer in ROUTERS and any(name.startswith(f"{module.rpartition('.')[0]}.experts.") for name in model.tensors):
        return "a router of experts"
    return None


def _is_language_model(model: BaseModel) -> bool:
    """Whether it has an output head at all: a config says of an encoder, too, that its embeddings are tied."""
    classes = model.config.get("architectures") or ["LMHead"]
    return any(part in str(name) for name in classes for part in ("CausalLM", "LMHead", "ConditionalGeneration"))


def _listed(every: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in every[:SHOWN])
    return shown + (f" and {len(every) - SHOWN} more" if len(every) > SHOWN else "")
