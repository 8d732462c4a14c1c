"""Every kind of LoRA, merged: names, bits and answers are those of the adapter beside the base.

The table is `CASES`. Its measure is written in float64 in `kinds.py`, and is itself tested on the unmerged model.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorakit.errors import Refused, UnplacedTensors, UnsupportedAdapter
from lorakit.merge import blocks
from lorakit.merge.merge import merge
from tests.merge.kinds import (
    Exact,
    Kind,
    answers,
    assert_rounded_once,
    edit_config,
    exact_weights,
    make_fused,
    make_kind,
    make_model,
    model_of,
    names_on_disk,
    on_disk,
    open_model,
    rename_tensors,
    unmerged,
    warnings_of_peft,
)

DTYPES = ("float32", "bfloat16", "float16")
ONE: dict[str, Any] = {"dtypes": DTYPES[:1]}  # for what differs from other rows in names, not in arithmetic
Get = Callable[..., Path]


@dataclass(frozen=True)
class Case:
    """Reads as a sentence: `name`, on a base of `family`."""

    name: str
    family: str
    kind: Kind
    dtypes: tuple[str, ...] = DTYPES
    as_peft: bool = False  # bit for bit what PEFT's own merge gives
    adapters: int = 1
    fused: bool = False  # the base's files have the running model's names
    added: frozenset[str] = frozenset()  # names on disk that the base has not
    says: dict[str, Any] = field(default_factory=dict)  # by the merged config


def _cases(name: str, families: str, kind: Kind, **more: Any) -> list[Case]:
    """In every dtype on the first family; what differs on the others are names and layers."""
    first, *others = families.split()
    return [Case(name, first, kind, **more)] + [
        Case(name, family, kind, **{"dtypes": DTYPES[:1], **more}) for family in others
    ]


def _lora(**settings: Any) -> Kind:
    return Kind(settings)


def _modules(*names: str, **settings: Any) -> Kind:
    return Kind({"target_modules": list(names), **settings})


DENSE = "llama qwen2 gpt2"
TIED = "tied-llama gemma3"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PATTERNS = {"rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 12}, "alpha_pattern": {r"layers\.0\..*k_proj": 5}}
UNTIED = {"added": frozenset({"lm_head.weight"}), "says": {"tie_word_embeddings": False}}
STILL_TIED = {"says": {"tie_word_embeddings": True}}
COPIED_LAYER = frozenset(
    f"model.layers.2.{leaf}.weight"
    for leaf in (
        "input_layernorm", "post_attention_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    )
)  # fmt: skip
COPIED_BIASES = frozenset(f"model.layers.2.self_attn.{leaf}_proj.bias" for leaf in "qkv")
DORA_FROM_PISSA = {"init_lora_weights": "pissa", "use_dora": True}
REPLICATED = [[0, 2], [1, 2]]


def _experts(*parameters: str, **settings: Any) -> Kind:
    return Kind({"target_modules": ["q_proj"], "target_parameters": list(parameters), **settings})


def _marked(folder: Path) -> None:
    edit_config(folder, use_qalora=True)


def _each_expert(path: str, layers: dict[str, tuple[int, int]]) -> Kind:
    """Factors of every expert by itself: PEFT makes fused ones of them as it loads them."""

    def write(folder: Path) -> None:
        torch.manual_seed(5)
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        for layer, expert, (name, (out, into)) in itertools.product(range(2), range(4), layers.items()):
            module = f"base_model.model.model.layers.{layer}.{path}.experts.{expert}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(8, into) / 10
            tensors[f"{module}.lora_B.weight"] = torch.randn(out, 8) / 10
        save_file(tensors, file, metadata={"format": "pt"})
        edit_config(folder, target_modules=["q_proj", *layers])

    return Kind({"target_modules": ["q_proj"]}, change=write)


EACH_EXPERT = {
    "mixtral": _each_expert("block_sparse_moe", {"w1": (44, 32), "w2": (32, 44), "w3": (44, 32)}),
    "qwen3-moe": _each_expert("mlp", {"gate_proj": (20, 32), "up_proj": (20, 32), "down_proj": (32, 20)}),
}

CASES = [
    # plain factors
    *_cases(
        "LoRA on all linear layers",
        f"{DENSE} {TIED} mixtral qwen3-moe llava vit whisper wav2vec2",
        _lora(),
        as_peft=True,
    ),
    *_cases("rsLoRA", f"{DENSE} llava", _lora(use_rslora=True), as_peft=True),
    *_cases("rank and alpha patterns", "llama qwen2 tied-llama", _lora(**PATTERNS), as_peft=True),
    *_cases("rsLoRA with patterns", "llama", _lora(**PATTERNS, use_rslora=True), as_peft=True, **ONE),
    *_cases("LoRA on the head", "llama qwen2 llava", _modules("q_proj", "lm_head"), as_peft=True),
    *_cases("LoRA on the head alone", "llama", _modules("lm_head"), as_peft=True, **ONE),
    *_cases("LoRA on the embedding", "llama qwen2 llava", _modules("v_proj", "embed_tokens")),
    *_cases("LoRA on the positions", "gpt2", _modules("c_attn", "wpe"), **ONE),
    *_cases("LoRA on a convolution over time", "wav2vec2", Kind({"target_modules": r".*conv_layers\..*conv|.*q_proj"})),
    *_cases("LoRA on a convolution over an image", "vit", _modules("projection", "q_proj")),
    *_cases("LoRA on the patches of a vision tower", "llava", _modules("patch_embedding", "q_proj"), **ONE),
    *_cases("LoRA on the router", "mixtral qwen3-moe", _experts("mlp.gate.weight"), **ONE),
    *_cases("LoRA on the router", "gpt-oss", _experts("router.weight"), **ONE),
    # DoRA
    *_cases("DoRA", f"{DENSE} {TIED} llava", _lora(use_dora=True)),
    *_cases("DoRA with rsLoRA and patterns", "llama", _lora(use_dora=True, use_rslora=True, **PATTERNS), **ONE),
    *_cases("DoRA on the embedding", "llama", _modules("q_proj", "embed_tokens", use_dora=True)),
    *_cases("DoRA on the positions", "gpt2", _modules("wpe", use_dora=True), **ONE),
    *_cases("DoRA on a convolution", "vit", _modules("projection", "q_proj", use_dora=True)),
    *_cases(
        "DoRA on a convolution over time",
        "wav2vec2",
        Kind({"target_modules": r".*conv_layers\..*conv", "use_dora": True}),
        **ONE,
    ),
    *_cases("two DoRA adapters at once", "llama gpt2", _lora(use_dora=True), adapters=2),
    *_cases("two LoRA adapters at once", "llama", _lora(), adapters=2, **ONE),
    # biases
    *_cases("trained biases of the whole model", "qwen2 gpt2", _lora(bias="all")),
    *_cases("trained biases of the LoRA layers", "qwen2 gpt2", _lora(bias="lora_only")),
    *_cases("trained biases of a model that has none", "llama", _lora(bias="all"), **ONE),
    *_cases("biases of lora_B", "qwen2", _modules("q_proj", "k_proj", lora_bias=True)),
    *_cases("biases of lora_B", "gpt2", _lora(lora_bias=True), **ONE),
    *_cases("biases of lora_B and of the layers", "gpt2", _lora(lora_bias=True, bias="lora_only"), **ONE),
    # whole modules and rows
    *_cases("a saved head", "llama qwen2 llava", _lora(modules_to_save=["lm_head"])),
    *_cases("a saved norm", "llama qwen2", _lora(modules_to_save=["norm", "input_layernorm"])),
    *_cases("a saved norm with its bias", "gpt2", _lora(modules_to_save=["ln_f"]), **ONE),
    *_cases("a saved classifier", "vit", _lora(modules_to_save=["classifier"]), **ONE),
    *_cases("a saved projector", "llava", _modules("q_proj", modules_to_save=["multi_modal_projector"]), **ONE),
    *_cases("a saved embedding", "llama qwen2", _lora(modules_to_save=["embed_tokens"])),
    *_cases("saved router weights", "mixtral qwen3-moe", _lora(modules_to_save=["gate"]), **ONE),
    *_cases("saved experts", "mixtral qwen3-moe", _lora(modules_to_save=["experts"])),
    *_cases(
        "an embedding and a head that grew and were saved",
        "llama qwen2",
        Kind({"modules_to_save": ["embed_tokens", "lm_head"]}, vocabulary=107),
        says={"vocab_size": 107},
    ),
    *_cases("a vocabulary that grew", "llama", Kind(vocabulary=107), says={"vocab_size": 107}),
    *_cases("a vocabulary that shrank", "llama", Kind(vocabulary=100), says={"vocab_size": 100}, **ONE),
    *_cases("a tied vocabulary that grew", "tied-llama gpt2", Kind(vocabulary=107), says={"vocab_size": 107}, **ONE),
    *_cases(
        "LoRA on an embedding that grew",
        "llama",
        Kind({"target_modules": ["embed_tokens", "lm_head"]}, vocabulary=107),
        says={"vocab_size": 107},
        **ONE,
    ),
    *_cases("trained tokens", "llama qwen2 llava", _lora(trainable_token_indices=[3, 99, 7])),
    *_cases(
        "trained tokens of the embedding and others of the head",
        "llama",
        _lora(trainable_token_indices={"embed_tokens": [3, 98], "lm_head": [5]}),
        **ONE,
    ),
    # fused experts
    *_cases("LoRA on both fused expert weights", "mixtral qwen3-moe gpt-oss", _experts(*EXPERTS)),
    *_cases("LoRA on both, named the other way around", "qwen3-moe", _experts(*EXPERTS[::-1]), **ONE),
    *_cases("LoRA on the fused gate and up projections", "mixtral qwen3-moe gpt-oss", _experts(EXPERTS[0])),
    *_cases("LoRA on the fused down projections", "mixtral qwen3-moe gpt-oss", _experts(EXPERTS[1])),
    *_cases("rsLoRA on fused experts", "qwen3-moe", _experts(*EXPERTS, use_rslora=True), **ONE),
    *_cases(
        "LoRA on fused experts alone", "mixtral", Kind({"target_modules": [], "target_parameters": EXPERTS}), **ONE
    ),
    *_cases("LoRA on fused experts of a fused file", "mixtral qwen3-moe", _experts(*EXPERTS), fused=True),
    *_cases("LoRA on fused down projections of a fused file", "qwen3-moe", _experts(EXPERTS[1]), fused=True, **ONE),
    *_cases("LoRA on each expert, as transformers 4 trained it", "mixtral", EACH_EXPERT["mixtral"]),
    *_cases("LoRA on each expert, as transformers 4 trained it", "qwen3-moe", EACH_EXPERT["qwen3-moe"], **ONE),
    *_cases("LoRA on each expert of a fused file", "mixtral", EACH_EXPERT["mixtral"], fused=True, **ONE),
    # copied layers
    *_cases(
        "replicated layers",
        "llama",
        _lora(layer_replication=REPLICATED),
        added=COPIED_LAYER,
        says={"num_hidden_layers": 3},
    ),
    *_cases(
        "replicated layers",
        "qwen2",
        _lora(layer_replication=REPLICATED),
        added=COPIED_LAYER | COPIED_BIASES,
        says={"num_hidden_layers": 3},
        **ONE,
    ),
    *_cases(
        "replicated layers with DoRA and patterns",
        "llama",
        _lora(layer_replication=REPLICATED, use_dora=True, rank_pattern={r"layers\.2\..*": 4}),
        added=COPIED_LAYER,
        says={"num_hidden_layers": 3},
        **ONE,
    ),
    # tied embeddings
    *_cases("LoRA on the head of tied embeddings", TIED, _modules("q_proj", "lm_head"), **UNTIED),
    *_cases("LoRA on the embedding of tied embeddings", TIED, _modules("q_proj", "embed_tokens"), **UNTIED),
    *_cases("LoRA on both tied embeddings", TIED, _modules("lm_head", "embed_tokens"), **UNTIED),
    *_cases("LoRA on the tokens of GPT-2", "gpt2", _modules("c_attn", "wte"), **UNTIED),
    *_cases(
        "LoRA on the output of Whisper",
        "whisper",
        _modules("q_proj", "proj_out"),
        added=frozenset({"proj_out.weight"}),
        says={"tie_word_embeddings": False},
        **ONE,
    ),
    *_cases("DoRA on the head of tied embeddings", "tied-llama", _modules("lm_head", use_dora=True), **UNTIED, **ONE),
    *_cases(
        "LoRA on an embedding whose tie is ensured",
        TIED,
        _modules("q_proj", "embed_tokens", ensure_weight_tying=True),
        **STILL_TIED,
    ),
    *_cases(
        "LoRA on both embeddings whose tie is ensured",
        TIED,
        _modules("lm_head", "embed_tokens", ensure_weight_tying=True),
        **STILL_TIED,
    ),
    *_cases("a saved head of tied embeddings", TIED, _lora(modules_to_save=["lm_head"]), **UNTIED),
    *_cases("a saved embedding of tied embeddings", TIED, _lora(modules_to_save=["embed_tokens"]), **UNTIED),
    *_cases(
        "a saved embedding whose tie is ensured",
        TIED,
        _lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        **STILL_TIED,
    ),
    *_cases("trained tokens of tied embeddings", f"{TIED}", _lora(trainable_token_indices=[3, 99]), **STILL_TIED),
    *_cases("trained tokens of GPT-2", "gpt2", _lora(trainable_token_indices={"wte": [3, 99]}), **ONE),
    # pooled inputs
    *_cases("QA-LoRA", "llama", Kind({"target_modules": ["q_proj", "v_proj"]}, group=8)),
    *_cases("use_qalora said of factors that pool nothing", "llama", Kind(change=_marked), **ONE),
    # changed starts
    *_cases("PiSSA as it was trained", "llama qwen2", Kind({"init_lora_weights": "pissa"}, starts_from_base=True)),
    *_cases("PiSSA as it was trained", "gpt2", Kind({"init_lora_weights": "pissa"}, starts_from_base=True), **ONE),
    *_cases(
        "PiSSA that was converted", "llama", Kind({"init_lora_weights": "pissa"}, starts_from_base=True, convert=True)
    ),
    *_cases(
        "PiSSA with rsLoRA and patterns",
        "llama",
        Kind({"init_lora_weights": "pissa", "use_rslora": True, **PATTERNS}, starts_from_base=True),
        **ONE,
    ),
    *_cases("DoRA that began as PiSSA", "llama", Kind(DORA_FROM_PISSA, starts_from_base=True)),
    *_cases("OLoRA as it was trained", "llama qwen2", Kind({"init_lora_weights": "olora"}, starts_from_base=True)),
    *_cases(
        "OLoRA that was converted",
        "llama",
        Kind({"init_lora_weights": "olora"}, starts_from_base=True, convert=True),
        **ONE,
    ),
    *_cases(
        "other inits that leave the base alone", "llama", _lora(init_lora_weights="orthogonal"), as_peft=True, **ONE
    ),
    *_cases("a gaussian init", "llama", _lora(init_lora_weights="gaussian"), as_peft=True, **ONE),
]
ROWS = [
    pytest.param(case, dtype, id=f"{case.name} of {case.family} in {dtype}") for case in CASES for dtype in case.dtypes
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Get:
    made: dict[tuple[Any, ...], Path] = {}

    def get(family: str, dtype: str = "float32", *, fused: bool = False) -> Path:
        key = (family, dtype, fused)
        if key not in made:
            folder = tmp_path_factory.mktemp("-".join(map(str, key))) / "base"
            made[key] = (make_fused if fused else make_model)(folder, family, dtype)
        return made[key]

    return get


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small take twice as long on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _several_blocks_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CPU_BLOCK", 1000)


@pytest.mark.parametrize(("case", "dtype"), ROWS)
def test_merging(bases: Get, tmp_path: Path, case: Case, dtype: str) -> None:
    base = bases(case.family, dtype, fused=case.fused)
    adapters = [
        make_kind(tmp_path / f"adapter{number}", base, case.family, case.kind, seed=number + 1)
        for number in range(case.adapters)
    ]
    beside = unmerged(base, case.family, adapters, case.kind)
    alone = open_model(base, case.family)
    exact = exact_weights(beside, alone.state_dict())
    right = _right_answers(case, alone, beside, exact) if dtype == "float32" else None

    out = tmp_path / "out"
    report = merge(base, adapters, out=out, device="cpu", strict=True)

    placed = sorted((Path(placement.adapter).resolve(), placement.tensor) for placement in report.plan.placements)
    assert placed == sorted((folder.resolve(), name) for folder in adapters for name in names_on_disk(folder))
    assert names_on_disk(out) == names_on_disk(base) | case.added
    assert {tensor.dtype for tensor in on_disk(out).values()} == {getattr(torch, dtype)}
    config = json.loads((out / "config.json").read_text())
    assert {key: config.get(key) for key in case.says} == case.says
    model = open_model(out, case.family)
    assert getattr(model.config.get_text_config(), "tie_word_embeddings", False) == exact.tied
    mine = model.state_dict()
    _assert_weights(mine, exact)
    if case.as_peft:
        _assert_bits_of_peft(case, base, adapters[0], mine)
    if right is not None:
        torch.testing.assert_close(answers(model, case.family), right, rtol=1e-4, atol=1e-4)


def _right_answers(case: Case, alone: Any, beside: Any, exact: Exact) -> torch.Tensor:
    """What the unmerged model answers. An oracle that is wrong is seen here, before lorakit runs."""
    before, right = answers(alone, case.family), answers(beside, case.family)
    assert right.shape != before.shape or (right - before).abs().max() > 0.01
    torch.testing.assert_close(answers(model_of(exact, case.family), case.family), right, rtol=1e-4, atol=1e-4)
    return right


def _assert_weights(mine: dict[str, torch.Tensor], exact: Exact) -> None:
    assert mine.keys() == exact.weights.keys()
    for name, tensor in mine.items():
        if name in exact.changed:
            _named(name, tensor, exact.weights[name])
        else:
            assert torch.equal(tensor.double(), exact.weights[name]), name


def _named(name: str, mine: torch.Tensor, exact64: torch.Tensor) -> None:
    try:
        assert_rounded_once(mine, exact64)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None


def _assert_bits_of_peft(case: Case, base: Path, adapter: Path, mine: dict[str, torch.Tensor]) -> None:
    from peft import PeftModel

    with warnings_of_peft():
        theirs = PeftModel.from_pretrained(open_model(base, case.family), adapter).merge_and_unload().state_dict()
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_measure_sees_a_second_rounding(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(60, 50, generator=generator).to(dtype)
    delta = torch.randn(60, 50, generator=generator) / 50
    exact64 = weight.double() + delta.double()
    assert_rounded_once((weight.float() + delta).to(dtype), exact64)
    with pytest.raises(AssertionError, match="are not the exact values rounded once"):
        assert_rounded_once(weight + delta.to(dtype), exact64)
    far = exact64.to(dtype)
    far[7, 7] *= 1.05
    with pytest.raises(AssertionError, match="more than one last bit away"):
        assert_rounded_once(far, exact64)


# --- other spellings ------------------------------------------------------------------------------------------------


def _with_adapter_name(name: str) -> str:
    name = re.sub(r"\.(lora_[AB])\.(weight|bias)$", r".\1.default.\2", name)
    return re.sub(r"\.(lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta)$", r".\1.default", name)


def _as_raw(name: str) -> str:
    """As the running model's `state_dict` has it."""
    name = _with_adapter_name(name).replace("vector.default", "vector.default.weight")
    return re.sub(r"\.(lm_head|norm)\.weight$", r".\1.modules_to_save.default.weight", name)


