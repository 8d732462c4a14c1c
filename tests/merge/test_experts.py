"""LoRA on all experts at once is merged as PEFT merges it, however the base stores its experts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from lorakit.adapters.config import parse_config
from lorakit.adapters.keys import parse_key
from lorakit.errors import UnsupportedAdapter, UsageError, WrongBase
from lorakit.files.safetensors import StoredTensor, read_header
from lorakit.files.tensors import load_tensor
from lorakit.merge.experts import expert_products, expert_slice
from lorakit.merge.resolve import Resolver
from lorakit.merge.steps import AddProduct, Matrix

EXPERTS = 4
BOTH = ("experts.gate_up_proj", "experts.down_proj")
SIZES: Mapping[str, tuple[int, int]] = {"oblong": (16, 12), "square upper": (16, 8), "square lower": (12, 12)}
SHARED: Mapping[str, Any] = {
    "vocab_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    "tie_word_embeddings": False, "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def qwen(hidden: int, expert: int) -> Any:
    sizes = {"hidden_size": hidden, "moe_intermediate_size": expert, "intermediate_size": 24}
    return Qwen3MoeConfig(**SHARED, **sizes, num_experts=EXPERTS)


def mixtral(hidden: int, expert: int) -> Any:
    return MixtralConfig(**SHARED, hidden_size=hidden, intermediate_size=expert, num_local_experts=EXPERTS)


def gpt_oss(hidden: int, expert: int) -> Any:
    return GptOssConfig(**SHARED, hidden_size=hidden, intermediate_size=expert, num_local_experts=EXPERTS)


def llama4(hidden: int, expert: int) -> Any:
    sizes = {"hidden_size": hidden, "intermediate_size": expert, "intermediate_size_mlp": 24}
    return Llama4TextConfig(**SHARED, **sizes, num_local_experts=EXPERTS, interleave_moe_layer_step=1)


FAMILIES: Mapping[str, Callable[[int, int], Any]] = {
    "qwen": qwen, "mixtral": mixtral, "gpt_oss": gpt_oss, "llama4": llama4,
}  # fmt: skip


def base_of(config: Any, folder: Path, *, fused: bool) -> dict[str, StoredTensor]:
    """Save a base as transformers does, with each expert apart where the family has it so, or with all in one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    model.save_pretrained(folder)
    if fused:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, _weights(folder))
    return dict(read_header(_weights(folder)).tensors)


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def adapter_of(base: Path, folder: Path, targets: Sequence[str], **settings: Any) -> dict[str, torch.Tensor]:
    """Save an adapter that looks trained; give back what PEFT makes of the base with it."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": [], **settings}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    peft = get_peft_model(model, LoraConfig(**settings, target_parameters=list(targets)))
    torch.manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    peft.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    return dict(PeftModel.from_pretrained(again, folder).merge_and_unload().state_dict())


def pairs_in(folder: Path) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    found: dict[str, dict[str, StoredTensor]] = {}
    for stored in read_header(folder / "adapter_model.safetensors").tensors.values():
        key = parse_key(stored.name)
        found.setdefault(key.module, {})[key.part] = stored
    return {module: (parts["lora_A"], parts["lora_B"]) for module, parts in found.items()}


def products_of(
    folder: Path, tensors: Mapping[str, StoredTensor], *, layout: str | None = None
) -> list[tuple[str, AddProduct]]:
    config = parse_config(json.loads((folder / "adapter_config.json").read_text()), folder)
    products, without = expert_products(
        config, pairs_in(folder), tensors, Resolver(tensors), name=str(folder), layout=layout
    )
    assert without == []
    return products


def merged(base: Path, products: Sequence[tuple[str, AddProduct]]) -> dict[str, torch.Tensor]:
    """The base's tensors with the products added in float64, as transformers reads them from a folder."""
    tensors = load_file(_weights(base))
    for name, product in products:
        weight = tensors[name].view(-1, tensors[name].shape[-1])
        delta = product.factor * (values_of(product.B) @ values_of(product.A))
        delta = delta.T if product.transposed else delta
        assert delta.shape == product.shape
        weight[product.first_row : product.first_row + delta.shape[0]] += delta
    out = base.parent / "merged"
    AutoConfig.from_pretrained(base).save_pretrained(out)
    save_file(tensors, _weights(out), {"format": "pt"})
    return dict(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64).state_dict())


