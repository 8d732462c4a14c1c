"""Tiny bases and adapters of every kind, made by transformers and PEFT, and what a merge of them has to be.

The measure is `exact_weights`: PEFT loads the adapter, and each of its layers' weight is written down as a formula in
float64. That the formulas are right is seen by the logits: a model with these weights answers as the *unmerged* one.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Conv1d, Conv2d, Embedding, Linear, LoraLayer, ParamWrapper
from peft.tuners.lora.variants import QALoraLinearVariant
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.models import CONFIGS, HEADS, LINEARS

SMALL = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2}
EXPERTS = {**SMALL, **HEADS, "tie_word_embeddings": False, "head_dim": 8}
TOKENS = (torch.arange(24) * 7 % 100)[None]
SIDES = r"(embed_tokens|wte|lm_head|proj_out)\.weight$"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


# --- models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    config: Any
    linears: Sequence[str] = tuple(LINEARS["llama"])
    loader: str = "AutoModelForCausalLM"
    inputs: Callable[[], dict[str, torch.Tensor]] = lambda: {"input_ids": TOKENS}

    def empty(self, config: Any) -> Any:
        return getattr(transformers, self.loader).from_config(copy.deepcopy(config))  # a model writes its dtype into it


def _picture(size: int) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(3))


_LLAVA = transformers.LlavaConfig(
    text_config=transformers.LlamaConfig(**SMALL, **HEADS).to_dict(),
    vision_config=transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    ).to_dict(),
    image_token_index=100,
    vision_feature_layer=-1,
    tie_word_embeddings=False,
)
FAMILIES: dict[str, Family] = {
    "llama": Family(CONFIGS["llama"]),
    "qwen2": Family(CONFIGS["qwen2"]),
    "gpt2": Family(CONFIGS["gpt2"], linears=LINEARS["gpt2"]),
    "tied-llama": Family(CONFIGS["tied-llama"]),
    "gemma3": Family(transformers.Gemma3TextConfig(**SMALL, **HEADS, head_dim=8, tie_word_embeddings=True)),
    "mixtral": Family(transformers.MixtralConfig(**EXPERTS, num_local_experts=4), linears=ATTENTION),
    "qwen3-moe": Family(
        transformers.Qwen3MoeConfig(**EXPERTS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20),
        linears=ATTENTION,
    ),
    "gpt-oss": Family(
        transformers.GptOssConfig(
            **EXPERTS, num_local_experts=4, num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        ),
        linears=ATTENTION,
    ),
    "llava": Family(
        _LLAVA,
        linears=["q_proj", "v_proj", "down_proj", "linear_1", "fc1"],
        loader="AutoModelForImageTextToText",
        inputs=lambda: {
            "input_ids": torch.cat([torch.full((1, 4), 100), TOKENS], dim=1),
            "pixel_values": _picture(16),
        },
    ),
    "vit": Family(
        transformers.ViTConfig(
            hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, image_size=16,
            patch_size=4, num_labels=5,
        ),
        linears=["q_proj", "v_proj"],
        loader="AutoModelForImageClassification",
        inputs=lambda: {"pixel_values": _picture(16)},
    ),
    "whisper": Family(
        transformers.WhisperConfig(
            vocab_size=101, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=44, decoder_ffn_dim=44, num_mel_bins=7, max_source_positions=12,
            max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        ),
        linears=["q_proj", "v_proj"],
        loader="AutoModelForSpeechSeq2Seq",
        inputs=lambda: {"input_features": _picture(24)[:, 0, :7], "decoder_input_ids": TOKENS},
    ),
    "wav2vec2": Family(
        transformers.Wav2Vec2Config(
            vocab_size=17, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=44,
            conv_dim=(12, 20), conv_kernel=(5, 3), conv_stride=(2, 2), num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2, apply_spec_augment=False,
        ),
        linears=["q_proj", "v_proj"],
        loader="AutoModelForCTC",
        inputs=lambda: {"input_values": _picture(20)[:, 0].flatten(1)},
    ),
}  # fmt: skip


def make_model(folder: Path, family: str, dtype: str = "float32", *, max_shard_size: str = "1GB") -> Path:
    torch.manual_seed(0)
    model = FAMILIES[family].empty(FAMILIES[family].config)
    with torch.no_grad():  # what starts as ones or zeros, so that nothing is right by chance
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def make_fused(folder: Path, family: str, dtype: str = "float32") -> Path:
    """A base whose file has the names of the running model: the experts of a layer in one tensor."""
    model = open_model(make_model(folder, family, dtype), family)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def open_model(folder: Path, family: str, dtype: str = "auto") -> Any:
    """As transformers loads it, where every tensor on disk has its place and every weight its tensor."""
    loader = getattr(transformers, FAMILIES[family].loader)
    model, info = loader.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def on_disk(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def names_on_disk(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    return names


# --- adapters -------------------------------------------------------------------------------------------------------

EXPECTED = (
    "Setting `save_embedding_layers` to `True`",
    "Model has `tie_word_embeddings=True`",
    "Model with `tie_word_embeddings=True`",
    "fan_in_fan_out is set to",
    ".*ensure_weight_tying.*",
    ".*`init_lora_weights`.*",
    r".*LoRA tensor\(s\) have invalid shape: .*lora_B\.bias",  # a bias is a vector, and PEFT 0.21 wonders at it
    # PEFT's own pattern, written as it fuses the factors of single experts
    r"The following (rank|alpha)_pattern keys did not match .*gate_up_proj",
    "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion",
    ".*changes the base weights of the model and should thus not be used with other adapters",
)


@contextmanager
def warnings_of_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in EXPECTED:
            warnings.filterwarnings("ignore", message=message)
        yield


Change = Callable[[Path], None]


@dataclass(frozen=True)
class Kind:
    """How an adapter is made: the settings of its LoraConfig, and what is done to the files that PEFT saves."""

    lora: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: int | None = None  # resized to, before training
    starts_from_base: bool = False  # changes the base at load, in the base's dtype
    group: int | None = None  # of QA-LoRA
    convert: bool = False  # saved with `path_initial_model_for_weight_conversion`
    change: Change | None = None

    def settings(self, family: str) -> dict[str, Any]:
        chosen = {"r": 8, "lora_alpha": 16, "target_modules": list(FAMILIES[family].linears), **self.lora}
        return {key: value(family) if callable(value) else value for key, value in chosen.items()}


def make_kind(folder: Path, base: Path, family: str, kind: Kind, *, seed: int = 1) -> Path:
    """An adapter of this kind as PEFT saves it, every trained tensor far from where it started."""
    torch.manual_seed(seed)
    model = _prepared(open_model(base, family, "float32"), kind)
    model.name_or_path = str(base)
    with warnings_of_peft():
        trained = get_peft_model(model, LoraConfig(**kind.settings(family)))
        if kind.convert:
            started = trained.peft_config["default"].init_lora_weights
            trained.peft_config["default"].init_lora_weights = True
            trained.save_pretrained(folder.with_name(folder.name + "-start"))
            trained.peft_config["default"].init_lora_weights = started
        if kind.group:
            _pool_inputs(trained, kind.group)
        train(trained, from_base=kind.starts_from_base)
        start = {"path_initial_model_for_weight_conversion": f"{folder}-start"} if kind.convert else {}
        trained.save_pretrained(folder, **start)
    if kind.group:
        edit_config(folder, use_qalora=True, qalora_group_size=kind.group)
    if kind.change:
        kind.change(folder)
    return folder


def _prepared(model: Any, kind: Kind) -> Any:
    if kind.vocabulary:
        model.resize_token_embeddings(kind.vocabulary, mean_resizing=False)
    return model


@torch.no_grad()
def train(model: Any, *, from_base: bool = False) -> None:
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        noise = torch.randn_like(parameter)
        if "lora_magnitude_vector" in name:
            parameter.mul_(1 + 0.3 * noise.clamp(-2, 2))
        elif "lora_" in name and not from_base:
            parameter.copy_(0.1 * noise)
        else:
            parameter.add_(noise, alpha=0.05)


def _pool_inputs(model: Any, group: int) -> None:
    """PEFT takes `use_qalora` for quantised layers alone: put its own variant on plain ones."""
    for module in model.modules():
        if isinstance(module, Linear):
            rank, width = module.lora_A["default"].weight.shape
            module.lora_A["default"] = torch.nn.Linear(width // group, rank, bias=False)
            module.qalora_group_size = {"default": group}
            module.lora_variant["default"] = QALoraLinearVariant()


def edit_config(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def rename_tensors(folder: Path, rename: Callable[[str], str | None]) -> None:
    """Write the adapter's file again with other names; None leaves a tensor out."""
    file = folder / "adapter_model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in tensors.items() if name}, file, metadata={"format": "pt"})