EVERYTHING = {
    "llama": _lora(modules_to_save=["lm_head", "norm"], use_dora=True, trainable_token_indices=[3, 50]),
    "qwen2": _lora(bias="all", lora_bias=True, target_modules=["q_proj", "k_proj"]),
    "llava": _modules("q_proj", "embed_tokens", "linear_1", modules_to_save=["lm_head"]),
    "gpt2": _modules("c_attn", "wpe", use_dora=True),
}
SPELLINGS: dict[str, tuple[str, Callable[[str], str]]] = {
    "the adapter's name in it": ("llama qwen2 llava gpt2", _with_adapter_name),
    "the running model's names": ("llama qwen2 llava gpt2", _as_raw),
    "no prefix": ("llama qwen2 llava gpt2", lambda name: name.removeprefix("base_model.model.")),
    "the names of a compiled model": ("llama", lambda name: name.replace("model.model.", "model._orig_mod.model.", 1)),
    "trained biases beside the layer": ("qwen2", lambda name: name.replace("base_layer.bias", "bias")),
}
SPELLED = [
    pytest.param(family, rename, id=f"{spelling} of {family}")
    for spelling, (families, rename) in SPELLINGS.items()
    for family in families.split()
]


@pytest.mark.parametrize(("family", "rename"), SPELLED)
def test_the_spelling_of_the_keys_changes_nothing(
    bases: Get, tmp_path: Path, family: str, rename: Callable[[str], str]
) -> None:
    base = bases(family)
    adapter = make_kind(tmp_path / "adapter", base, family, EVERYTHING[family])
    merge(base, [adapter], out=tmp_path / "today", device="cpu")
    before = names_on_disk(adapter)
    rename_tensors(adapter, rename)
    assert names_on_disk(adapter) != before
    merge(base, [adapter], out=tmp_path / "then", device="cpu")
    _assert_same_files(tmp_path / "then", tmp_path / "today")


