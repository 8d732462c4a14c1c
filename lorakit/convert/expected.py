"""What the model that a config describes holds: names, shapes and which of them are one weight.

From transformers' own class, made on torch's meta device, where nothing has numbers; no code of a checkpoint runs. Of
a model that it doesn't know, from the headers of another of the same kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import InvalidFile
from lorakit.merge.base import BaseModel
from lorakit.merge.companions import CONFIG
from lorakit.merge.layers import EMBEDDINGS, HEAD_NAMES, HEADS, input_embedding, is_tied, layer_of, vocabulary_sizes

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

# Wrappers give the class of what they wrap a name of their own, and transformers saves that one.
_WRAPPED = re.compile(r"^(?:FSDP|PeftModelFor|PeftModel|DeepSpeed|OptimizedModule|DDP|DistributedDataParallel)")


_COUNT = re.compile(r"layer|expert|depth|block|stage")
MOST = 10_000


@dataclass(frozen=True, slots=True)
class Part:
    """The elements of the tensor `whole` from `begin` on that are one tensor of `shape`."""

    whole: str
    begin: int
    shape: Shape


@dataclass(frozen=True, slots=True)
class Expected:
    """`shapes` by the names in the running model, `tied` each further name of a weight with its first one; `stored`
    by the names that its files have for what they hold, and `ignored` is what they may hold beside that.
    """

    shapes: Mapping[str, Shape]
    tied: Mapping[str, str]
    stored: Mapping[str, Part]
    ignored: tuple[str, ...] = ()
    tables: frozenset[str] = field(default_factory=frozenset)

    def is_ignored(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.ignored)


def architecture_of(config: Mapping[str, Any], like: Mapping[str, Any] | None = None) -> str | None:
    """The class that is to load it, without a wrapper's name; else that of `like`, if it is of the same type; else the
    one that speaks in a model of that type.
    """
    first = _named(config)
    plain = _WRAPPED.sub("", first)
    if plain and plain == first:
        return plain
    if like is not None and like.get("model_type") == config.get("model_type") and _named(like):
        return _named(like)
    from transformers.models.auto import modeling_auto

    known: list[Mapping[str, str]] = [
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_MAPPING_NAMES,
    ]
    if any(plain in names.values() for names in known):
        return plain
    usual = next((names[str(config.get("model_type"))] for names in known if config.get("model_type") in names), None)
    return usual if isinstance(usual, str) else plain or None


def _named(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""


def expected_of(folder: Path, config: Mapping[str, Any]) -> Expected | None:
    """By the class that the config in `folder` names; None where transformers has none, or none that is made so.

    Raises:
        InvalidFile: the config is of no model.
    """
    import transformers

    _ensure_buildable(folder, config)
    name = architecture_of(config)
    model_class = getattr(transformers, name, None) if name else None
    if model_class is None or not hasattr(model_class, "_from_config"):
        return None
    try:
        with _on_meta():
            settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = model_class._from_config(settings)
    except Exception:  # a config can be wrong in any way, and each class says so in its own
        return None
    tensors: dict[str, torch.Tensor] = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return Expected(shapes, _tied(model), _stored(model, tensors), tuple(ignored), _tables(shapes, config))


def _ensure_buildable(file: Path, config: Mapping[str, Any]) -> None:
    """Raises InvalidFile when a config asks for more layers or experts than any model has: all would be made."""
    for key, value in config.items():
        if isinstance(value, dict):
            _ensure_buildable(file, value)
        elif isinstance(value, int) and value > MOST and _COUNT.search(key):
            raise InvalidFile(f"'{file / CONFIG}' says that {key} is {value}, which no model has")


def expected_like(like: BaseModel) -> Expected:
    """The names and shapes of another model's files."""
    shapes = {name: stored.shape for name, stored in like.tensors.items()}
    embedding = input_embedding(like)
    tied = {}
    if embedding is not None and is_tied(like):
        head = next((name for name in shapes if layer_of(name) in HEADS), None)
        tied[head or HEAD_NAMES.get(like.model_type, "lm_head.weight")] = embedding.name
        shapes |= {name: shapes[first] for name, first in tied.items()}
    stored = {name: Part(name, 0, shape) for name, shape in shapes.items()}
    return Expected(shapes, tied, stored, (), _tables(shapes, like.config))


def _tables(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> frozenset[str]:
    """Those with a row for each token of the vocabulary."""
    sizes = vocabulary_sizes(config)
    return frozenset(
        name
        for name, shape in shapes.items()
        if shape and shape[0] in sizes and layer_of(name.removesuffix(".bias")) in EMBEDDINGS | HEADS
    )


def _tied(model: Any) -> dict[str, str]:
    first: dict[int, str] = {}
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first[id(tensor)] for name, tensor in every if first.setdefault(id(tensor), name) != name}


def _stored(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, Part]:
    """What transformers writes for each tensor: itself, or as vLLM wants it too, a part of it under another name.

    Its own functions are run on tensors without numbers, of which a part is known by where it begins.
    """
    own = {name: Part(name, 0, tuple(tensor.shape)) for name, tensor in tensors.items()}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before 5.0 the names in the model are those on disk
        return own
    storages: dict[int, str] = {}
    for name, tensor in tensors.items():
        storages.setdefault(tensor.untyped_storage()._cdata, name)
    with _views_alone():
        written = revert_weight_conversion(model, dict(tensors))
    parts = {}
    for name, tensor in written.items():
        whole = storages.get(tensor.untyped_storage()._cdata)
        if whole is None or not tensor.is_contiguous():
            return own  # computed, and not cut out: vLLM has to take it as the model has it
        parts[name] = Part(own[name].whole if name in own else whole, tensor.storage_offset(), tuple(tensor.shape))
    return parts


@contextmanager
def _on_meta() -> Iterator[None]:
    import torch
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _views_alone() -> Iterator[None]:
    """Tensors stay the views that they are where a copy is asked for."""
    from torch.overrides import TorchFunctionMode

    class Views(TorchFunctionMode):
        def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(function, "__name__", "") == "contiguous":
                return args[0]
            return function(*args, **(kwargs or {}))

    with Views():
        yield
