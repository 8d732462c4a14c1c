"""What the model that a config describes holds: names, shapes and which of them are one weight.

From transformers' own class, made on torch's meta device, where nothing has numbers; no code of a checkpoint runs. Of
a model that it doesn't know, from the headers of another of the same kind.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import InvalidFile, Refused
from lorakit.files.tensors import FLOATS
from lorakit.merge.base import BaseModel
from lorakit.merge.companions import CONFIG
from lorakit.merge.layers import EMBEDDINGS, HEAD_NAMES, HEADS, input_embedding, is_tied, layer_of, vocabulary_sizes

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

# Wrappers give the class of what they wrap a name of their own, and transformers saves that one.
_WRAPPED = re.compile(r"^(?:FSDP|PeftModelFor|PeftModel|DeepSpeed|OptimizedModule|DDP|DistributedDataParallel)")

# Of what a config counts with such a key, as many are made, one after the other.
_COUNT = re.compile(r"(layers?|depths?|blocks?|stages?|experts?|heads?|groups?|levels?|codebooks?|towers?)$")
MOST = 20_000
MOST_MADE = 100_000  # modules and tensors of one model
MOST_SAID = 300  # letters of another library's error
_HEADLESS = re.compile(r"(?!.*LMHead).*Model")  # transformers' word for a model that ends with its hidden states


@dataclass(frozen=True, slots=True)
class Part:
    """The elements of the tensor `whole` from `begin` on that are one tensor of `shape`; of none, if it is computed."""

    whole: str | None
    begin: int
    shape: Shape


@dataclass(frozen=True, slots=True)
class Expected:
    """`shapes` by the names in the running model, `tied` each further name of a weight with its first one; `stored`
    by the names that its files have for what they hold, and `ignored` is what they may hold beside that. `integers`
    are those that are no floats.
    """

    shapes: Mapping[str, Shape]
    tied: Mapping[str, str]
    stored: Mapping[str, Part]
    ignored: tuple[str, ...] = ()
    tables: frozenset[str] = field(default_factory=frozenset)
    integers: frozenset[str] = field(default_factory=frozenset)

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


def expected_of(folder: Path, config: Mapping[str, Any]) -> Expected:
    """By the class that the config in `folder` names.

    Raises:
        Refused: transformers has no such class of its own, or lacks what that needs.
        InvalidFile: the class can make no model of the config, or none of a size that there is.
    """
    import transformers

    _ensure_buildable(folder, config)
    name = architecture_of(config)
    model_class = getattr(transformers, name, None) if name else None
    if model_class is None or not hasattr(model_class, "_from_config"):
        raise Refused(
            f"transformers has no model of type '{config.get('model_type')}' of its own that is called '{name}', and "
            f"no code of a checkpoint is run here: {LIKE_THAT}"
        )
    try:
        with _on_meta(), _of_a_size_there_is():
            settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = model_class._from_config(settings)
            model.tie_weights()
            tensors: dict[str, torch.Tensor] = model.state_dict()
            stored = _stored(model, tensors)
    except ImportError as error:
        raise Refused(f"transformers can't make a {name} here ({_said(error)}): {LIKE_THAT}") from None
    except Exception as error:  # a config can be wrong in any way, and each class says so in its own
        raise InvalidFile(
            f"'{folder / CONFIG}' describes no {name} that transformers could make ({_said(error)}): copy that "
            f"of the model that was trained there"
        ) from None
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    integers = frozenset(name for name, tensor in tensors.items() if not tensor.is_floating_point())
    return Expected(shapes, _tied(model), stored, tuple(ignored), _tables(shapes, config), integers)


LIKE_THAT = "name the folder of the model that was trained with --like, whose tensors say what is to be there"


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:MOST_SAID] or type(error).__name__


def _ensure_buildable(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises InvalidFile when a config asks for more layers or experts than any model has: all would be made."""
    waiting: list[tuple[str, Any]] = list(config.items())
    for key, value in waiting:
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, one) for one in value]
        elif isinstance(value, int | float) and value > MOST and _COUNT.search(key):
            raise InvalidFile(f"'{folder / CONFIG}' says that {key} is {value}, which no model has")


@contextmanager
def _of_a_size_there_is() -> Iterator[None]:
    """Raises ValueError as soon as more is made than any model has."""
    from torch.nn.modules import module

    made, own_thread = 0, threading.get_ident()

    def count(*_: Any) -> None:
        nonlocal made
        made += threading.get_ident() == own_thread
        if made > MOST_MADE:
            raise ValueError(f"it has more than {MOST_MADE} parts, as no model has")

    hooks = [
        module.register_module_module_registration_hook(count),
        module.register_module_parameter_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def expected_like(like: BaseModel) -> Expected:
    """The names and shapes of another model's files."""
    shapes = {name: stored.shape for name, stored in like.tensors.items()}
    embedding = input_embedding(like)
    tied = {}
    head = next((name for name in shapes if layer_of(name) in HEADS), None)
    if embedding is not None and is_tied(like) and (head or not _HEADLESS.fullmatch(_named(like.config))):
        tied[head or HEAD_NAMES.get(like.model_type, "lm_head.weight")] = embedding.name
        shapes |= {name: shapes[first] for name, first in tied.items()}
    stored = {name: Part(name, 0, shape) for name, shape in shapes.items()}
    integers = frozenset(name for name, stored in like.tensors.items() if stored.dtype not in FLOATS)
    return Expected(shapes, tied, stored, (), _tables(shapes, like.config), integers)


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

    Its own functions are run on tensors without numbers, of which a part is known by where it begins; each has a
    storage of its own, as tied ones may be two by then.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before 5.0 the names in the model are those on disk
        return {name: Part(name, 0, tuple(tensor.shape)) for name, tensor in tensors.items()}
    import torch

    apart = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    storages = {tensor.untyped_storage()._cdata: name for name, tensor in apart.items()}
    with _views_alone():
        written = revert_weight_conversion(model, dict(apart))
    parts = {}
    for name, tensor in written.items():
        whole = storages.get(tensor.untyped_storage()._cdata) if tensor.is_contiguous() else None
        parts[name] = Part(whole, tensor.storage_offset(), tuple(tensor.shape))
    return parts


@contextmanager
def _on_meta() -> Iterator[None]:
    import torch
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.device("meta"), _without_numbers():
            yield
    finally:
        logging.set_verbosity(before)


def _without_numbers() -> AbstractContextManager[None]:
    """On the meta device there are none, and to make them up takes most of the time."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # before 5.0
        return nullcontext()
    found: AbstractContextManager[None] = no_init_weights()
    return found


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