def _assert_same_files(mine: Path, theirs: Path) -> None:
    one, other = on_disk(mine), on_disk(theirs)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_the_copy_that_stood_beside_a_saved_module_is_accounted_for(bases: Get, tmp_path: Path) -> None:
    base = bases("llama")
    adapter = make_kind(tmp_path / "adapter", base, "llama", _lora(modules_to_save=["lm_head"]))
    merge(base, [adapter], out=tmp_path / "today", device="cpu")
    rename_tensors(adapter, _as_raw)
    file = adapter / "adapter_model.safetensors"
    copy = {"base_model.model.lm_head.original_module.weight": on_disk(base)["lm_head.weight"]}
    save_file(load_file(file) | copy, file, metadata={"format": "pt"})
    report = merge(base, [adapter], out=tmp_path / "then", device="cpu")
    _assert_same_files(tmp_path / "then", tmp_path / "today")
    assert sorted(placed.tensor for placed in report.plan.placements) == sorted(names_on_disk(adapter))


@pytest.mark.parametrize("fused", [False, True], ids=["base of transformers 4", "base of transformers 5"])
@pytest.mark.parametrize("old", [False, True], ids=["adapter of today", "adapter of transformers 4.51"])
@pytest.mark.parametrize("kind", ["factors", "everything"])
def test_the_prefix_of_a_vision_language_model_may_have_moved(
    bases: Get, tmp_path: Path, fused: bool, old: bool, kind: str
) -> None:
    base = bases("llava", fused=fused)
    adapter = make_kind(tmp_path / "adapter", base, "llava", _lora() if kind == "factors" else EVERYTHING["llava"])
    alone = open_model(base, "llava")
    exact = exact_weights(unmerged(base, "llava", [adapter], Kind()), alone.state_dict())
    if old:
        rename_tensors(adapter, _as_transformers_4)
    merge(base, [adapter], out=tmp_path / "out", device="cpu")
    assert names_on_disk(tmp_path / "out") == names_on_disk(base)
    _assert_weights(open_model(tmp_path / "out", "llava").state_dict(), exact)