def values_of(matrix: Matrix) -> torch.Tensor:
    whole = load_tensor(matrix.stored).view(matrix.view)
    return whole[tuple(pick if isinstance(pick, int) else slice(*(pick or (None,))) for pick in matrix.picked)]


def assert_same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "upper", "lower"])
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["qwen", "mixtral"])
def test_it_is_peft_s_merge(tmp_path: Path, family: str, size: str, fused: bool, targets: Sequence[str]) -> None:
    tensors = base_of(FAMILIES[family](*SIZES[size]), tmp_path / "base", fused=fused)
    assert any(".experts.0." in name for name in tensors) is not fused
    wanted = adapter_of(tmp_path / "base", tmp_path / "adapter", targets)
    assert_same(merged(tmp_path / "base", products_of(tmp_path / "adapter", tensors)), wanted)


@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "upper", "lower"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
def test_it_is_peft_s_merge_where_the_input_comes_first(
    tmp_path: Path, family: str, size: str, targets: Sequence[str]
) -> None:
    tensors = base_of(FAMILIES[family](*SIZES[size]), tmp_path / "base", fused=False)
    wanted = adapter_of(tmp_path / "base", tmp_path / "adapter", targets)
    assert_same(merged(tmp_path / "base", products_of(tmp_path / "adapter", tensors)), wanted)


def test_the_order_of_target_parameters_means_nothing(tmp_path: Path) -> None:
    tensors = base_of(qwen(12, 12), tmp_path / "base", fused=False)
    wanted = adapter_of(tmp_path / "base", tmp_path / "adapter", BOTH[::-1])
    for order in (BOTH, BOTH[::-1]):
        change(tmp_path / "adapter", target_parameters=list(order))
        assert_same(merged(tmp_path / "base", products_of(tmp_path / "adapter", tensors)), wanted)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")  # PEFT looks at modules alone there
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_ranks_and_scales_are_those_of_each_parameter(tmp_path: Path, fused: bool) -> None:
    tensors = base_of(qwen(12, 12), tmp_path / "base", fused=fused)
    patterns = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"1.mlp.experts.gate_up_proj": 9}}
    wanted = adapter_of(tmp_path / "base", tmp_path / "adapter", BOTH, use_rslora=True, **patterns)
    assert_same(merged(tmp_path / "base", products_of(tmp_path / "adapter", tensors)), wanted)


def test_a_weight_is_a_factor_of_the_whole(tmp_path: Path) -> None:
    tensors = base_of(qwen(16, 12), tmp_path / "base", fused=True)
    adapter_of(tmp_path / "base", tmp_path / "adapter", BOTH)
    config = parse_config(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()), tmp_path)
    products, _ = expert_products(
        config, pairs_in(tmp_path / "adapter"), tensors, Resolver(tensors), name="x", weight=-0.5
    )
    assert {product.factor for _, product in products} == {-0.5 * 5 / 3}


# how the factors are packed


def change(folder: Path, repack: Callable[[str, torch.Tensor], torch.Tensor] | None = None, **settings: Any) -> None:
    """Write an adapter anew with other settings (None removes one) and packed otherwise."""
    file = folder / "adapter_config.json"
    raw = {**json.loads(file.read_text()), **settings}
    file.write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))
    if repack is not None:
        weights = load_file(folder / "adapter_model.safetensors")
        packed = {name: repack(name, tensor).contiguous() for name, tensor in weights.items()}
        save_file(packed, folder / "adapter_model.safetensors")


