"""Quantise merged weights as they are written: round to nearest, in compressed-tensors' layout, which vLLM loads.

fp8 and int8 have a scale for each output and leave activations to be quantised as they come (llm-compressor's
FP8_DYNAMIC and W8A8); w4a16 has a scale for each group of inputs. Nothing is calibrated, so any weight can be done
alone. Rounding is from float32, once; llm-compressor divides in the weight's dtype, and so rounds twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lorakit.errors import Refused, UsageError
from lorakit.files.tensors import torch_dtype
from lorakit.merge.quantised.library import compressed_tensors

if TYPE_CHECKING:
    import torch

Kind = Literal["fp8", "int8", "w4a16"]
Planned = tuple[str, str, tuple[int, ...]]  # name, dtype, shape

KINDS: tuple[Kind, ...] = ("fp8", "int8", "w4a16")
GROUPS = (128, 64, 32)  # what vLLM's kernels take, the best first
_FORMATS = {"fp8": "float-quantized", "int8": "int-quantized", "w4a16": "pack-quantized"}
_PRESETS = {"fp8": "FP8_DYNAMIC", "int8": "W8A8", "w4a16": "W4A16"}
_CODES = {"fp8": "F8_E4M3", "int8": "I8"}
_PER_WORD = 8  # numbers of 4 bits in an int32

_HEADS = frozenset({"lm_head", "embed_out", "score", "classifier", "output_projection"})
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "wg"})
_OTHER_SENSES = frozenset(
    {"visual", "vision_tower", "vision_model", "vision_encoder", "audio_tower", "multi_modal_projector", "mm_projector"}
)
_EMBEDDINGS = frozenset({"wte", "wpe", "word_embeddings", "position_embeddings", "token_type_embeddings"})


@dataclass(frozen=True, slots=True)
class Quantiser:
    """`groups`: module -> the size of its groups, 0 for one scale a row; `left`: module -> why it stays as it is."""

    kind: Kind
    groups: Mapping[str, int]
    left: Mapping[str, str]
    _schemes: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, kind: str, config: Mapping[str, Any], tensors: Iterable[Planned]) -> Quantiser:
        """For a model of these tensors (name, dtype, shape), as they would be written without it.

        Raises:
            UsageError: there is no such kind.
            Refused: compressed-tensors is not installed, or the model keeps its weights in a form that has no place
                in its layout (experts in one tensor, Conv1D).
        """
        if kind not in KINDS:
            raise UsageError(f"there is no way to quantise called '{kind}': name one of {', '.join(KINDS)}")
        compressed_tensors()
        if config.get("model_type") in _conv1d_models():
            raise Refused(f"a {config['model_type']} stores its weights as (in, out): it can't be quantised here")
        groups: dict[str, int] = {}
        left: dict[str, str] = {}
        for name, dtype, shape in tensors:
            if len(shape) == 3 and ".experts." in name and dtype in ("BF16", "F16", "F32"):
                raise Refused(f"'{name}' holds all experts in one tensor: it can't be quantised here")
            module, ending, _ = name.rpartition(".weight")
            if not ending or len(shape) != 2 or dtype not in ("BF16", "F16", "F32"):
                continue
            reason = _left_as_it_is(module)
            group = 0 if kind != "w4a16" else next((size for size in GROUPS if shape[1] % size == 0), -1)
            if reason is None and group < 0:
                reason = f"its {shape[1]} inputs can't be divided into groups of {', '.join(map(str, GROUPS))}"
            if reason is None:
                groups[module] = group
            else:
                left[module] = reason
        if not groups:
            raise Refused("the model has no linear layer that could be quantised")
        return cls(kind, groups, left)

    def planned(self, name: str, dtype: str, shape: tuple[int, ...]) -> list[Planned] | None:
        """What is written in the place of a tensor; None: the tensor itself."""
        module = name.removesuffix(".weight")
        if module == name or module not in self.groups:
            return None
        out, into = shape
        if self.kind != "w4a16":
            return [(name, _CODES[self.kind], shape), (f"{name}_scale", dtype, (out, 1))]
        return [
            (f"{name}_packed", "I32", (out, into // _PER_WORD)),
            (f"{name}_scale", dtype, (out, into // self.groups[module])),
            (f"{name}_shape", "I64", (2,)),
        ]

    def quantise(self, name: str, dtype: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The planned tensors of a weight, given as exactly as it is known; `dtype` is the one in `planned`.

        Raises:
            Refused: the weight has values that are no finite numbers.
        """
        if not weight.isfinite().all():
            raise Refused(f"'{name}' has values that are not finite: they can't be quantised")
        module = name.removesuffix(".weight")
        scheme = self._scheme(self.groups[module])
        rows = weight.float().reshape(weight.shape[0], -1, self.groups[module] or weight.shape[1])
        library = compressed_tensors()
        scale, _ = library.calculate_qparams(rows.amin(2), rows.amax(2), scheme.weights)
        scale = scale.to(torch_dtype(dtype))
        compressor = library.BaseCompressor.get_value_from_registry(_FORMATS[self.kind])
        written = compressor.compress({"weight": weight.float(), "weight_scale": scale}, scheme)
        return {f"{module}.{role}": tensor.contiguous() for role, tensor in written.items()}

    def config_section(self) -> dict[str, Any]:
        """The quantization_config: the commonest group size for all `Linear`, the others by their names."""
        *rarer, commonest = [size for size, _ in reversed(Counter(self.groups.values()).most_common())]
        # names first: compressed-tensors says of a name behind `Linear` that it matches nothing, though it does
        targets = [(size, [module for module, its in self.groups.items() if its == size]) for size in rarer]
        targets.append((commonest, ["Linear"]))
        sections = {f"group_{index}": self._scheme(size, names) for index, (size, names) in enumerate(targets)}
        linear = [module for module, reason in self.left.items() if reason != _EMBEDDING]
        section = compressed_tensors().QuantizationConfig(
            config_groups=sections,
            format=_FORMATS[self.kind],
            quantization_status="compressed",
            ignore=sorted({"lm_head", *linear}),  # a tied head is in no file, and in the model all the same
        )
        written: dict[str, Any] = section.model_dump(mode="json")
        return {**written, "version": compressed_tensors().version}

    def _scheme(self, group: int, targets: list[str] | None = None) -> Any:
        if targets is None and group in self._schemes:
            return self._schemes[group]
        scheme = compressed_tensors().preset_name_to_scheme(_PRESETS[self.kind], targets or ["Linear"])
        scheme.format = _FORMATS[self.kind]
        if group:
            scheme.weights.group_size = group
        if targets is None:
            self._schemes[group] = scheme
        return scheme


_EMBEDDING = "an embedding"


def _left_as_it_is(module: str) -> str | None:
    names = module.split(".")
    if names[-1] in _EMBEDDINGS or (names[-1].startswith("embed_") and names[-1] not in _HEADS):
        return _EMBEDDING
    if names[-1] in _HEADS:
        return "the output head"
    if names[-1] in _ROUTERS:
        return "a router"
    if "norm" in names[-1]:
        return "a norm"
    if not _OTHER_SENSES.isdisjoint(names):
        return "it sees or hears"
    return None


def _conv1d_models() -> frozenset[str]:
    from lorakit.merge.layers import CONV1D_MODELS

    return CONV1D_MODELS