def _as_transformers_4(name: str) -> str:
    name = name.replace(".model.model.language_model.", ".model.language_model.model.")
    name = name.replace("base_model.model.lm_head.", "base_model.model.language_model.lm_head.")
    return re.sub(r"\.model\.model\.(vision_tower|multi_modal_projector)\.", r".model.\1.", name)


# --- what is refused ------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a PiSSA of randomised decompositions": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "loftq"),
    "CorDA": ({"init_lora_weights": "corda"}, "corda"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "lora_ga"),
    "an init that nobody knows": ({"init_lora_weights": "of tomorrow"}, "of tomorrow"),
    "an activated LoRA": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "Arrow": ({"arrow_config": {"top_k": 2}}, "arrow_config"),
    "KaSA": ({"kasa_config": {"beta": 0.1}}, "kasa_config"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_what_no_merge_can_do_is_refused_and_leaves_nothing(
    bases: Get, tmp_path: Path, what: str, strict: bool
) -> None:
    base = bases("llama")
    adapter = make_kind(tmp_path / "adapter", base, "llama", _modules("q_proj"))
    said, reason = REFUSED[what]
    edit_config(adapter, **said)
    with pytest.raises(UnsupportedAdapter, match=reason):
        merge(base, [adapter], out=tmp_path / "out", device="cpu", strict=strict)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# The part of each kind without which the rest says something else.
LACKING: dict[str, tuple[str, Kind, str]] = {
    "a magnitude": ("llama", _lora(use_dora=True), r"1\.self_attn\.q_proj\.lora_magnitude_vector"),
    "one factor": ("llama", _lora(), r"1\.self_attn\.q_proj\.lora_A"),
    "one factor of the embedding": ("llama", _modules("embed_tokens"), "lora_embedding_B"),
    "one factor of the experts": ("qwen3-moe", _experts(*EXPERTS), r"1\.mlp\.experts\.lora_B"),
    "the inner experts' factors": ("qwen3-moe", _experts(*EXPERTS), r"1\.mlp\.experts\.base_layer\.lora_"),
    "a saved module": ("llama", _lora(modules_to_save=["lm_head"]), "lm_head"),
    "trained rows": ("llama", _lora(trainable_token_indices=[3, 5]), "trainable_tokens_delta"),
    "the biases of lora_B": ("qwen2", _modules("q_proj", lora_bias=True), r"lora_B\.bias"),
    "one bias of lora_B": ("qwen2", _modules("q_proj", lora_bias=True), r"1\.self_attn\.q_proj\.lora_B\.bias"),
}


@pytest.mark.parametrize("what", LACKING)
def test_an_adapter_that_lacks_a_part_is_refused(bases: Get, tmp_path: Path, what: str) -> None:
    family, kind, part = LACKING[what]
    adapter = make_kind(tmp_path / "adapter", bases(family), family, kind)
    before = names_on_disk(adapter)
    rename_tensors(adapter, lambda name: None if re.search(part, name) else name)
    assert names_on_disk(adapter) < before
    with pytest.raises(Refused):
        merge(bases(family), [adapter], out=tmp_path / "out", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# Of each kind: a part of names, what stands there instead, and what the refusal has to speak of.
STRAY: dict[str, tuple[str, Kind, str, str, str]] = {
    "a layer that is none": ("llama", _lora(), "layers.1.", "layers.11.", "layers.11."),
    "a bias": ("qwen2", _lora(bias="all"), "v_proj.base_layer.bias", "v.base_layer.bias", "n.v.base_layer.bias"),
    "a bias of lora_B": (
        "qwen2",
        _modules("q_proj", "k_proj", lora_bias=True),
        "0.self_attn.q_proj.lora_B.bias",
        "0.self_attn.q.lora_B.bias",
        "0.self_attn.q.lora_B.bias",
    ),
    "an embedding": ("llama", _modules("embed_tokens", "q_proj"), "embed_tokens.", "words.", "words.lora_embedding_A"),
    "experts": ("qwen3-moe", _experts(*EXPERTS), "0.mlp.experts.", "0.mlp.specialists.", "0.mlp.specialists.lora_A"),
    "a magnitude": ("llama", _lora(use_dora=True), "_magnitude_vector", "_length", "q_proj.lora_length"),
    "a saved norm": (
        "llama",
        _lora(modules_to_save=["lm_head", "norm"]),
        "model.norm.",
        "model.nrom.",
        "model.nrom.weight",
    ),
}


@pytest.mark.parametrize("what", STRAY)
def test_tensors_with_a_name_that_is_none_are_refused_by_name(bases: Get, tmp_path: Path, what: str) -> None:
    family, kind, right, wrong, spoken_of = STRAY[what]
    adapter = make_kind(tmp_path / "adapter", bases(family), family, kind)
    before = names_on_disk(adapter)
    rename_tensors(adapter, lambda name: name.replace(right, wrong))
    assert names_on_disk(adapter) - before
    with pytest.raises(Refused, match=re.escape(spoken_of)):
        merge(bases(family), [adapter], out=tmp_path / "out", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# --- any subset of layers, ranks, dtypes and shards -----------------------------------------------------------------

SHAPES = {"q_proj": (96, 96), "k_proj": (48, 96), "o_proj": (96, 96), "up_proj": (301, 96), "down_proj": (96, 301)}
PATHS = {
    f"model.layers.{layer}.{'self_attn' if name in 'q_proj k_proj o_proj' else 'mlp'}.{name}": shape
    for layer in range(2)
    for name, shape in SHAPES.items()
}


@settings(max_examples=100)
@given(
    ranks=st.dictionaries(st.sampled_from(sorted(PATHS)), st.integers(1, 9), min_size=1),
    dtype=st.sampled_from(DTYPES),
    stored_as=st.sampled_from(DTYPES),
    shards=st.sampled_from(["1GB", "250KB", "60KB"]),
    fault=st.sampled_from(["none", "a factor is missing", "a module is renamed", "a tensor is added"]),
    seed=st.integers(0, 100),
)
def test_each_tensor_is_placed_once_or_nothing_is_written(
    sharded: Get, tmp_path: Path, ranks: dict[str, int], dtype: str, stored_as: str, shards: str, fault: str, seed: int
) -> None:
    base = sharded(dtype, shards)
    place = Path(tempfile.mkdtemp(dir=tmp_path))
    tensors = _write_adapter(place / "adapter", ranks, stored_as, fault, seed)
    module = next(iter(ranks))
    out = place / "out"
    if fault == "none":
        report = merge(base, [place / "adapter"], out=out, device="cpu")
        assert sorted(placed.tensor for placed in report.plan.placements) == sorted(tensors)
        _assert_sum(on_disk(base), on_disk(out), tensors, ranks)
        assert {file.name for file in out.glob("*.safetensors")} == {file.name for file in base.glob("*.safetensors")}
        return
    missing = fault == "a factor is missing"
    with pytest.raises(Refused if missing else UnplacedTensors, match=re.escape(module if missing else "nowhere")):
        merge(base, [place / "adapter"], out=out, device="cpu")
    assert [path.name for path in place.iterdir()] == ["adapter"]
    known = {name: tensor for name, tensor in tensors.items() if "nowhere" not in name}
    if missing or not known:
        return
    report = merge(base, [place / "adapter"], out=out, device="cpu", strict=False)
    assert sorted(placed.tensor for placed in report.plan.placements) == sorted(known)
    assert len(report.unplaced) == len(tensors) - len(known)
    assert all(any(name in line for line in report.unplaced) for name in tensors.keys() - known.keys())
    _assert_sum(on_disk(base), on_disk(out), known, ranks)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Get:
    @functools.cache
    def get(dtype: str, shards: str) -> Path:
        return make_model(tmp_path_factory.mktemp("sharded") / "base", "llama", dtype, max_shard_size=shards)

    return get


def _write_adapter(folder: Path, ranks: dict[str, int], dtype: str, fault: str, seed: int) -> dict[str, torch.Tensor]:
    """Written by hand: PEFT's own are in the table."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for number, (module, rank) in enumerate(ranks.items()):
        name = "model.layers.nowhere" if fault == "a module is renamed" and number == 0 else module
        out, into = PATHS[module]
        for part, shape in (("lora_A", (rank, into)), ("lora_B", (out, rank))):
            values = torch.randn(shape, generator=generator) / 10
            tensors[f"base_model.model.{name}.{part}.weight"] = values.to(getattr(torch, dtype))
    if fault == "a factor is missing":
        del tensors[f"base_model.model.{next(iter(ranks))}.lora_{'AB'[seed % 2]}.weight"]
    if fault == "a tensor is added":
        tensors["base_model.model.model.nowhere.weight"] = torch.ones(3)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    patterns = {**ranks, "model.layers.nowhere": ranks[next(iter(ranks))]}
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 12, "rank_pattern": patterns}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def _assert_sum(
    before: dict[str, torch.Tensor],
    after: dict[str, torch.Tensor],
    tensors: dict[str, torch.Tensor],
    ranks: dict[str, int],
) -> None:
    assert before.keys() == after.keys()
    for name, old in before.items():
        module = name.removesuffix(".weight")
        a, b = (tensors.get(f"base_model.model.{module}.lora_{part}.weight") for part in "AB")
        if a is None or b is None:
            assert torch.equal(after[name], old), name
        else:
            _named(name, after[name], old.double() + 12 / ranks[module] * (b.double() @ a.double()))