# --- what is right --------------------------------------------------------------------------------------------------


def unmerged(base: Path, family: str, adapters: Sequence[Path], kind: Kind) -> PeftModel:
    """The base with its adapters beside it, in float32; where PEFT changes the base at load, in the base's dtype."""
    model = _prepared(open_model(base, family, "auto" if kind.starts_from_base else "float32"), kind)
    with warnings_of_peft():
        if kind.group:
            model = get_peft_model(model, LoraConfig(**kind.settings(family)))
            _pool_inputs(model, kind.group)
            known = load_file(adapters[0] / "adapter_model.safetensors")
            known = {re.sub(r"(lora_[AB])\.", r"\1.default.", name): tensor for name, tensor in known.items()}
            assert not model.load_state_dict(known, strict=False).unexpected_keys
        else:
            model = PeftModel.from_pretrained(model, adapters[0], adapter_name="default")
        for count, folder in enumerate(adapters[1:]):
            model.load_adapter(folder, adapter_name=f"more{count}")
        if adapters[1:]:
            model.base_model.set_adapter(list(model.peft_config))
    copies = kind.lora.get("layer_replication")
    if copies and getattr(model.config, "layer_types", None):  # PEFT forgets them, and the model can't run without
        kinds_of_layers = model.config.layer_types
        model.config.layer_types = [kinds_of_layers[layer] for first, end in copies for layer in range(first, end)]
        model.get_base_model().model.config.layer_types = model.config.layer_types
    return model.eval()


