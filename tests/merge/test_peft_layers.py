"""Oracle throughout: `merge_and_unload` of PEFT on the whole model, loaded from the adapter's folder."""

from __future__ import annotations

import copy
import json
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorakit.errors import InvalidFile, LorakitError, UnsupportedAdapter, WrongBase
from lorakit.files.safetensors import read_header
from lorakit.merge.peft_layers import (
    CHANGES_BIAS,
    PREFIXES,
    REFUSED,
    Layer,
    PeftLayers,
    needs_order,
    require_mergeable,
    target_modules,
)

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Many small SVDs: threads would wait for one another most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class ConvConfig(PreTrainedConfig):
    model_type = "tiny-conv"


class ConvModel(PreTrainedModel):
    config_class = ConvConfig

    def __init__(self, config: ConvConfig) -> None:
        super().__init__(config)
        self.conv1 = torch.nn.Conv1d(8, 16, 3)
        self.conv2 = torch.nn.Conv2d(8, 16, 3)
        self.point = torch.nn.Conv2d(8, 16, 1, bias=False)
        self.post_init()


def make_model(family: str) -> Any:
    return copy.deepcopy(_model(family))


@cache
def _model(family: str) -> Any:
    """Weights and biases that are far from zero, the same each time."""
    torch.manual_seed(0)
    if family == "llama":
        config = LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True, tie_word_embeddings=False)
        model = AutoModelForCausalLM.from_config(config)
    elif family == "gpt2":
        config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=1)
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = ConvModel(ConvConfig())
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name or ".ln_" in name else 0.0
        torch.nn.init.normal_(parameter, mean, std=0.3)
    return model


@dataclass(frozen=True)
class Case:
    method: str
    family: str = "llama"
    settings: dict[str, Any] = field(default_factory=dict)
    targets: Any = None  # its own where None

    def __str__(self) -> str:
        said = "-".join(f"{key}={value}" for key, value in self.settings.items())
        return "-".join(part for part in (self.method, self.family, said, self.targets and "targets") if part)


# What a method needs to be small, or to fit 32 and 64.
SMALL: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 16},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 20},
    "GLORA": {"r": 4},
    "GRALORA": {"r": 8},
    "HIRA": {"r": 4},
    "MISS": {"r": 8},
    "OFT": {"r": 0, "oft_block_size": 8},
    "PEANUT": {"r": 4, "depth": 1},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "TINYLORA": {"u": 4},
    "TRAINABLE_TOKENS": {"token_indices": [1, 7]},
    "UNILORA": {"r": 2, "theta_d_length": 64},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "topk": 2, "r": 2},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 20},
}
TARGETS: dict[tuple[str, str], Any] = {
    ("llama", "TRAINABLE_TOKENS"): ["embed_tokens"],
    ("gpt2", "TRAINABLE_TOKENS"): ["wte"],
    ("llama", "LN_TUNING"): ["input_layernorm", "norm"],
    ("gpt2", "LN_TUNING"): ["ln_1"],
    ("llama", "BEFT"): ["v_proj", "q_proj"],
    ("conv", "IA3"): ["conv2"],
}
OFTEN = {"llama": ["v_proj", "q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc", "mlp.c_proj"], "conv": ["conv2"]}

