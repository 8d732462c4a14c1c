"""Merged weights of PEFT's other methods (LoHa, OFT, IA³, VeRA, …), made by PEFT's own layers, one weight at a time.

PEFT sees a skeleton of the model: empty layers of the right shapes under the right paths, whose weights take no memory.
So it resolves patterns, shared projections and seeds by itself; then each layer is given its one real weight to merge.
What is asked before a plan (`require_mergeable`, `target_modules`, `needs_order`) imports neither torch nor PEFT.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lorakit.adapters.module_names import ensure_quick
from lorakit.errors import InvalidFile, UnsupportedAdapter, WrongBase
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import load_tensor, same_bytes

if TYPE_CHECKING:
    import torch

# What the names of a method's tensors begin with: `<module>.<prefix>…`, and `base_model.<prefix>…` where all share one.
PREFIXES: Mapping[str, str] = {
    "ADALORA": "lora_", "BEFT": "beft_", "BOFT": "boft_", "BONE": "bone_", "C3A": "c3a_", "DEFT": "deft_",
    "DELORA": "delora_", "FOURIERFT": "fourierft_", "FROD": "frod_", "GLORA": "glora_", "GRALORA": "gralora_",
    "HIRA": "hira_", "HRA": "hra_", "IA3": "ia3_", "LN_TUNING": "ln_tuning_", "LOHA": "hada_", "LOKR": "lokr_",
    "MISS": "miss_", "OFT": "oft_", "OSF": "osf_", "PEANUT": "peanut_", "PSOFT": "psoft_", "PVERA": "pvera_",
    "RANDLORA": "randlora_", "ROAD": "road_", "SHIRA": "shira_", "SUPERTUNING": "supertuning_",
    "TINYLORA": "tinylora_", "TRAINABLE_TOKENS": "trainable_tokens_", "UNILORA": "unilora_", "VBLORA": "vblora_",
    "VERA": "vera_", "WAVEFT": "waveft_",
}  # fmt: skip

_INPUT = "it adds to the model's input, and changes no weight"
_ROUTED = "what it adds to a weight depends on the input"
REFUSED: Mapping[str, str] = {
    "ADAMSS": "its segments come from a clustering of the base's weights, which its file does not hold",
    "ADAPTION_PROMPT": _INPUT, "CARTRIDGE": _INPUT, "CPT": _INPUT, "MULTITASK_PROMPT_TUNING": _INPUT,
    "P_TUNING": _INPUT, "PREFIX_TUNING": _INPUT, "PROMPT_TUNING": _INPUT,
    "LILY": _ROUTED, "POLY": _ROUTED, "SHADOW": _ROUTED, "XLORA": _ROUTED,
}  # fmt: skip

# Methods that change a layer's bias too; BEFT changes nothing else.
CHANGES_BIAS = frozenset({"BEFT", "GLORA", "IA3", "LN_TUNING", "ROAD"})

# Methods whose layers PEFT has to make together: they share projections or vectors, whose sizes depend on all of them,
# or (AdaLoRA) have one list of ranks. All others are made one at a time, and not kept.
_TOGETHER = frozenset({"ADALORA", "PVERA", "RANDLORA", "UNILORA", "VBLORA", "VERA"})

# Methods that read the base's weight when a layer is made: an SVD, or its largest values.
_READS_WEIGHT = frozenset({"FROD", "OSF", "PSOFT", "SUPERTUNING", "TINYLORA"})

_PREFIX = "base_model.model."
_NAME = "default"  # PEFT's name of the only adapter

# Resolved already, by the names in the file, or the work of others: biases and whole modules that were trained.
_SETTLED: Mapping[str, Any] = {
    "base_model_name_or_path": None, "task_type": None, "inference_mode": True, "auto_mapping": None, "revision": None,
    "bias": "none", "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None,
    "exclude_modules": None, "ensure_weight_tying": False, "progressbar": False,
}  # fmt: skip
_PATTERNS = frozenset({"layers_to_transform", "layers_pattern", "exclude_modules"})
_ASIDE = frozenset({"peft_version"})

_PROCESS_WIDE = threading.RLock()  # warnings and random numbers are the whole process's

SHARED = _TOGETHER | {"TINYLORA"}

Kind = Literal["linear", "conv1d", "embedding", "conv", "norm"]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of the base: `conv1d` is transformers' Conv1D, whose weight is (in, out). `shape` is as stored."""

    kind: Kind
    shape: tuple[int, ...]
    has_bias: bool = False


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What PEFT takes for regular expressions, with its field."""
    for key in ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern"):
        if isinstance(config.get(key), str):
            yield key, config[key]
    for key in ("rank_pattern", "alpha_pattern", "layers_pattern"):
        if isinstance(config.get(key), dict | list):
            yield from ((key, str(pattern)) for pattern in config[key])


def peft_type_of(config: Mapping[str, Any]) -> str:
    return str(config.get("peft_type") or "").upper()


def require_mergeable(config: Mapping[str, Any], name: str) -> None:
    """Raises UnsupportedAdapter when weights can't hold what the adapter does, or its file does not say it all."""
    method = peft_type_of(config)
    reason = REFUSED.get(method)
    if reason is None and method not in PREFIXES and method != "LORA":
        reason = "lorakit does not know this method"
    elif method == "FROD" and config.get("save_projection") is False:
        reason = "its projections are not in its file: save it with save_projection=True"
    elif method == "SUPERTUNING" and not config.get("save_precomputed_indices", True):
        reason = "its indices are not in its file: save it with save_precomputed_indices=True"
    elif method == "PVERA" and config.get("sample_at_inference"):
        reason = "it draws its weights anew for every input (sample_at_inference)"
    if reason:
        raise UnsupportedAdapter(f"adapter '{name}' ({method or 'no peft_type'}) can't be merged: {reason}")


