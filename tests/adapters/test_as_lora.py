"""Oracle throughout: what PEFT's own merge adds to a float64 model, and dense formulas in numpy."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.as_lora import EXACT, NEEDS_SHAPES, ExactFactors, exact_factors
from lorakit.adapters.config import AdapterConfig, parse_config
from lorakit.adapters.kinds.factors import beside_identity, row_products
from lorakit.errors import InvalidFile, Refused, UnsupportedAdapter, WrongBase
from lorakit.files.safetensors import StoredTensor, read_header

SHAPES = {"q_proj": (24, 24), "v_proj": (12, 24), "up_proj": (48, 24), "down_proj": (24, 48)}
ALL = {f"layers.{layer}.{name}": shape for layer in range(2) for name, shape in SHAPES.items()}


class Tiny(torch.nn.Module):
    """Two layers of linear maps of several shapes; `transposed` stores them as (in, out), as GPT-2 does."""

    def __init__(self, *, transposed: bool = False) -> None:
        super().__init__()
        kind = (lambda out, into: Conv1D(out, into)) if transposed else (lambda out, into: torch.nn.Linear(into, out))
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({name: kind(*shape) for name, shape in SHAPES.items()}) for _ in range(2)
        )
        self.head = torch.nn.Linear(24, 5)


@dataclass(frozen=True)
class Case:
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    targets: Any = ("q_proj", "v_proj", "down_proj")
    transposed: bool = False

    def __str__(self) -> str:
        said = "-".join(f"{key}={value}" for key, value in self.settings.items())
        return "-".join(part for part in (self.method, said, "conv1d" if self.transposed else "") if part)


SMALL: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 16},
    "DELORA": {"r": 4},
    "GRALORA": {"r": 6, "gralora_k": 3},
    "LOHA": {"r": 2},
    "LOKR": {"r": 2},
    "MISS": {"r": 8},
    "PVERA": {"r": 4},
    "UNILORA": {"r": 2, "theta_d_length": 64, "save_indices": True},
    "VBLORA": {"vector_length": 6, "num_vectors": 16, "topk": 2, "r": 2},
    "VERA": {"r": 4},
}
CASES = [
    *(Case(method) for method in sorted(EXACT)),
    Case("LOHA", {"r": 3, "alpha": 7}),
    Case("LOHA", {"r": 5}),  # 25 > 24
    Case("LOHA", {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.0.v_proj": 5}}),
    Case("LOHA", {"rank_pattern": {"layers.1.*": 1, "v_proj": 3}}),
    Case("LOKR", {"alpha": 3.5}),
    Case("LOKR", {"r": 1, "decompose_both": True}),
    Case("LOKR", {"r": 2, "decompose_both": True, "decompose_factor": 6}),
    Case("LOKR", {"r": 3, "decompose_factor": 2, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 1}}),
    Case("LOKR", {"r": 64}),
    Case("LOKR", {"r": 3, "decompose_factor": 24, "decompose_both": True}),
    Case("ADALORA", {"lora_alpha": 0}),
    Case("DELORA", {"rank_pattern": {"q_proj": 3}, "lambda_pattern": {"v_proj": 2.0}}),
    Case("GRALORA", {"r": 4, "gralora_k": 2, "alpha": 5}),
    Case("GRALORA", {"r": 2, "gralora_k": 1}),
    Case("GRALORA", {"r": 6, "gralora_k": 3, "hybrid_r": 2}),
    Case("GRALORA", {"r": 12, "gralora_k": 3}),
    Case("MISS", {"r": 5}),  # 24 and 48 are no multiples
    Case("MISS", {"r": 7, "init_weights": False}),
    Case("MISS", {"r": 5, "init_weights": "mini", "mini_r": 4}),
    Case("VERA", {"save_projection": False, "projection_prng_key": 7}),
    Case("VERA", {"r": 40}),
    Case("PVERA", {"save_projection": False, "projection_prng_key": 3}),
    Case("VBLORA", {"save_only_topk_weights": True, "topk": 3}),
    Case("VBLORA", {"topk": 1}),
    Case("LOKR", targets=r".*\.1\.(up|down)_proj"),
    *(
        Case(method, {"fan_in_fan_out": True}, transposed=True)
        for method in ("ADALORA", "GRALORA", "PVERA", "UNILORA", "VBLORA", "VERA")
    ),
]


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_adapter(folder: Path, case: Case, ranks: dict[str, list[bool]] | None = None) -> Path:
    """An adapter as PEFT saves it, with values far from those it starts with."""
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[case.method]
    targets = case.targets if isinstance(case.targets, str) else list(case.targets)
    with quiet():
        made = kind(target_modules=targets, **{**SMALL[case.method], **case.settings})
        adapted = get_peft_model(Tiny(transposed=case.transposed), made)
        if ranks:
            adapted.peft_config["default"].rank_pattern = ranks
        torch.manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if ".default" in name and ".ranknum" not in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
        adapted.save_pretrained(folder)
    return folder


def changes_by_peft(folder: Path, *, transposed: bool = False) -> dict[str, torch.Tensor]:
    """Merged − base in float64, (out, in)."""
    base = Tiny(transposed=transposed).double()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with quiet():
        after = PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    changes = {name: after[name] - tensor for name, tensor in before.items()}
    return {
        name.removesuffix(".weight"): change.T if transposed else change
        for name, change in changes.items()
        if name.endswith(".weight") and change.any()
    }


def open_factors(
    folder: Path, shapes: dict[str, tuple[int, int]] | None = ALL, **config: Any
) -> tuple[dict[str, ExactFactors], tuple[StoredTensor, ...]]:
    raw = {**json.loads((folder / "adapter_config.json").read_text()), **config}
    tensors = list(read_header(folder / "adapter_model.safetensors").tensors.values())
    return exact_factors(config_of(raw), tensors, folder, shapes)


def config_of(raw: dict[str, Any]) -> AdapterConfig:
    ranks = {} if raw["peft_type"] == "ADALORA" else {"rank_pattern": raw.get("rank_pattern")}  # lists of bool there
    return replace(parse_config({**raw, "rank_pattern": None, **ranks}, Path("adapter_config.json")), raw=raw)


def assert_same_change(factors: ExactFactors, expected: torch.Tensor) -> None:
    left, right = factors.make()
    out, into = factors.shape
    assert (left.dtype, right.dtype) == (torch.float64, torch.float64)
    assert (left.shape, right.shape) == ((out, factors.rank), (factors.rank, into))
    assert factors.rank <= min(factors.shape)
    # PEFT keeps some scales and projections in float32 though the model is in float64
    assert torch.allclose(left @ right, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_factors_multiply_to_what_peft_merges(case: Case, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", case)
    expected = changes_by_peft(folder, transposed=case.transposed)
    made, others = open_factors(folder, ALL if case.method in NEEDS_SHAPES else None)
    assert others == ()
    assert made.keys() == expected.keys()
    for module, factors in made.items():
        assert factors.shape == ALL[module]
        assert_same_change(factors, expected[module])


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        (Case("LOHA", {"r": 3}), {"q_proj": 9, "v_proj": 9, "down_proj": 9}),
        (Case("LOHA", {"r": 4}), {"q_proj": 16, "v_proj": 12, "down_proj": 16}),
        # q_proj is kron of 4 × 4 and 6 × 6, v_proj of 3 × 4 and 4 × 6
        (Case("LOKR", {"r": 1}), {"q_proj": 4, "v_proj": 3, "down_proj": 4}),
        (Case("LOKR", {"r": 1, "decompose_both": True}), {"q_proj": 1, "v_proj": 1, "down_proj": 1}),
        (Case("LOKR", {"r": 64}), {"q_proj": 24, "v_proj": 12, "down_proj": 24}),
        (Case("VERA", {"r": 15}), {"q_proj": 15, "v_proj": 12, "down_proj": 15}),
        (Case("GRALORA", {"r": 6, "gralora_k": 2, "hybrid_r": 1}), {"q_proj": 13, "v_proj": 12, "down_proj": 13}),
        (Case("MISS", {"r": 8}), {"q_proj": 8, "v_proj": 8, "down_proj": 8}),
    ],
    ids=str,
)
def test_ranks_are_as_small_as_shapes_tell(case: Case, ranks: dict[str, int], tmp_path: Path) -> None:
    made, _ = open_factors(make_adapter(tmp_path / "adapter", case))
    assert {module: factors.rank for module, factors in made.items()} == {
        f"layers.{layer}.{name}": rank for layer in range(2) for name, rank in ranks.items()
    }


@pytest.mark.parametrize("alpha", [16, 0])
def test_adalora_keeps_its_first_scale_at_the_ranks_that_training_left(alpha: int, tmp_path: Path) -> None:
    kept = {"0.q_proj": [True, False, True, False], "0.v_proj": [False] * 4}
    kept |= {"1.q_proj": [True] * 4, "1.v_proj": [False, False, False, True]}
    case = Case("ADALORA", {"lora_alpha": alpha}, ("q_proj", "v_proj"))
    folder = make_adapter(
        tmp_path / "adapter", case, {f"layers.{path}.lora_E.default": mask for path, mask in kept.items()}
    )
    expected = changes_by_peft(folder)
    made, _ = open_factors(folder)
    assert {path: made[f"layers.{path}"].rank for path in kept} == {path: sum(mask) for path, mask in kept.items()}
    for module, factors in made.items():
        assert_same_change(factors, expected.get(module, torch.zeros(ALL[module], dtype=torch.float64)))


def test_a_16_bit_adapter_is_as_peft_reads_it(tmp_path: Path) -> None:
    for method in sorted(EXACT):
        folder = make_adapter(tmp_path / method, Case(method))
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        save_file({name: t.bfloat16() if t.is_floating_point() else t for name, t in tensors.items()}, file)
        expected = changes_by_peft(folder)
        for module, factors in open_factors(folder)[0].items():
            assert_same_change(factors, expected[module])


def test_biases_and_whole_modules_are_left_to_others(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", Case("VERA", {"bias": "vera_only", "modules_to_save": ["head"]}))
    made, others = open_factors(folder)
    left = {stored.name for stored in others}
    assert {"base_model.model.head.weight", "base_model.model.head.bias"} <= left
    assert any(name.endswith("layers.0.q_proj.base_layer.bias") for name in left)
    assert not any("vera_" in name for name in left)
    assert len(made) == 6


# --- the algebra, against numpy --------------------------------------------------------------------------------------

sizes = st.integers(1, 6)


def matrix(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@given(sizes, sizes, sizes, sizes, st.integers(0, 1000))
def test_a_hadamard_product_of_products_is_a_product_of_row_products(
    out: int, into: int, one: int, other: int, seed: int
) -> None:
    p, q, r, s = (
        torch.from_numpy(matrix(seed + i, *shape)).double()
        for i, shape in enumerate([(out, one), (one, into), (out, other), (other, into)])
    )
    assert torch.allclose(row_products(p, r) @ row_products(q.T, s.T).T, (p @ q) * (r @ s))


@given(sizes, sizes)
def test_a_matrix_beside_an_identity_has_the_rank_of_its_smaller_side(out: int, into: int) -> None:
    whole = torch.from_numpy(matrix(0, out, into)).double()
    left, right = beside_identity(whole)
    assert torch.equal(left @ right, whole)
    assert left.shape[1] == min(out, into)


def factors_of(
    method: str, tensors: dict[str, np.ndarray[Any, Any]], **config: Any
) -> tuple[int, np.ndarray[Any, Any]]:
    """The rank that is told beforehand, and B A, of one module with these tensors."""
    with tempfile.TemporaryDirectory() as folder:
        write(
            Path(folder), method, {f"base_model.model.q.{name}": tensor for name, tensor in tensors.items()}, **config
        )
        factors = open_factors(Path(folder))[0]["q"]
        left, right = factors.make()
        assert left.shape[1] == right.shape[0] == factors.rank
        return factors.rank, (left @ right).numpy()


def write(folder: Path, method: str, tensors: dict[str, Any], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": method, **config}))
    save_file({name: torch.as_tensor(value) for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 4), st.floats(-4, 4), st.integers(0, 1000))
def test_loha_of_any_shape_and_rank(out: int, into: int, rank: int, alpha: float, seed: int) -> None:
    shapes = {"hada_w1_a": (out, rank), "hada_w1_b": (rank, into), "hada_w2_a": (out, rank), "hada_w2_b": (rank, into)}
    tensors = {name: matrix(seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    told, made = factors_of("LOHA", tensors, r=rank, alpha=alpha)
    a, b, c, d = (tensor.astype(np.float64) for tensor in tensors.values())
    assert told == min(rank * rank, out, into)
    assert np.allclose(made, alpha / rank * (a @ b) * (c @ d), rtol=1e-12, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.tuples(sizes, sizes), st.tuples(sizes, sizes), st.booleans(), st.booleans(), sizes, st.integers(0, 1000))
def test_lokr_of_any_shape_and_in_each_of_its_forms(
    one: tuple[int, int], other: tuple[int, int], split_one: bool, split_other: bool, rank: int, seed: int
) -> None:
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    sides, ranks = [], []
    for name, shape, split in (("lokr_w1", one, split_one), ("lokr_w2", other, split_other)):
        seed += 2
        if split:
            tensors[f"{name}_a"], tensors[f"{name}_b"] = matrix(seed, shape[0], rank), matrix(seed + 1, rank, shape[1])
            sides.append(tensors[f"{name}_a"].astype(np.float64) @ tensors[f"{name}_b"].astype(np.float64))
        else:
            tensors[name] = matrix(seed, *shape)
            sides.append(tensors[name].astype(np.float64))
        ranks.append(min(*shape, rank) if split else min(shape))
    told, made = factors_of("LOKR", tensors, r=rank, alpha=3)
    assert told == ranks[0] * ranks[1]
    assert np.allclose(made, 3 / rank * np.kron(*sides), rtol=1e-12, atol=1e-12)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_every_method_of_the_installed_peft_is_exact_or_refused_with_a_reason() -> None:
    for kind in PEFT_TYPE_TO_CONFIG_MAPPING:
        if kind.value in EXACT or kind.value == "LORA":
            continue
        with pytest.raises(UnsupportedAdapter, match=rf"'mine' \({kind.value}\) can't be made .*: ") as refused:
            exact_factors(AdapterConfig(kind.value), [], Path("mine"))
        assert "doesn't know" not in str(refused.value)
    assert NEEDS_SHAPES <= EXACT


@pytest.mark.parametrize("method", ["OFT", "C3A", "NEXT_YEARS"])
def test_a_refusal_names_the_commands_that_help(method: str) -> None:
    with pytest.raises(UnsupportedAdapter, match=r"lorakit extract mine --base BASE --rank N.*lorakit merge"):
        exact_factors(AdapterConfig(method), [], Path("mine"))


@pytest.mark.parametrize(("method", "cure"), [("XLORA", "run it with the PEFT"), ("LN_TUNING", "lorakit merge")])
def test_a_refusal_names_no_command_that_could_not_help(method: str, cure: str) -> None:
    with pytest.raises(UnsupportedAdapter, match=cure) as refused:
        exact_factors(AdapterConfig(method), [], Path("mine"))
    assert "extract" not in str(refused.value)


@pytest.mark.parametrize("method", sorted(NEEDS_SHAPES))
def test_inputs_that_are_not_in_the_file_have_to_come_from_the_base(method: str, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", Case(method))
    with pytest.raises(UnsupportedAdapter, match=r"how many inputs 'layers\.0\..*' has is not in its file"):
        open_factors(folder, None)
    if method != "MISS":
        with pytest.raises(WrongBase, match=r"has 24 outputs for .*, the base has 23"):
            open_factors(folder, {module: (23, into) for module, (_, into) in ALL.items()})
        with pytest.raises(InvalidFile, match=r"up to \[24, 48\], and '.*' is \[24, 49\]"):
            open_factors(folder, {module: (out, into + 1) for module, (out, into) in ALL.items()})


def test_a_seed_needs_the_shapes_of_all_modules(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", Case("VERA", {"save_projection": False}))
    with pytest.raises(UnsupportedAdapter, match=r"layers\.1\.down_proj"):
        open_factors(folder, {module: shape for module, shape in ALL.items() if module != "layers.1.down_proj"})


def test_projections_that_are_in_the_file_are_taken_whatever_the_config_says(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", Case("VERA"))
    expected = changes_by_peft(folder)
    for module, factors in open_factors(folder, save_projection=False)[0].items():
        assert_same_change(factors, expected[module])


@pytest.mark.parametrize(
    ("method", "config", "reason"),
    [
        ("MISS", {"init_weights": "bat"}, "multiplies the base's weights"),
        ("PVERA", {"sample_at_inference": True}, "draws its weights anew"),
        ("ADALORA", {"layer_replication": [[0, 2], [1, 2]]}, "repeats layers"),
    ],
)
def test_settings_that_are_no_fixed_change_are_refused(
    method: str, config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "adapter", Case(method))
    with pytest.raises(UnsupportedAdapter, match=reason):
        open_factors(folder, **config)


def test_unilora_without_its_indices_is_refused(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", Case("UNILORA", {"save_indices": False}))
    with pytest.raises(UnsupportedAdapter, match="which module has which part"):
        open_factors(folder)


@pytest.mark.parametrize("method", ["LOHA", "LOKR"])
def test_convolutions_are_refused(method: str, tmp_path: Path) -> None:
    class Convolutions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(8, 16, 3)

    for number, effective in enumerate((True, False)):
        folder = tmp_path / f"{number}"
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[method]
        rank = 2 if effective else 64  # then w2 of LoKr is whole, with four axes
        made = kind(r=rank, target_modules=["conv"], use_effective_conv2d=effective)
        get_peft_model(Convolutions(), made).save_pretrained(folder)
        if effective or method == "LOKR":
            with pytest.raises(UnsupportedAdapter, match="'conv' is a convolution"):
                open_factors(folder)
        else:
            assert open_factors(folder)[0]["conv"].shape == (16, 8 * 9)


def changed(folder: Path, remove: str | None = None, **add: torch.Tensor) -> Path:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    if remove:
        del tensors[remove]
    save_file(tensors | add, file)
    return folder


FIRST = "base_model.model.layers.0.q_proj."
ONE_OF_EACH = [
    ("ADALORA", "lora_E"), ("DELORA", "delora_lambda"), ("GRALORA", "gralora_B"), ("LOHA", "hada_w2_a"),
    ("LOKR", "lokr_w2_b"), ("MISS", "miss_block"), ("PVERA", "pvera_lambda_b"), ("UNILORA", "unilora_scales_A"),
    ("VBLORA", "vblora_logits_B"), ("VERA", "vera_lambda_d"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "part"), [pair for pair in ONE_OF_EACH if pair[0] != "MISS"])  # it has but one
def test_a_file_without_one_of_its_tensors_is_refused(method: str, part: str, tmp_path: Path) -> None:
    folder = changed(make_adapter(tmp_path / "adapter", Case(method)), f"{FIRST}{part}")
    with pytest.raises(InvalidFile, match=rf"'layers.0.q_proj' lacks the tensor '{part}'"):
        open_factors(folder)


@pytest.mark.parametrize(("method", "part"), ONE_OF_EACH)
def test_shapes_that_contradict_one_another_are_refused(method: str, part: str, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", Case(method))
    shape = load_file(folder / "adapter_model.safetensors")[f"{FIRST}{part}"].shape
    changed(folder, **{f"{FIRST}{part}": torch.zeros(*shape[:-1], shape[-1], 1)})
    with pytest.raises(InvalidFile, match=rf"'{FIRST}{part}' is \[.*\], and .* would be \[.*\]"):
        open_factors(folder)


@pytest.mark.parametrize("method", sorted(EXACT))
def test_a_tensor_that_has_no_place_is_named(method: str, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", Case(method))
    prefix = dict(ONE_OF_EACH)[method].partition("_")[0]
    changed(folder, **{f"{FIRST}{prefix}_extra": torch.zeros(1)})
    with pytest.raises(InvalidFile, match=rf"no place for: '{FIRST}{prefix}_extra'"):
        open_factors(folder)


@pytest.mark.parametrize("shared", ["vera_A", "vblora_vector_bank", "unilora_theta_d"])
def test_what_all_modules_share_may_not_be_missing(shared: str, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", Case(shared.partition("_")[0].upper()))
    with pytest.raises(InvalidFile, match=f"lacks the tensor 'base_model.{shared}'"):
        open_factors(changed(folder, f"base_model.{shared}"))


def test_a_rank_that_is_not_the_config_s_is_refused(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", Case("LOHA"))
    with pytest.raises(InvalidFile, match=r"would be \[any, 3\]"):
        open_factors(folder, r=3)


def test_one_matrix_in_two_forms_is_refused(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", Case("LOKR"))
    with pytest.raises(InvalidFile, match="'lokr_w2' and 'lokr_w2_a' for one matrix"):
        open_factors(changed(folder, **{f"{FIRST}lokr_w2": torch.zeros(6, 6)}))


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", Case("LOHA"))
    with pytest.raises(InvalidFile, match="name the same tensor"):
        open_factors(changed(folder, **{"layers.0.q_proj.hada_w1_a": torch.zeros(24, 2)}))


def test_delora_without_the_norms_of_its_base_is_refused(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", Case("DELORA"))
    with pytest.raises(UnsupportedAdapter, match="norms of the base's columns"):
        open_factors(changed(folder, f"{FIRST}delora_w_norm"))


@pytest.mark.parametrize(
    ("method", "part"), [("UNILORA", "unilora_indices_A"), ("VBLORA", "vblora_logits_A_topk_indices")]
)
def test_an_index_outside_of_what_is_shared_is_named(method: str, part: str, tmp_path: Path) -> None:
    settings = {"save_only_topk_weights": True} if method == "VBLORA" else {}
    folder = make_adapter(tmp_path / "adapter", Case(method, settings))
    indices = load_file(folder / "adapter_model.safetensors")[f"{FIRST}{part}"]
    made, _ = open_factors(changed(folder, **{f"{FIRST}{part}": torch.full_like(indices, 100)}))
    with pytest.raises(InvalidFile, match=rf"'{FIRST}{part}' points outside"):
        made["layers.0.q_proj"].make()


@pytest.mark.parametrize("value", ["8", True, float("nan"), 2.5, 0])
def test_a_config_field_that_is_no_whole_number_is_named(value: Any, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", Case("GRALORA"))
    with pytest.raises(Refused, match=r"gralora_k is "):
        open_factors(folder, gralora_k=value)


@pytest.mark.parametrize("method", sorted(EXACT))
def test_planning_reads_no_tensor(method: str, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", Case(method))
    file = folder / "adapter_model.safetensors"
    tensors = list(read_header(file).tensors.values())
    raw = json.loads((folder / "adapter_config.json").read_text())
    file.unlink()
    made, _ = exact_factors(config_of(raw), tensors, folder, ALL)
    assert all(factors.rank > 0 for factors in made.values())


def test_importing_and_planning_costs_no_torch() -> None:
    program = (
        "import sys; from pathlib import Path; from lorakit.adapters.as_lora import exact_factors; "
        "from lorakit.adapters.config import AdapterConfig; exact_factors(AdapterConfig('LOHA'), [], Path('x')); "
        "assert not {'torch', 'peft'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
