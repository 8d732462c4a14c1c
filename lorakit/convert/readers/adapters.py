"""LoRA as torchtune and litgpt write it, as a folder in PEFT's layout."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.adapters.reading import WEIGHTS
from lorakit.convert.readers import litgpt, torchtune
from lorakit.convert.readers.templates import config_beside, head_size, renamed, template
from lorakit.errors import InvalidFile, NotFound, Refused
from lorakit.files.folders import read_json, whole_folder, write_all, write_json
from lorakit.files.plain_yaml import read_yaml
from lorakit.files.safetensors import planned_header
from lorakit.files.tensors import tensor_bytes
from lorakit.files.torch_file import StoredTorchTensor, read_torch_file
from lorakit.files.torch_tensors import DTYPES, load_torch_tensor

if TYPE_CHECKING:
    import torch

TORCHTUNE = "adapter_model.pt"
LITGPT = f"{litgpt.WEIGHTS}.lora"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_OF_TORCHTUNE = re.compile(r"(?P<module>.+)\.(?P<part>lora_a\.weight|lora_b\.weight|magnitude)")
_PARTS = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_OF_LITGPT = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])")


@dataclass(frozen=True, slots=True)
class _Peft:
    """The tensors by PEFT's names, and what its config has to say."""

    tensors: Mapping[str, torch.Tensor]
    rank: int
    alpha: float
    base: str | None = None
    magnitudes: bool = False


def is_foreign(path: Path) -> bool:
    """Whether it holds a LoRA in torchtune's or litgpt's own names."""
    if path.name == LITGPT or (path / LITGPT).is_file():
        return True
    file = path if path.name == TORCHTUNE else path / TORCHTUNE
    return file.is_file() and any(map(_OF_TORCHTUNE.fullmatch, _stored(file)))