def target_modules(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str | None]:
    """The tensors of the method itself, each with its module's path; None for those that all modules share.

    What is left out belongs to others: trained biases, whole modules (`modules_to_save`), copies of the base.
    """
    prefix = PREFIXES[peft_type_of(config)]
    found: dict[str, str | None] = {}
    for name in names:
        module, dot, _ = name.rpartition("." + prefix)
        if dot and module.startswith(_PREFIX):
            found[name] = module.removeprefix(_PREFIX)
        elif dot and module == "base_model":
            found[name] = None
    return found


def needs_order(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether the file leaves open which module has which of the shared vectors, or which seed.

    Then `layers` has to hold all linear layers of the model, in the order of its class (not of its files).
    """
    method, names = peft_type_of(config), tuple(names)
    if method == "UNILORA":
        return not any(".unilora_indices_" in name for name in names)
    if method != "TINYLORA":
        return False
    vectors = sum(name.startswith("base_model.tinylora_v.") for name in names)
    return vectors > 1 or not any(name.endswith(".tinylora_P") for name in names)


class PeftLayers:
    """The layers that an adapter changes, as PEFT makes them. Threads may share one; the base is never held.

    `layers` has every module that the adapter changes, by the path it has there; see `needs_order` for when `ordered`
    has to be so.

    Raises:
        UnsupportedAdapter: see `require_mergeable`; or the PEFT that is installed does not know the method or a field.
        InvalidFile: a tensor of the method is missing, or there is one that PEFT has no place for.
        WrongBase: a shape is not the base's.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, StoredTensor],
        layers: Mapping[str, Layer],
        name: str,
        *,
        ordered: bool = False,
    ) -> None:
        require_mergeable(config, name)
        self.method = peft_type_of(config)
        self._raw = config
        self._label = f"adapter '{name}' ({self.method})"
        owners = target_modules(config, tensors)
        self.taken = frozenset(owners)
        self._stored: dict[str | None, dict[str, StoredTensor]] = {None: {}}
        for key, module in owners.items():
            self._stored.setdefault(module, {})[key] = tensors[key]
        named = frozenset(module for module in self._stored if module is not None)
        self._refuse_unknown_order(named, ordered or not needs_order(config, owners))
        self._layers = {path: layer for path, layer in layers.items() if path in named or not named}
        self._refuse_absent(named)
        self._config = self._read_config()
        self._together: dict[torch.dtype, Any] = {}
        self.modules = self._checked_modules(named)

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which makes the layers again: as PEFT's model they are large."""
        return {**self.__dict__, "_together": {}}

    @property
    def changes_bias(self) -> bool:
        return self.method in CHANGES_BIAS

    def merged(
        self, module: str, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The merged weight and bias in the weight's own dtype, float32 or float64, as PEFT's layer computes them.

        `bias` is needed where the layer has one and `changes_bias`; what is given is left as it is.
        """
        import torch

        with torch.inference_mode(False), torch.no_grad():
            layer = self._layer(module, weight.clone(), bias)
            with (
                _quiet_and_reproducible() if self.method == "FROD" else nullcontext()
            ):  # torch: "not checked"; they are
                layer.merge()
            base = layer.get_base_layer()
            return base.weight.detach().contiguous(), None if bias is None else base.bias.detach()

    def _refuse_unknown_order(self, named: frozenset[str], known: bool) -> None:
        if not known:
            raise UnsupportedAdapter(
                f"{self._label} can't be merged exactly: which module has which part of its vectors depends on the "
                f"order of the model's layers, which is not known"
            )
        if not named and self._raw.get("target_modules") == "all-linear":
            raise UnsupportedAdapter(
                f"{self._label} can't be merged exactly: its file names no module, and target_modules 'all-linear' "
                f"is what the model's class makes of it (save it with save_indices=True)"
            )

    def _refuse_absent(self, named: frozenset[str]) -> None:
        for module in sorted(named):
            if module not in self._layers:
                raise WrongBase(f"{self._label} changes '{module}', which the base does not have")
            if self.method == "BEFT" and not self._layers[module].has_bias:
                raise UnsupportedAdapter(f"{self._label} can't be merged: it adds a bias to '{module}', which has none")

    def _checked_modules(self, named: frozenset[str]) -> frozenset[str]:
        """What PEFT changes, once every tensor has its place."""
        import torch

        if self.method in _TOGETHER:
            made = self._together[torch.float32] = self._skeleton(torch.float32)
            return frozenset(made.base_model.targeted_module_names)
        parts = Counter(key.removeprefix(_PREFIX + module) for module in named for key in self._stored[module])
        usual = [part for part, count in parts.items() if 2 * count > len(named)]
        for module in sorted(named):
            if self.method in _READS_WEIGHT:  # an SVD of zeros would take as long as a real one: `_made_alone` checks
                self._refuse_misplaced([_PREFIX + module + part for part in usual], self._stored[module])
            else:
                empty = _empty(self._layers[module], torch.float32)
                self._check(self._injected({module: empty}), self._stored[module])
        if self.method not in _READS_WEIGHT:
            self._refuse_misplaced((), self._stored[None])
        if self.method == "FROD":  # what it shares is by kind of module: mlp_down_proj
            flat = tuple(module.replace(".", "_") for module in named)
            unused = [key for key in self._stored[None] if not any(m.endswith(key.rpartition(".")[2]) for m in flat)]
            self._refuse_misplaced((), unused)
        return named

    def _layer(self, module: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        """PEFT's layer around the real weight; nobody else's."""
        if self.method not in _TOGETHER:
            return self._made_alone(module, weight, bias)
        if weight.dtype not in self._together:
            self._together[weight.dtype] = self._skeleton(weight.dtype)
        layer = _own_copy(self._together[weight.dtype].get_submodule(_PREFIX + module))
        _fill(layer.get_base_layer(), weight, bias)
        return layer

    def _skeleton(self, dtype: torch.dtype) -> Any:
        """PEFT's model around empty layers, with the adapter's values in it."""
        model = self._injected({path: _empty(layer, dtype) for path, layer in self._layers.items()})
        stored = {key: value for part in self._stored.values() for key, value in part.items()}
        self._check(model, stored)
        if self.method == "RANDLORA":  # each module's file entries hold the shared bases once more
            stored = {key: value for key, value in stored.items() if not self._is_copy_of_shared(key, value)}
        self._load(model, stored)
        return model.eval()

    def _is_copy_of_shared(self, key: str, stored: StoredTensor) -> bool:
        shared = self._stored[None].get(f"base_model.{key.rpartition('.')[2]}", stored)
        if shared is not stored and not same_bytes(stored, shared):
            raise InvalidFile(f"{self._label} shares '{shared.name}' among its modules, but '{key}' is another")
        return shared is not stored

    def _made_alone(self, module: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        """The layer of one module, made by PEFT when its real weight is there."""
        bases = {module: _fill(_empty(self._layers[module], weight.dtype), weight, bias)}
        if self.method == "TINYLORA":  # groups modules by their number: the others are there, as small as can be
            one = Layer("linear", (1, 1))
            bases = {path: bases.get(path) or _empty(one, weight.dtype) for path in self._layers}
        model = self._injected(bases)
        stored = self._stored[None] | self._stored[module]
        if self.method == "FROD":
            kinds = tuple(f".{kind}" for kind in model.base_model.frod_V)
            stored = {key: value for key, value in stored.items() if key in self._stored[module] or key.endswith(kinds)}
        if self.method in _READS_WEIGHT:
            self._check(model, stored, only=module)
        self._load(model, stored)
        made = model.eval().get_submodule(_PREFIX + module)
        if self.method == "FROD":  # PEFT made U with the V of this one weight, and then read the V of all
            self._require_indices_inside(made)
            seen = weight.T if made.fan_in_fan_out else weight
            made.frod_U[_NAME] = made._calculate_frod_u_and_lambda(made.frod_V[_NAME], seen)[0].to(weight.dtype)
        return made

    def _require_indices_inside(self, made: Any) -> None:
        """torch writes sparse values where the file's indices say, and does not look whether that is inside."""
        side = made.frod_V[_NAME].shape[-1]
        indices, size = made.frod_s_indices[_NAME], made.frod_s_size[_NAME]
        if size.tolist() != [side, side] or (indices.numel() and not 0 <= indices.min() <= indices.max() < side):
            raise InvalidFile(
                f"{self._label} has sparse indices (frod_s_indices, frod_s_size) outside of its {side}×{side} matrix"
            )

    def _injected(self, bases: Mapping[str, torch.nn.Module]) -> Any:
        from peft import PeftModel

        config = copy.copy(self._config)
        if len(self._stored) > 1:
            config.target_modules = list(bases)  # after PEFT's checks: IA³'s modules are patterns on both sides
        with _quiet_and_reproducible():
            try:
                return PeftModel(_tree(bases), config, autocast_adapter_dtype=False)
            except (ValueError, TypeError, NotImplementedError) as error:
                raise UnsupportedAdapter(f"{self._label} can't be merged: PEFT says: {_last_line(error)}") from None

    def _read_config(self) -> Any:
        """PEFT's config, less what is settled by the names in the file or belongs to others."""
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, __version__

        kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(self.method)
        if kind is None:
            raise UnsupportedAdapter(f"{self._label} can't be merged: PEFT {__version__} does not know this method")
        known = {field.name for field in dataclasses.fields(kind) if field.init}
        extra = [key for key, value in self._raw.items() if value and key not in known | _SETTLED.keys() | _ASIDE]
        if extra:
            raise UnsupportedAdapter(
                f"{self._label} can't be merged: its config says {extra[0]}={self._raw[extra[0]]!r}, which "
                f"PEFT {__version__} does not know: update PEFT"
            )
        for key, pattern in _patterns(self._raw):
            ensure_quick(pattern, f"{self._label}, {key}")
        try:
            with _quiet_and_reproducible():
                config = kind(**{key: value for key, value in self._raw.items() if key in known})
        except (TypeError, ValueError) as error:
            raise InvalidFile(f"{self._label} has a config that PEFT refuses: {_last_line(error)}") from None
        settled = _SETTLED if len(self._stored) > 1 else {k: v for k, v in _SETTLED.items() if k not in _PATTERNS}
        for key, value in settled.items():
            if hasattr(config, key):
                setattr(config, key, value)
        return config

    def _check(self, model: Any, stored: Mapping[str, StoredTensor], *, only: str | None = None) -> None:
        """Raises when these are not the tensors, in names and shapes, that PEFT would have written."""
        from peft import get_peft_model_state_dict

        with _quiet_and_reproducible():
            wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
        if only is not None:
            owners = target_modules(self._raw, wanted)
            wanted = {key: value for key, value in wanted.items() if owners.get(key) in (only, None)}
        self._refuse_misplaced(wanted, stored)
        for key, value in stored.items():
            if value.shape != tuple(wanted[key].shape):
                raise WrongBase(
                    f"{self._label} was made for another base, or has another config: '{key}' is {list(value.shape)}, "
                    f"and would be {list(wanted[key].shape)}"
                )

    def _refuse_misplaced(self, wanted: Collection[str], stored: Collection[str]) -> None:
        for key in sorted(set(wanted) ^ set(stored)):
            what = "has a tensor that PEFT has no place for:" if key in stored else "lacks the tensor"
            raise InvalidFile(f"{self._label} {what} '{key}'")

    def _load(self, model: Any, stored: Mapping[str, StoredTensor]) -> None:
        from peft import set_peft_model_state_dict

        with _quiet_and_reproducible():
            try:
                values = {key: load_tensor(value) for key, value in stored.items()}
                unexpected = set_peft_model_state_dict(model, values).unexpected_keys
            except (RuntimeError, ValueError, KeyError) as error:
                raise InvalidFile(f"{self._label} can't be read by PEFT: {_last_line(error)}") from None
        self._refuse_misplaced((), unexpected)


@contextmanager
def _quiet_and_reproducible() -> Iterator[None]:
    """PEFT warns of what is settled here, and draws values that the file then replaces."""
    import torch

    with _PROCESS_WIDE, warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()


def _tree(leaves: Mapping[str, torch.nn.Module]) -> torch.nn.Module:
    """Modules under their paths."""
    import torch

    root = torch.nn.Module()
    for path, leaf in leaves.items():
        *parents, last = path.split(".")
        place = root
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, torch.nn.Module())
            place = place.get_submodule(parent)
        place.add_module(last, leaf)
    return root