CASES = [
    *(Case(method) for method in PREFIXES if method != "BONE"),
    Case("DEFT", settings={"decomposition_method": "qr"}),
    Case("DEFT", settings={"para": True}),
    Case("LOHA", settings={"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.0.self_attn.v_proj": 5}}),
    Case("LOHA", settings={"layers_to_transform": [1]}),
    Case("LOHA", targets=r".*\.1\.mlp\.(up|down)_proj"),
    Case("LOHA", targets="all-linear"),
    Case("LOKR", settings={"decompose_both": True, "r": 2, "decompose_factor": 4}),
    Case("MISS", settings={"init_weights": "bat"}),
    Case("OFT", settings={"coft": True}),
    Case("OFT", settings={"block_share": True}),
    Case("PSOFT", settings={"psoft_svd": "lowrank"}),
    Case("ROAD", settings={"variant": "road_4"}),
    Case("SUPERTUNING", settings={"r": 4}),
    Case("TINYLORA", settings={"save_projection": False}),
    Case("TINYLORA", settings={"weight_tying": 1.0}),
    Case("UNILORA", settings={"save_indices": True}),
    Case("VBLORA", settings={"save_only_topk_weights": True}),
    Case("VERA", settings={"save_projection": False}),
    Case("RANDLORA", settings={"save_projection": False}),
    Case("LN_TUNING", "gpt2"),
    Case("TRAINABLE_TOKENS", "gpt2"),
    *(
        Case(method, "gpt2", {"fan_in_fan_out": True})
        for method in (
            "ADALORA", "DEFT", "FOURIERFT", "FROD", "IA3", "RANDLORA", "TINYLORA", "UNILORA", "VBLORA",
            "VERA", "WAVEFT",
        )
    ),
    *(Case(method, "conv") for method in ("BOFT", "HRA", "IA3", "LOHA", "LOKR", "OFT", "HIRA")),
    Case("LOHA", "conv", {"use_effective_conv2d": True}, ["conv1", "conv2", "point"]),
    Case("LOKR", "conv", {"use_effective_conv2d": True, "r": 2}, ["conv1", "conv2", "point"]),
    Case("HIRA", targets=["embed_tokens"]),
    Case("TINYLORA", targets=["embed_tokens", "q_proj"]),
]  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_adapter(folder: Path, case: Case, ranks: Mapping[str, list[bool]] | None = None) -> Path:
    """An adapter with values far from those it starts with."""
    model = make_model(case.family)
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[case.method]
    targets = case.targets or TARGETS.get((case.family, case.method), OFTEN[case.family])
    settings = {"target_modules": targets, **SMALL.get(case.method, {}), **case.settings}
    if case.method == "IA3":
        settings.setdefault("feedforward_modules", [name for name in targets if name in ("down_proj", "mlp.c_proj")])
    with quiet():
        adapted = get_peft_model(model, kind(**settings))
        if ranks:
            adapted.peft_config["default"].rank_pattern = ranks
        torch.manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if ".default" in name or ".modules_to_save" in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
        adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merged_by_peft(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    with quiet():
        torch.manual_seed(3)
        model = PeftModel.from_pretrained(make_model(case.family).to(dtype), folder)
        return dict(model.merge_and_unload().state_dict())


def layers_of(model: Any) -> dict[str, Layer]:
    """In the order of the model's class."""
    kinds = {torch.nn.Linear: "linear", Conv1D: "conv1d", torch.nn.Embedding: "embedding"}
    kinds |= {torch.nn.Conv1d: "conv", torch.nn.Conv2d: "conv"}
    found = {}
    for path, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            has_bias = getattr(module, "bias", None) is not None
            found[path] = Layer(kinds.get(type(module), "norm"), tuple(module.weight.shape), has_bias)
    return found


def open_layers(folder: Path, case: Case, **settings: Any) -> PeftLayers:
    config = {**json.loads((folder / "adapter_config.json").read_text()), **settings.pop("config", {})}
    tensors = read_header(folder / "adapter_model.safetensors").tensors
    layers = layers_of(_model(case.family))
    if not needs_order(config, tensors):
        paths = set(target_modules(config, tensors).values())
        layers = {path: layers[path] for path in sorted(layers, reverse=True) if path in paths}
    return PeftLayers(config, tensors, layers, str(folder), ordered=settings.get("ordered", True))


def merge_all(made: PeftLayers, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    merged = dict(weights)
    for module in made.modules:
        name = f"{module}.bias"
        weight, bias = made.merged(module, weights[f"{module}.weight"], weights.get(name))
        merged[f"{module}.weight"] = weight
        if bias is not None:
            merged[name] = bias
    return merged


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_weight_is_what_peft_makes_of_the_whole_model(case: Case, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", case)
    expected = merged_by_peft(case, folder)
    base = dict(make_model(case.family).state_dict())
    made = open_layers(folder, case)
    merged = merge_all(made, {name: tensor.clone() for name, tensor in base.items()})

    assert made.taken == read_header(folder / "adapter_model.safetensors").tensors.keys()
    assert merged.keys() == expected.keys()
    # The same operations in the same order on the same machine: bit for bit.
    assert [name for name in expected if not torch.equal(merged[name], expected[name])] == []
    changed = {name for name in base if not torch.equal(base[name], expected[name])}
    assert {name.rpartition(".")[0] for name in changed} == made.modules
    assert any(name.endswith(".bias") for name in changed) <= (case.method in CHANGES_BIAS)


@pytest.mark.parametrize("method", ["LOHA", "OFT", "IA3", "VERA", "PEANUT", "HIRA"])
def test_a_16_bit_base_and_adapter_are_rounded_once_and_by_the_caller(method: str, tmp_path: Path) -> None:
    case = Case(method)
    folder = make_adapter(tmp_path / "adapter", case)
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    model = make_model("llama").bfloat16()
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    with quiet():
        exact = PeftModel.from_pretrained(model.double(), folder).merge_and_unload().state_dict()
    merged = merge_all(open_layers(folder, case), weights)

    for name, tensor in exact.items():
        mine, theirs = merged[name].bfloat16(), tensor.bfloat16()
        # float32 sums may fall on the other side of a tie of bfloat16, which is rare
        assert (mine != theirs).sum() <= max(1, mine.numel() // 1000)
        assert torch.allclose(merged[name].double(), tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["BOFT", "FROD", "GLORA", "IA3", "LOHA", "OSF", "TINYLORA", "VERA"])
def test_a_float64_weight_is_merged_in_float64(method: str, tmp_path: Path) -> None:
    case = Case(method)
    folder = make_adapter(tmp_path / "adapter", case)
    expected = merged_by_peft(case, folder, torch.float64)
    weights = {name: tensor.double() for name, tensor in make_model("llama").state_dict().items()}
    merged = merge_all(open_layers(folder, case), weights)
    for name, tensor in expected.items():
        assert merged[name].dtype == torch.float64
        assert torch.allclose(merged[name], tensor, rtol=1e-6, atol=1e-6), name


def test_adalora_merges_with_the_ranks_that_training_left(tmp_path: Path) -> None:
    case = Case("ADALORA", targets=["q_proj", "v_proj"])
    kept = {"0.self_attn.q_proj": [True, False, True, False], "0.self_attn.v_proj": [False] * 4}
    kept |= {"1.self_attn.q_proj": [True] * 4, "1.self_attn.v_proj": [False, False, False, True]}
    ranks = {f"model.layers.{path}.lora_E.default": mask for path, mask in kept.items()}
    folder = make_adapter(tmp_path / "adapter", case, ranks)
    assert read_header(folder / "adapter_model.safetensors").tensors[
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A"
    ].shape == (2, 32)
    merged = merge_all(open_layers(folder, case), dict(_model("llama").state_dict()))
    expected = merged_by_peft(case, folder)
    assert [name for name in expected if not torch.equal(merged[name], expected[name])] == []


def test_trained_biases_and_whole_modules_are_left_to_others(tmp_path: Path) -> None:
    case = Case("BOFT", settings={"bias": "all", "modules_to_save": ["lm_head"]})
    folder = make_adapter(tmp_path / "adapter", case)
    made = open_layers(folder, case)
    left = read_header(folder / "adapter_model.safetensors").tensors.keys() - made.taken
    assert "base_model.model.lm_head.weight" in left
    assert "base_model.model.model.layers.0.self_attn.k_proj.bias" in left
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias" in left
    assert all("boft_" in name for name in made.taken)
    expected = merged_by_peft(case, folder)
    merged = merge_all(made, dict(_model("llama").state_dict()))
    assert all(torch.equal(merged[f"{module}.weight"], expected[f"{module}.weight"]) for module in made.modules)


def changed_file(folder: Path, remove: str | None = None, **add: torch.Tensor) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    if remove:
        del tensors[remove]
    save_file(tensors | add, file)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj."
ONE_OF_EACH = [
    ("LOHA", "hada_w1_a"), ("OSF", "osf_svd_params.S_low"), ("TINYLORA", "tinylora_A"), ("FROD", "frod_lambda_l"),
    ("VERA", "vera_lambda_b"), ("ADALORA", "lora_E"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "part"), ONE_OF_EACH)
def test_a_file_without_one_of_its_tensors_is_refused_before_anything_is_merged(
    method: str, part: str, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "adapter", Case(method))
    changed_file(folder, remove=FIRST + part)
    with pytest.raises(InvalidFile, match=rf"lacks the tensor '{FIRST}{part}'"):
        open_layers(folder, Case(method))


@pytest.mark.parametrize("shared", ["vera_A", "frod_V.self_attn_q_proj", "tinylora_v.3"])
def test_what_all_modules_share_may_not_be_missing_either(shared: str, tmp_path: Path) -> None:
    case = Case(shared.partition("_")[0].upper())
    folder = make_adapter(tmp_path / "adapter", case)
    changed_file(folder, remove=f"base_model.{shared}")
    with pytest.raises(InvalidFile, match=rf"lacks the tensor 'base_model.{shared}'"):
        merge_all(open_layers(folder, case), dict(_model("llama").state_dict()))


@pytest.mark.parametrize(("method", "part"), ONE_OF_EACH)
def test_a_tensor_that_peft_has_no_place_for_is_named(method: str, part: str, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", Case(method))
    name = f"{FIRST}{PREFIXES[method]}extra"
    changed_file(folder, **{name: torch.zeros(1)})
    with pytest.raises(InvalidFile, match=rf"no place for: '{name}'"):
        open_layers(folder, Case(method))


@pytest.mark.parametrize("shared", ["vera_C", "oft_R", "frod_V.mlp_up_proj", "tinylora_v.9"])
def test_a_shared_tensor_that_nothing_uses_is_named(shared: str, tmp_path: Path) -> None:
    case = Case(shared.partition("_")[0].upper())
    folder = make_adapter(tmp_path / "adapter", case)
    changed_file(folder, **{f"base_model.{shared}": torch.zeros(1)})
    with pytest.raises(InvalidFile, match=rf"base_model.{shared}"):
        merge_all(open_layers(folder, case), dict(_model("llama").state_dict()))


@pytest.mark.parametrize(("part", "at"), [("s_indices", 0), ("s_indices", -1), ("s_size", 0)])
@pytest.mark.parametrize("value", [-1, 33, 4000])
def test_sparse_indices_that_lead_outside_of_the_matrix_are_refused(
    part: str, at: int, value: int, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "adapter", Case("FROD"))
    name = f"base_model.frod_{part}.self_attn_q_proj"
    numbers = load_file(folder / "adapter_model.safetensors")[name]
    numbers.view(-1)[at] = value
    changed_file(folder, **{name: numbers})
    with pytest.raises(InvalidFile, match="outside of its 32×32 matrix"):
        merge_all(open_layers(folder, Case("FROD")), dict(_model("llama").state_dict()))


def test_randlora_s_copies_of_its_bases_have_to_be_copies(tmp_path: Path) -> None:
    case = Case("RANDLORA")
    folder = make_adapter(tmp_path / "adapter", case)
    name = FIRST + "randlora_A"
    changed_file(folder, **{name: torch.zeros_like(load_file(folder / "adapter_model.safetensors")[name])})
    with pytest.raises(InvalidFile, match=name):
        open_layers(folder, case)


@pytest.mark.parametrize("method", ["LOHA", "VERA"])
def test_an_adapter_of_another_base_is_refused_with_both_shapes(method: str, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", Case(method))
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = read_header(folder / "adapter_model.safetensors").tensors
    layers = {path: Layer("linear", (48, 40), True) for path in layers_of(_model("llama"))}
    with pytest.raises(WrongBase, match=r"is \[.*and would be \["):
        PeftLayers(config, tensors, layers, "it")
    with pytest.raises(WrongBase, match=r"changes 'model\.layers\.0\..*', which the base does not have"):
        PeftLayers(config, tensors, {}, "it")


def test_every_method_of_the_installed_peft_is_merged_or_refused_by_name() -> None:
    known = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert known == (PREFIXES.keys() | REFUSED.keys() | {"LORA"}) - {"BONE"}  # BONE is MiSS's older name
    for kind, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items():
        if kind.value in PREFIXES:
            assert prefix.startswith(PREFIXES[kind.value])
    assert {case.method for case in CASES} == PREFIXES.keys() - {"BONE"}


@pytest.mark.parametrize("method", sorted(REFUSED))
def test_a_method_that_changes_no_weight_is_refused_with_the_reason(method: str) -> None:
    with pytest.raises(UnsupportedAdapter, match=rf"'mine' \({method}\) can't be merged: .*(input|file)"):
        require_mergeable({"peft_type": method}, "mine")


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "FROD", "save_projection": False},
        {"peft_type": "SUPERTUNING", "save_precomputed_indices": False},
        {"peft_type": "PVERA", "sample_at_inference": True},
        {"peft_type": "NEXT_YEARS"},
        {},
    ],
    ids=lambda config: str(config.get("peft_type")),
)
def test_what_the_file_does_not_determine_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedAdapter):
        require_mergeable(config, "mine")


def test_beft_on_a_layer_without_bias_is_refused(tmp_path: Path) -> None:
    case = Case("BEFT", targets=["down_proj"])
    folder = make_adapter(tmp_path / "adapter", case)
    with pytest.raises(UnsupportedAdapter, match=r"adds a bias to '.*down_proj', which has none"):
        open_layers(folder, case)


def test_bone_is_refused_by_a_peft_that_no_longer_knows_it(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    save_file({FIRST + "bone_block": torch.zeros(8, 32)}, file)
    layers = {"model.layers.0.self_attn.q_proj": Layer("linear", (32, 32))}
    with pytest.raises(UnsupportedAdapter, match="does not know this method"):
        PeftLayers({"peft_type": "BONE"}, read_header(file).tensors, layers, "it")


def test_a_field_that_this_peft_does_not_know_is_refused_unless_it_is_off(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", Case("LOHA"))
    open_layers(folder, Case("LOHA"), config={"use_tomorrow": False})
    with pytest.raises(UnsupportedAdapter, match=r"use_tomorrow=True.*update PEFT"):
        open_layers(folder, Case("LOHA"), config={"use_tomorrow": True})


def test_a_config_that_peft_refuses_is_named(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", Case("ADALORA"))
    with pytest.raises(LorakitError, match="adapter"):
        open_layers(folder, Case("ADALORA"), config={"total_step": None})


@pytest.mark.parametrize("method", ["UNILORA", "TINYLORA"])
def test_a_method_that_depends_on_the_order_of_layers_is_refused_where_it_is_unknown(
    method: str, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "adapter", Case(method))
    with pytest.raises(UnsupportedAdapter, match="order of the model's layers"):
        open_layers(folder, Case(method), ordered=False)


def test_no_other_method_needs_the_order_of_layers(tmp_path: Path) -> None:
    assert not needs_order({"peft_type": "UNILORA"}, ["base_model.model.q.unilora_indices_A"])
    assert not needs_order({"peft_type": "TINYLORA"}, ["base_model.tinylora_v.0", "base_model.model.q.tinylora_P"])
    assert needs_order({"peft_type": "TINYLORA"}, ["base_model.tinylora_v.0"])  # P is drawn from the module's number
    assert not any(needs_order({"peft_type": method}, []) for method in PREFIXES.keys() - {"UNILORA", "TINYLORA"})


def test_threads_get_the_same_weights_one_by_one_or_together(tmp_path: Path) -> None:
    for method in ("PEANUT", "IA3", "VBLORA", "OSF"):
        folder = make_adapter(tmp_path / method, Case(method))
        made = open_layers(folder, Case(method))
        weights = dict(_model("llama").state_dict())
        jobs = [
            (module, weights[f"{module}.weight"], weights.get(f"{module}.bias")) for module in sorted(made.modules) * 4
        ]
        alone = [made.merged(*job) for job in jobs]
        # bits depend on how many threads share one product: as many as the other has
        with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            together = list(pool.map(made.merged, *zip(*jobs, strict=True)))
        assert all(torch.equal(one[0], other[0]) for one, other in zip(alone, together, strict=True))


def test_the_caller_s_tensors_random_numbers_and_inference_mode_are_left_alone(tmp_path: Path) -> None:
    for method in ("IA3", "HIRA", "LN_TUNING", "FROD", "VERA"):
        folder = make_adapter(tmp_path / method, Case(method))
        weights = {name: tensor.clone() for name, tensor in _model("llama").state_dict().items()}
        before = torch.get_rng_state()
        with torch.inference_mode():
            merge_all(open_layers(folder, Case(method)), weights)
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(weights[name], tensor) for name, tensor in _model("llama").state_dict().items())


def test_memory_does_not_grow_with_the_base(tmp_path: Path) -> None:
    size, count = 8192, 40
    layers = {f"layers.{index}.q_proj": Layer("linear", (size, size)) for index in range(count)}
    for method, parts, shared in (
        ("IA3", {"ia3_l": (size, 1)}, {}),
        ("HRA", {"hra_u": (size, 8)}, {}),
        ("VERA", {"vera_lambda_b": (size,), "vera_lambda_d": (4,)}, {"vera_A": (4, size), "vera_B": (size, 4)}),
    ):
        tensors = {f"base_model.model.{path}.{part}": shape for path in layers for part, shape in parts.items()}
        tensors |= {f"base_model.{name}": shape for name, shape in shared.items()}
        file = tmp_path / f"{method}.safetensors"
        save_file({name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in tensors.items()}, file)
        config = {"peft_type": method, "target_modules": ["q_proj"], "r": 4 if method == "VERA" else 8}
        if method == "IA3":
            config = {"peft_type": method, "target_modules": ["q_proj"], "feedforward_modules": []}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        made = PeftLayers(config, read_header(file).tensors, layers, "it")
        assert len(made.modules) == count
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        assert grown < size * size * 4  # not even one weight, of forty


def test_what_is_asked_before_a_plan_imports_neither_torch_nor_peft() -> None:
    program = (
        "import sys; from lorakit.merge.peft_layers import require_mergeable, target_modules, needs_order; "
        "config = {'peft_type': 'LOHA'}; require_mergeable(config, 'it'); "
        "assert target_modules(config, ['base_model.model.q.hada_w1_a', 'base_model.model.lm_head.weight']) "
        "== {'base_model.model.q.hada_w1_a': 'q'}; needs_order(config, []); "
        "assert not {'torch', 'peft'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