def as_peft(path: Path, out: Path) -> None:
    """Write the LoRA that torchtune (`adapter_model.pt`) or litgpt (`lit_model.pth.lora`) left at `path` as an adapter
    in PEFT's layout, whole or not at all.

    Raises:
        NotFound: there is neither.
        InvalidFile: it is damaged, or what is beside it contradicts it.
        Refused: what says how strong it is (alpha) is not beside it, or its names are not known here.
        Conflict: `out` exists.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / LITGPT).is_file():
        found = _of_litgpt(folder)
    elif (folder / TORCHTUNE).is_file():
        found = _of_torchtune(folder)
    else:
        raise NotFound(f"'{path}' holds no adapter: neither {WEIGHTS} nor {TORCHTUNE} nor {LITGPT}")
    with whole_folder(out) as beside:
        _write(found, beside)


def _of_torchtune(folder: Path) -> _Peft:
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float)) or isinstance(alpha, bool):
        raise Refused(
            f"'{folder}' holds torchtune's LoRA, and no {CONFIG} that says r and lora_alpha, which its scale follows "
            f'from: write one, {{"peft_type": "LORA", "r": …, "lora_alpha": …}}, from its recipe\'s config'
        )
    model = config_beside(folder, f"'{folder / TORCHTUNE}' has torchtune's names")
    kind = model.get("model_type")
    if kind not in torchtune.ALTERNATING | torchtune.AS_THEY_ARE - {"phi3"}:
        raise Refused(f"'{folder}' is torchtune's LoRA of a {kind} model, whose order of rows is not known here")
    size = head_size(model, f"'{folder}'") if kind in torchtune.ALTERNATING else None
    tensors: dict[str, torch.Tensor] = {}
    for name, stored in _stored(folder / TORCHTUNE).items():
        match = _OF_TORCHTUNE.fullmatch(name)
        target = renamed(f"{match['module']}.weight" if match else name, torchtune.OWN)
        if match is None or target is None:
            raise Refused(f"'{folder / TORCHTUNE}' holds '{name}', for which lorakit has no name: update lorakit")
        module = target.removesuffix(".weight")
        tensor = load_torch_tensor(name, stored)
        if size and match["part"] != "lora_a.weight" and module.endswith((".q_proj", ".k_proj")):
            tensor = _halved(tensor, size, f"'{folder / TORCHTUNE}': '{name}'")
        tensors[f"{_PREFIX}{module}.{_PARTS[match['part']]}"] = tensor
    magnitudes = any(name.endswith("lora_magnitude_vector") for name in tensors)
    base = config.get("base_model_name_or_path")
    return _Peft(tensors, rank, float(alpha), base if isinstance(base, str) else None, magnitudes)


def _halved(tensor: torch.Tensor, size: int, where: str) -> torch.Tensor:
    """As `HalvedHeads` reads them."""
    if tensor.shape[0] % size:
        raise InvalidFile(f"{where} is {list(tensor.shape)}: these are no heads of {size} rows")
    return tensor.reshape(-1, size // 2, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _of_litgpt(folder: Path) -> _Peft:
    config = litgpt.read_lit_config(_beside(folder, litgpt.CONFIG))
    said = read_yaml(_beside(folder, "hyperparameters.yaml"))
    alpha = said.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise Refused(f"'{folder / 'hyperparameters.yaml'}' does not say lora_alpha, which its scale follows from")
    enabled = [bool(said.get(f"lora_{part}")) for part in ("query", "key", "value")]
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for name, stored in _stored(folder / LITGPT).items():
        match = _OF_LITGPT.fullmatch(name)
        if match is None:
            raise Refused(f"'{folder / LITGPT}' holds '{name}', which is no factor of a LoRA: merge it with litgpt")
        factors.setdefault(match["module"], {})[match["part"]] = load_torch_tensor(name, stored)
    tensors: dict[str, torch.Tensor] = {}
    ranks = set()
    for module, parts in factors.items():
        if parts.keys() != {"A", "B"} or any(part.dim() != 2 for part in parts.values()):
            raise InvalidFile(f"'{folder / LITGPT}': '{module}' has no lora_A and lora_B that are matrices")
        for target, a, b in _modules(module, parts["A"], parts["B"], config, enabled, folder / LITGPT):
            tensors[f"{_PREFIX}{target}.lora_A.weight"], tensors[f"{_PREFIX}{target}.lora_B.weight"] = a, b
            ranks.add(a.shape[0])
    if len(ranks) != 1:
        raise InvalidFile(f"'{folder / LITGPT}' has factors of the ranks {sorted(ranks)}, where litgpt knows one")
    base = said.get("checkpoint_dir")
    return _Peft(tensors, ranks.pop(), float(alpha), base if isinstance(base, str) and base else None)


def _modules(
    module: str, a: torch.Tensor, b: torch.Tensor, config: litgpt.LitConfig, enabled: Sequence[bool], file: Path
) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """The modules that a pair of factors is for: of `attn.qkv` those of q, k and v that were trained, one below the
    other in A and in B.
    """
    import torch

    place, numbers = template(f"{module}.weight")
    rank = b.shape[1]
    if place in (f"transformer.h.{{}}.attn.{fused}.weight" for fused in ("qkv", "attn")):
        trained = [(part, rows) for part, rows, on in zip(litgpt.PARTS, config.rows, enabled, strict=True) if on]
        if a.shape[0] != rank * len(trained) or b.shape[0] != sum(rows for _, rows in trained):
            said = ", ".join(part for part, _ in trained)
            raise InvalidFile(f"'{file}': the factors of '{module}' don't fit those of {said}, which were trained")
        targets = [f"model.layers.{numbers[0]}.self_attn.{part}" for part, _ in trained]
        sizes = [rows for _, rows in trained]
        return list(zip(targets, torch.split(a, rank), torch.split(b, sizes), strict=True))
    target = renamed(f"{module}.weight", litgpt.LLAMA)
    if target is None or a.shape[0] != rank:
        raise Refused(f"'{file}' changes '{module}', for which lorakit has no name: merge it with litgpt")
    return [(target.removesuffix(".weight"), a, b)]


def _beside(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise Refused(f"'{folder}' holds litgpt's LoRA, and no {name}, which litgpt writes beside it: copy it there")
    return folder / name


def _stored(file: Path) -> dict[str, StoredTorchTensor]:
    """The tensors of a file that holds nothing else.

    Raises:
        InvalidFile: it holds something else.
    """
    found: Any = read_torch_file(file)
    if isinstance(found, dict) and isinstance(found.get("model"), dict):
        found = found["model"]
    tensors = found if isinstance(found, dict) else {}
    if not tensors or not all(isinstance(one, StoredTorchTensor) for one in tensors.values()):
        raise InvalidFile(f"'{file}' holds something else than tensors by their names")
    return {str(name): tensor for name, tensor in tensors.items()}


def _write(found: _Peft, folder: Path) -> None:
    planned = [
        (name, DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in found.tensors.items()
    ]
    head, header = planned_header(folder / WEIGHTS, planned, {"format": "pt"})
    with (folder / WEIGHTS).open("xb") as stream:
        os.truncate(stream.fileno(), header.size)
        write_all(stream.fileno(), head, 0)
        for name, tensor in found.tensors.items():
            write_all(stream.fileno(), tensor_bytes(tensor.contiguous()), header.tensors[name].start)
    modules = {name.removeprefix(_PREFIX).partition(".lora_")[0] for name in found.tensors}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": found.rank, "lora_alpha": found.alpha,
        "target_modules": sorted(modules), "base_model_name_or_path": found.base, "use_dora": found.magnitudes,
        "inference_mode": True, "bias": "none",
    }  # fmt: skip
    write_json(folder / CONFIG, config)