def _empty(layer: Layer, dtype: torch.dtype) -> torch.nn.Module:
    """A module of the kind that PEFT tells layers by; its weight is a single zero, seen as often as its shape needs."""
    import torch

    shape = layer.shape
    module: torch.nn.Module
    with torch.device("meta"):  # nothing is allocated, nothing drawn
        if layer.kind == "linear":
            module = torch.nn.Linear(shape[1], shape[0], bias=layer.has_bias)
        elif layer.kind == "embedding":
            module = torch.nn.Embedding(shape[0], shape[1])
        elif layer.kind == "conv":
            convolution = {3: torch.nn.Conv1d, 4: torch.nn.Conv2d, 5: torch.nn.Conv3d}[len(shape)]
            module = convolution(shape[1], shape[0], shape[2:], bias=layer.has_bias)  # type: ignore[arg-type]
        elif layer.kind == "conv1d":
            from transformers.pytorch_utils import Conv1D

            module = Conv1D(shape[1], shape[0])
        else:
            module = torch.nn.Module()
    bias_shape = {"conv1d": shape[-1:]}.get(layer.kind, shape[:1])
    weight, bias = torch.zeros((), dtype=dtype), torch.zeros(bias_shape, dtype=dtype)
    return _fill(module, weight.expand(shape), bias if layer.has_bias else None)


def _fill(module: torch.nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Module:
    import torch

    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        module.bias = torch.nn.Parameter(bias.clone(), requires_grad=False)
    return module


def _own_copy(layer: Any) -> Any:
    """A copy that shares every tensor with `layer`: what merging leaves behind in it goes with it."""
    shared = {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
    return copy.deepcopy(layer, shared)