@dataclass(frozen=True)
class Exact:
    """The weights of the merged model in float64, by the running model's names, and which of them are changed."""

    weights: dict[str, torch.Tensor]
    changed: set[str]
    config: Any
    tied: bool


@torch.no_grad()
def exact_weights(model: PeftModel, before: Mapping[str, torch.Tensor]) -> Exact:
    """`before`: the weights of the base alone."""
    base = model.get_base_model()
    weights = {
        plain_name(name): tensor.double().clone()
        for name, tensor in base.state_dict().items()
        if not re.search(r"lora_|\.modules_to_save\.|\.trainable_tokens_", name)
    }
    for path, module in base.named_modules():
        name = plain_name(path)
        if isinstance(module, ModulesToSaveWrapper):
            for leaf, tensor in module.modules_to_save["default"].state_dict().items():
                weights[f"{name}.{leaf}"] = tensor.double()
        elif isinstance(module, TrainableTokensWrapper):
            rows = module.token_adapter
            weights[f"{name}.weight"][rows.token_indices["default"]] = rows.trainable_tokens_delta["default"].double()
        elif isinstance(module, ParamWrapper):
            target = f"{name}.{module.parameter_name}"
            weights[target] = weights[target] + _of_experts(module)
        elif isinstance(module, LoraLayer):
            _add(module, name, weights)
    changed = {name for name in weights if name not in before or not _same(weights[name], before[name].double())}
    return Exact(weights, changed, base.config, _is_tied(base, weights))


def plain_name(path: str) -> str:
    return re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.|$)", "", path)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _is_tied(base: Any, weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether the embedding and the head are one weight still."""
    if not getattr(base.config.get_text_config(), "tie_word_embeddings", False) or base.get_output_embeddings() is None:
        return False
    one, *others = [tensor for name, tensor in weights.items() if re.search(SIDES, name)]
    return all(other.shape == one.shape and torch.allclose(other, one, rtol=1e-12, atol=1e-12) for other in others)