def grouped_by_expert(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if "lora_A" in name:
        return tensor
    return tensor.view(len(tensor), -1, EXPERTS).transpose(1, 2).reshape(tensor.shape)


def turn_over(folder: Path) -> None:
    """Keep the delta, with the sides that PEFT before 0.19 had: A' = Bᵀ, B' = Aᵀ for each expert."""
    old = load_file(folder / "adapter_model.safetensors")
    new = {}
    for name in old:
        if "lora_A" in name:
            a, b = old[name], old[name.replace("lora_A", "lora_B")]
            new[name] = b.view(len(b), -1, EXPERTS).permute(2, 1, 0).reshape(-1, len(b)).contiguous()
            turned = a.view(EXPERTS, -1, a.shape[1]).permute(2, 1, 0).reshape(a.shape[1], -1)
            new[name.replace("lora_A", "lora_B")] = turned.contiguous()
    save_file(new, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize(
    ("marks", "layout"),
    [
        ({"lora_B_layout": "grouped_by_expert"}, None),
        ({"lora_B_layout": "grouped_by_expert"}, "peft"),
        ({"auto_mapping": {"unsloth_fixed": True}}, "unsloth"),
        ({}, "unsloth"),
    ],
    ids=["marked", "marked, and the flag says otherwise", "known to be Unsloth's", "the flag alone"],
)
def test_the_order_of_unsloth_gives_the_same_as_peft_s(
    tmp_path: Path, marks: Mapping[str, Any], layout: str | None, fused: bool
) -> None:
    tensors = base_of(qwen(16, 12), tmp_path / "base", fused=fused)
    wanted = adapter_of(tmp_path / "base", tmp_path / "adapter", BOTH)
    change(tmp_path / "adapter", grouped_by_expert, **marks)
    assert_same(merged(tmp_path / "base", products_of(tmp_path / "adapter", tensors, layout=layout)), wanted)


@pytest.mark.parametrize("marks", [{"lora_B_layout": "rank_major"}, {}], ids=["marked", "told"])
def test_unsloth_s_later_order_is_peft_s(tmp_path: Path, marks: Mapping[str, Any]) -> None:
    tensors = base_of(qwen(16, 12), tmp_path / "base", fused=True)
    wanted = adapter_of(tmp_path / "base", tmp_path / "adapter", BOTH)
    change(tmp_path / "adapter", base_model_name_or_path="unsloth/tiny", **marks)
    products = products_of(tmp_path / "adapter", tensors, layout=None if marks else "peft")
    assert_same(merged(tmp_path / "base", products), wanted)


def test_with_rank_one_both_orders_are_the_same(tmp_path: Path) -> None:
    tensors = base_of(qwen(16, 12), tmp_path / "base", fused=True)
    wanted = adapter_of(tmp_path / "base", tmp_path / "adapter", BOTH, r=1)
    change(tmp_path / "adapter", base_model_name_or_path="unsloth/tiny")
    assert_same(merged(tmp_path / "base", products_of(tmp_path / "adapter", tensors)), wanted)


@pytest.mark.parametrize("where", ["config", "readme"])
def test_an_adapter_of_unsloth_that_does_not_say_its_order_is_refused(tmp_path: Path, where: str) -> None:
    tensors = base_of(qwen(16, 12), tmp_path / "base", fused=True)
    adapter_of(tmp_path / "base", tmp_path / "adapter", BOTH)
    if where == "config":
        change(tmp_path / "adapter", base_model_name_or_path="unsloth/tiny-bnb-4bit")
    else:
        (tmp_path / "adapter" / "README.md").write_text("tags:\n- Unsloth\n")
    with pytest.raises(UnsupportedAdapter, match=r"--expert-layout unsloth .* or --expert-layout peft"):
        products_of(tmp_path / "adapter", tensors)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("targets", [BOTH[:1], BOTH[1:], BOTH], ids=["upper", "lower", "both"])
def test_the_sides_of_older_peft_give_the_same(tmp_path: Path, size: str, targets: Sequence[str]) -> None:
    tensors = base_of(qwen(*SIZES[size]), tmp_path / "base", fused=False)
    wanted = adapter_of(tmp_path / "base", tmp_path / "adapter", targets)
    turn_over(tmp_path / "adapter")
    change(tmp_path / "adapter", peft_version="0.18.1")
    assert_same(merged(tmp_path / "base", products_of(tmp_path / "adapter", tensors)), wanted)
    change(tmp_path / "adapter", peft_version=None)
    assert_same(merged(tmp_path / "base", products_of(tmp_path / "adapter", tensors, layout="peft-0.18")), wanted)


def test_square_experts_of_an_unknown_version_are_refused(tmp_path: Path) -> None:
    tensors = base_of(qwen(16, 8), tmp_path / "base", fused=False)
    wanted = adapter_of(tmp_path / "base", tmp_path / "adapter", BOTH[:1])
    change(tmp_path / "adapter", peft_version=None)
    with pytest.raises(UnsupportedAdapter, match=r"peft_version.*--expert-layout peft"):
        products_of(tmp_path / "adapter", tensors)
    assert_same(merged(tmp_path / "base", products_of(tmp_path / "adapter", tensors, layout="peft")), wanted)


# what does not fit


def test_without_target_parameters_the_shapes_and_the_nesting_say_which(tmp_path: Path) -> None:
    tensors = base_of(qwen(16, 12), tmp_path / "base", fused=False)
    wanted = adapter_of(tmp_path / "base", tmp_path / "adapter", BOTH)
    change(tmp_path / "adapter", target_parameters=None)
    assert_same(merged(tmp_path / "base", products_of(tmp_path / "adapter", tensors)), wanted)


def test_one_wrapper_that_fits_two_parameters_is_refused(tmp_path: Path) -> None:
    tensors = {name: stored_as(name, (2, 8, 8)) for name in ("experts.up_proj", "experts.down_proj")}
    pair = stored_as("a", (4, 8)), stored_as("b", (8, 4))
    config = parse_config({"peft_type": "LORA", "r": 2}, tmp_path)
    with pytest.raises(UnsupportedAdapter, match=r"experts.up_proj, experts.down_proj.*target_parameters"):
        expert_products(config, {"experts": pair}, tensors, Resolver(tensors), name="x")


@pytest.mark.parametrize("settings", [{"r": 4}, {}], ids=["rank", "shape"])
def test_factors_that_fit_nothing_are_of_another_base(tmp_path: Path, settings: Mapping[str, int]) -> None:
    tensors = base_of(qwen(16, 12), tmp_path / "base", fused=False)
    adapter_of(tmp_path / "base", tmp_path / "adapter", BOTH)
    change(tmp_path / "adapter", **settings)
    if not settings:
        tensors = base_of(qwen(16, 20), tmp_path / "other", fused=False)
    with pytest.raises(WrongBase, match=r"made for another base: it has 'model.layers.0.mlp.experts"):
        products_of(tmp_path / "adapter", tensors)


def test_modules_that_the_base_does_not_have_are_given_back(tmp_path: Path) -> None:
    tensors = base_of(qwen(16, 12), tmp_path / "base", fused=False)
    adapter_of(tmp_path / "base", tmp_path / "adapter", BOTH)
    kept = {name: stored for name, stored in tensors.items() if ".layers.1." not in name}
    config = parse_config(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()), tmp_path)
    products, without = expert_products(config, pairs_in(tmp_path / "adapter"), kept, Resolver(kept), name="x")
    assert sorted(without) == ["model.layers.1.mlp.experts", "model.layers.1.mlp.experts.base_layer"]
    assert {name.split(".")[2] for name, _ in products} == {"0"}


def test_a_layout_that_does_not_exist_is_a_mistake_of_usage(tmp_path: Path) -> None:
    config = parse_config({"peft_type": "LORA", "r": 2}, tmp_path)
    with pytest.raises(UsageError, match=r"'zoo': it is one of peft, peft-0.18, unsloth"):
        expert_products(config, {}, {}, Resolver([]), name="x", layout="zoo")


# one expert of an adapter, all experts of a base


def stored_as(name: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(name, Path("nowhere"), "F32", shape, 0, 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("qwen", "model.layers.{}.mlp.experts.{}.{}"),
        ("mixtral", "model.layers.{}.block_sparse_moe.experts.{}.{}"),
    ],
)
def test_each_expert_s_own_factors_find_their_rows(tmp_path: Path, family: str, modules: str, size: str) -> None:
    hidden, expert = SIZES[size]
    apart = base_of(FAMILIES[family](hidden, expert), tmp_path / "a" / "base", fused=False)
    fused = base_of(FAMILIES[family](hidden, expert), tmp_path / "b" / "base", fused=True)
    resolver = Resolver(fused)
    layers = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    paths = [modules.format(layer, index, name) for layer in range(2) for index in range(EXPERTS) for name in layers]
    factors = {}
    for path in paths:
        out, into = apart[f"{path}.weight"].shape
        factors[f"{path}.A"] = torch.randn(3, into, dtype=torch.float64)
        factors[f"{path}.B"] = torch.randn(out, 3, dtype=torch.float64)
    save_file(factors, tmp_path / "factors.safetensors")
    stored = read_header(tmp_path / "factors.safetensors").tensors
    ours, theirs = [], []
    for path in paths:
        b, a = (Matrix(stored[f"{path}.{part}"], stored[f"{path}.{part}"].shape, (None, None)) for part in "BA")
        place = expert_slice(path, (b.shape[0], a.shape[1]), fused, resolver)
        assert place is not None
        ours.append((place.weight, AddProduct(b, a, 0.5, place.transposed, place.first_row)))
        theirs.append((f"{path}.weight", AddProduct(b, a, 0.5)))
    assert_same(merged(tmp_path / "b" / "base", ours), merged(tmp_path / "a" / "base", theirs))


def test_a_base_with_each_expert_apart_has_no_such_rows(tmp_path: Path) -> None:
    tensors = base_of(qwen(16, 12), tmp_path / "base", fused=False)
    assert expert_slice("model.layers.0.mlp.experts.0.up_proj", (12, 16), tensors, Resolver(tensors)) is None
    assert expert_slice("model.layers.0.self_attn.q_proj", (12, 16), tensors, Resolver(tensors)) is None


@pytest.mark.parametrize(("hidden", "expert"), [(16, 12), (16, 8), (12, 12)])
def test_where_the_input_comes_first_the_lower_layer_alone_is_rows(hidden: int, expert: int) -> None:
    upper = stored_as("model.layers.0.feed_forward.experts.gate_up_proj", (4, hidden, 2 * expert))
    lower = stored_as("model.layers.0.feed_forward.experts.down_proj", (4, expert, hidden))
    tensors = {upper.name: upper, lower.name: lower}
    module = "model.layers.0.feed_forward.experts.2."
    place = expert_slice(module + "down_proj", (hidden, expert), tensors, Resolver(tensors))
    assert place is not None
    assert (place.weight, place.first_row, place.transposed) == (lower.name, 2 * expert, True)
    with pytest.raises(UnsupportedAdapter, match="no block of rows"):
        expert_slice(module + "up_proj", (expert, hidden), tensors, Resolver(tensors))


def test_alternating_halves_are_refused(tmp_path: Path) -> None:
    tensors = base_of(gpt_oss(16, 8), tmp_path / "base", fused=False)
    with pytest.raises(UnsupportedAdapter, match="no block of rows"):
        expert_slice("model.layers.0.mlp.experts.0.gate_proj", (8, 16), tensors, Resolver(tensors))


@pytest.mark.parametrize(("index", "shape"), [(4, (12, 16)), (0, (13, 16))])
def test_an_expert_that_is_not_there_is_another_base_s(tmp_path: Path, index: int, shape: tuple[int, int]) -> None:
    tensors = base_of(qwen(16, 12), tmp_path / "base", fused=True)
    with pytest.raises(WrongBase, match="made for another base"):
        expert_slice(f"model.layers.0.mlp.experts.{index}.gate_proj", shape, tensors, Resolver(tensors))