def _add(module: Any, name: str, weights: dict[str, torch.Tensor]) -> None:
    """What LoRA's layers compute, as one weight: arXiv:2106.09685 and 2402.09353, PEFT's tuners/lora/layer.py."""
    inside = f"{name}.weight"
    start = weights[inside]  # DoRA's norm is of the unmerged weight, whichever adapters came before
    for adapter in module.active_adapters:
        scale = module.scaling.get(adapter)
        if scale is None:
            continue
        if isinstance(module, Embedding):
            a, b = module.lora_embedding_A[adapter].double(), module.lora_embedding_B[adapter].double()
            delta, outputs = scale * (b @ a).T, 1
        else:
            a, b = (factors[adapter].weight.double() for factors in (module.lora_A, module.lora_B))
            outputs = 0
            if isinstance(module, Conv1d | Conv2d):
                delta = scale * torch.einsum("or,r...->o...", b.flatten(1), a)
            else:
                group = getattr(module, "qalora_group_size", {}).get(adapter)
                if group:  # the mean of each group, times the number of groups
                    a = a.repeat_interleave(group, dim=1) * a.shape[1] / group
                delta = scale * (b @ a)
                if module.fan_in_fan_out:
                    delta, outputs = delta.T, 1
            if module.lora_B[adapter].bias is not None:
                bias = weights[f"{name}.bias"]
                weights[f"{name}.bias"] = bias + scale * module.lora_B[adapter].bias.double()
        weights[inside] = weights[inside] + delta
        if module.use_dora.get(adapter):
            magnitude = module.lora_magnitude_vector[adapter].weight.double()
            others = tuple(axis for axis in range(start.ndim) if axis != outputs)
            norm = (start + delta).square().sum(dim=others, keepdim=True).sqrt()
            weights[inside] = magnitude.reshape(norm.shape) / norm * weights[inside]


def _of_experts(module: Any) -> torch.Tensor:
    """PEFT packs A as (expert, rank) × in, and B as out × (rank, expert)."""
    adapter = module.active_adapters[0]
    weight = module.get_param()
    experts = weight.shape[0] if weight.ndim == 3 else 1
    a, b = (factors[adapter].weight.double() for factors in (module.lora_A, module.lora_B))
    a = a.reshape(experts, -1, a.shape[1])
    b = b.reshape(b.shape[0], -1, experts)
    delta = module.scaling[adapter] * torch.stack([b[:, :, expert] @ a[expert] for expert in range(experts)])
    if weight.ndim == 2:
        return delta[0]
    stored_as_in_out = getattr(module.get_base_layer(), "is_transposed", False)
    return delta.transpose(1, 2) if stored_as_in_out else delta


def answers(model: Any, family: str) -> torch.Tensor:
    with torch.inference_mode():
        return model(**FAMILIES[family].inputs()).logits.float()


def model_of(exact: Exact, family: str) -> Any:
    """A model with exactly these weights, in float32, and nothing of PEFT."""
    config = type(exact.config).from_dict(exact.config.to_dict())
    if any(re.search(SIDES, name) for name in exact.weights):
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = exact.tied
    model = FAMILIES[family].empty(config).float()
    model.load_state_dict({name: tensor.float() for name, tensor in exact.weights.items()})
    return model.eval()


# --- comparing ------------------------------------------------------------------------------------------------------


def assert_rounded_once(mine: torch.Tensor, exact64: torch.Tensor) -> None:
    """Equal to one rounding of the exact values, but for ties that float32 arithmetic may see otherwise.

    Raises:
        AssertionError: more than one element in a thousand differs (of a small tensor: more than three), or one by
            more than its last bit.
    """
    assert exact64.dtype == torch.float64
    assert mine.shape == exact64.shape
    if mine.dtype == torch.float32:
        torch.testing.assert_close(mine.double(), exact64, rtol=1e-5, atol=1e-6)
        return
    rounded = exact64.to(mine.dtype)
    different = mine != rounded
    many = int(different.sum())
    assert many <= max(3, mine.numel() // 1000), f"{many} of {mine.numel()} are not the exact values rounded once"
    noise = exact64.abs().max() * 2**-22  # of the sum in float32, which is all there is where a sum is nearly zero
    near = (_in_order(mine) - _in_order(rounded)).abs() <= 1
    assert bool((near | ((mine.double() - exact64).abs() <= noise)).all()), "more than one last bit away"


def _in_order(tensor: torch.Tensor) -> torch.Tensor:
    """Whole numbers in the order of the 16-bit floats, neighbours one apart."""
    bits = tensor.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
