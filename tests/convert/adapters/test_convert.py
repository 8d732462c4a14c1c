"""Adapters of every kind, written in one form: PEFT answers with it as with what it was made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lorakit.adapters.reading import load_adapter
from lorakit.convert.adapters.convert import convert_adapter
from lorakit.convert.check import check_adapter
from lorakit.errors import Conflict, InvalidFile, NotFound, Refused, UsageError
from lorakit.merge.base import read_base
from lorakit.merge.merge import merge
from tests.folders import leftovers
from tests.merge.kinds import (
    Kind,
    answers,
    edit_config,
    make_kind,
    on_disk,
    open_model,
    rename_tensors,
    unmerged,
    warnings_of_peft,
)

WEIGHTS = "adapter_model.safetensors"


def is_served_form(folder: Path) -> bool:
    """One rank, alpha = rank, nothing else asked for, and no tensors but factors of that rank."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / WEIGHTS)
    asked = ("use_dora", "use_rslora", "lora_bias", "modules_to_save", "trainable_token_indices", "rank_pattern",
             "alpha_pattern", "target_parameters", "use_qalora")  # fmt: skip
    factors = [tensor.shape[0 if "_A" in name else 1] for name, tensor in tensors.items() if ".lora_" in name]
    return (
        config["r"] == config["lora_alpha"]
        and config["bias"] == "none"
        and not any(config.get(name) for name in asked)
        and factors == [config["r"]] * len(tensors)
    )


def answers_with(base: Path, family: str, folder: Path) -> torch.Tensor:
    with warnings_of_peft():
        return answers(PeftModel.from_pretrained(open_model(base, family, "float32"), folder).eval(), family)


def with_raw_names(folder: Path) -> None:
    rename_tensors(folder, lambda name: name.replace(".weight", ".default.weight"))


def without_prefix(folder: Path) -> None:
    rename_tensors(folder, lambda name: name.replace("base_model.model.", ""))


def of_the_inner_class(folder: Path) -> None:
    rename_tensors(folder, lambda name: name.replace("base_model.model.model.", "base_model.model."))


def as_tinker_names_the_head(folder: Path) -> None:
    rename_tensors(folder, lambda name: name.replace("lm_head.lora", "model.unembed_tokens.lora"))


def with_bias_in_the_config(folder: Path) -> None:
    edit_config(folder, bias="all")


def in_one_piece(folder: Path) -> None:
    """q, k and v as one layer with a common A, as writers with fused attention have it."""
    file = folder / WEIGHTS
    tensors = load_file(file)
    for name in [name for name in tensors if "q_proj.lora_A" in name]:
        parts = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
        a = [tensors.pop(part) for part in parts]
        b = [tensors.pop(part.replace("lora_A", "lora_B")) for part in parts]
        whole = name.replace("q_proj", "qkv_proj")
        tensors[whole] = torch.cat(a)
        tensors[whole.replace("lora_A", "lora_B")] = torch.block_diag(*b)
    save_file(tensors, file, metadata={"format": "pt"})
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    edit_config(folder, rank_pattern={"qkv_proj": 24}, alpha_pattern={"qkv_proj": 3 * alpha})


EXACT = {
    "plain": ("llama", Kind()),
    "rslora": ("llama", Kind({"use_rslora": True})),
    "patterns": ("llama", Kind({"rank_pattern": {"q_proj": 4, "down_proj": 2}, "alpha_pattern": {"v_proj": 3}})),
    "rslora and patterns": ("llama", Kind({"use_rslora": True, "rank_pattern": {"q_proj": 4}})),
    "an embedding and a head": ("llama", Kind({"target_modules": ["embed_tokens", "lm_head", "q_proj"]})),
    "the head of a tied base": ("tied-llama", Kind({"target_modules": ["lm_head", "q_proj"]})),
    "trained rows": ("llama", Kind({"trainable_token_indices": [3, 99, 7]})),
    "trained rows of a tied base": ("tied-llama", Kind({"trainable_token_indices": [3, 99]})),
    "trained rows of a head": ("llama", Kind({"trainable_token_indices": {"lm_head": [5, 8]}})),
    "trained rows of both sides": (
        "llama", Kind({"trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [5]}}),
    ),
    "target_parameters of linear layers": (
        "llama", Kind({"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]}),
    ),
    "converted pissa": ("llama", Kind({"init_lora_weights": "pissa"}, starts_from_base=True, convert=True)),
    "qalora": ("llama", Kind({"target_modules": ["q_proj", "o_proj"]}, group=4)),
    "a Conv1D": ("gpt2", Kind({"fan_in_fan_out": True})),
    "raw names": ("llama", Kind(change=with_raw_names)),
    "no prefix": ("llama", Kind(change=without_prefix)),
    "an inner class": ("llama", Kind(change=of_the_inner_class)),
    "the head as tinker calls it": ("llama", Kind({"target_modules": ["lm_head"]}, change=as_tinker_names_the_head)),
    "a bias in the config alone": ("llama", Kind(change=with_bias_in_the_config)),
    "fused attention": ("llama", Kind(change=in_one_piece)),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_what_is_written_answers_as_what_was_read(tmp_path: Path, bases: Callable[[str], Path], name: str) -> None:
    family, kind = EXACT[name]
    base = bases(family)
    known = Kind(kind.lora, kind.vocabulary, kind.starts_from_base, kind.group, kind.convert)
    adapter = make_kind(tmp_path / "adapter", base, family, known)
    wanted = answers(unmerged(base, family, [adapter], Kind(kind.lora, group=kind.group)), family)
    if kind.change:
        kind.change(adapter)
    target = "peft" if family == "gpt2" else "vllm"  # whose GPT-2 takes no adapter
    report = convert_adapter(adapter, tmp_path / "out", base=str(base), target=target)
    assert is_served_form(tmp_path / "out")
    assert (report.error, report.kind) == (0.0, "adapter")
    torch.testing.assert_close(answers_with(base, family, tmp_path / "out"), wanted, rtol=1e-4, atol=1e-4)
    written = check_adapter(load_adapter(tmp_path / "out"), read_base(base), engine=target)
    assert (written.problems, written.repairs, dict(written.rename)) == ((), (), {})


@dataclass(frozen=True)
class Method:
    config: Any
    rank: int


METHODS = {
    "loha": Method(peft.LoHaConfig(r=3, alpha=6, target_modules=["q_proj", "down_proj"]), 9),
    "lokr": Method(peft.LoKrConfig(r=3, alpha=6, target_modules=["q_proj", "down_proj"]), 30),
    "vera": Method(peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]), 4),
    "trained rows": Method(peft.TrainableTokensConfig(token_indices=[3, 99, 7], target_modules=["embed_tokens"]), 3),
    "adalora": Method(peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"]), 4),
}


def of_method(folder: Path, base: Path, config: Any) -> tuple[Path, torch.Tensor]:
    torch.manual_seed(5)
    with warnings_of_peft():
        model = get_peft_model(open_model(base, "llama", "float32"), config)
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder, answers(model.eval(), "llama")


@pytest.mark.parametrize("name", METHODS)
def test_other_methods_of_low_rank_become_plain_factors(
    tmp_path: Path, bases: Callable[[str], Path], name: str
) -> None:
    base, method = bases("llama"), METHODS[name]
    adapter, wanted = of_method(tmp_path / "adapter", base, method.config)
    report = convert_adapter(adapter, tmp_path / "out", base=str(base))
    assert is_served_form(tmp_path / "out")
    assert report.error == 0.0
    assert load_adapter(tmp_path / "out").rank <= method.rank
    torch.testing.assert_close(answers_with(base, "llama", tmp_path / "out"), wanted, rtol=1e-3, atol=1e-3)


NEAR = {
    "dora": Kind({"use_dora": True}),
    "unconverted pissa": Kind({"init_lora_weights": "pissa"}, starts_from_base=True),
    "a saved head": Kind({"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("name", NEAR)
def test_what_is_not_of_low_rank_is_refused_unless_something_near_is_asked_for(
    tmp_path: Path, bases: Callable[[str], Path], name: str
) -> None:
    base, kind = bases("llama"), NEAR[name]
    adapter = make_kind(tmp_path / "adapter", base, "llama", kind)
    with pytest.raises(Refused, match=r"--approximate.*lorakit merge"):
        convert_adapter(adapter, tmp_path / "out", base=str(base))
    assert leftovers(tmp_path) == []
    wanted = answers(unmerged(base, "llama", [adapter], kind), "llama")
    far = (answers(open_model(base, "llama"), "llama") - wanted).norm()
    errors, distances = [], []
    for rank in (4, 32):
        out = tmp_path / f"out{rank}"
        errors.append(convert_adapter(adapter, out, base=str(base), rank=rank).error)
        assert is_served_form(out)
        assert load_adapter(out).rank <= rank
        assert json.loads((out / "lorakit.json").read_text())["truncation_error"] == errors[-1]
        distances.append((answers_with(base, "llama", out) - wanted).norm())
    assert 1 > errors[0] > errors[1]
    assert distances[1] < distances[0] < far
    assert distances[1] < 1e-2 * far or errors[1] > 1e-3


LOST = {
    "norms": ("llama", Kind({"modules_to_save": ["norm"]})),
    "a resized vocabulary": ("llama", Kind({"modules_to_save": ["lm_head", "embed_tokens"]}, vocabulary=110)),
    "biases": ("qwen2", Kind({"bias": "all"})),
    "biases of lora_B": ("qwen2", Kind({"lora_bias": True, "target_modules": ["q_proj", "v_proj"]})),
    "experts in one tensor": (
        "gpt-oss",
        Kind({
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "rank_pattern": {"q_proj": 2},
        }),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_what_no_factors_carry_is_refused_however_near_the_rest_is(
    tmp_path: Path, bases: Callable[[str], Path], name: str
) -> None:
    family, kind = LOST[name]
    adapter = make_kind(tmp_path / "adapter", bases(family), family, kind)
    with pytest.raises(Refused, match=r"lorakit merge"):
        convert_adapter(adapter, tmp_path / "out", base=str(bases(family)), rank=16)
    assert leftovers(tmp_path) == []
    merge(bases(family), [(adapter, 1.0)], out=tmp_path / "merged")


def test_a_tensor_that_nothing_has_a_place_for_is_named_without_a_way_that_is_none(
    tmp_path: Path, bases: Callable[[str], Path]
) -> None:
    base = bases("llama")
    adapter = make_kind(tmp_path / "adapter", base, "llama", Kind())
    tensors = load_file(adapter / WEIGHTS)
    save_file({**tensors, "base_model.model.surprise": torch.ones(3)}, adapter / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(Refused, match="surprise") as refused:
        convert_adapter(adapter, tmp_path / "out", base=str(base), approximate=True)
    assert "--no-strict" not in str(refused.value)


def test_oft_is_approximated_too(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    base = bases("llama")
    config = peft.OFTConfig(oft_block_size=8, target_modules=["q_proj", "v_proj"])
    adapter, wanted = of_method(tmp_path / "adapter", base, config)
    report = convert_adapter(adapter, tmp_path / "out", base=str(base), rank=96)  # all that these layers have
    assert report.error is not None
    assert report.error < 1e-4
    torch.testing.assert_close(answers_with(base, "llama", tmp_path / "out"), wanted, rtol=1e-3, atol=1e-3)


def test_a_rank_above_the_servers_is_cut_to_it_when_asked_and_the_loss_is_measured(
    tmp_path: Path, bases: Callable[[str], Path]
) -> None:
    base = bases("llama")
    adapter = make_kind(tmp_path / "adapter", base, "llama", Kind())
    with pytest.raises(Refused, match="rank 8, but --max-lora-rank is 4"):
        convert_adapter(adapter, tmp_path / "out", base=str(base), max_rank=4)
    report = convert_adapter(adapter, tmp_path / "out", base=str(base), max_rank=4, approximate=True)
    assert load_adapter(tmp_path / "out").rank == 4
    exact, near = (load_adapter(folder) for folder in (adapter, tmp_path / "out"))
    lost = sum((exact.deltas[name].dense() - near.deltas[name].dense()).square().sum() for name in exact.deltas)
    whole = sum(delta.dense().square().sum() for delta in exact.deltas.values())
    assert report.error == pytest.approx(float((lost / whole).sqrt()), rel=1e-4)


def test_a_pickled_adapter_becomes_safetensors_and_no_pickle_runs(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    base = bases("llama")
    adapter = make_kind(tmp_path / "adapter", base, "llama", Kind())
    tensors = load_file(adapter / WEIGHTS)
    wanted = answers_with(base, "llama", adapter)
    (adapter / WEIGHTS).unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    convert_adapter(adapter, tmp_path / "out", base=str(base))
    torch.testing.assert_close(answers_with(base, "llama", tmp_path / "out"), wanted, rtol=1e-4, atol=1e-4)

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"a": Attack()}, adapter / "adapter_model.bin")
    with pytest.raises(Refused):
        convert_adapter(adapter, tmp_path / "attacked", base=str(base))
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "attacked").exists()


def test_copies_of_the_bases_tables_are_left_out_and_named(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    base = bases("llama")
    adapter = make_kind(tmp_path / "adapter", base, "llama", Kind())
    copied = {
        f"base_model.model.{name}": on_disk(base)[name] for name in ("lm_head.weight", "model.embed_tokens.weight")
    }
    save_file({**load_file(adapter / WEIGHTS), **copied}, adapter / WEIGHTS, metadata={"format": "pt"})
    report = convert_adapter(adapter, tmp_path / "out", base=str(base))
    assert [set(names) for names in report.left_out.values()] == [set(copied)]
    assert is_served_form(tmp_path / "out")


def test_trained_rows_that_equal_the_bases_cost_no_rank(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    base = bases("llama")
    adapter = make_kind(tmp_path / "adapter", base, "llama", Kind({"r": 1, "trainable_token_indices": [3, 5, 9]}))
    tensors = load_file(adapter / WEIGHTS)
    (name,) = (name for name in tensors if "trainable_tokens" in name)
    tensors[name][1:] = on_disk(base)["model.embed_tokens.weight"][[5, 9]]
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    convert_adapter(adapter, tmp_path / "out", base=str(base))
    assert load_adapter(tmp_path / "out").rank == 1


# experts

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def expert_names(folder: Path) -> set[str]:
    return {name.partition(".lora_")[0] for name in load_file(folder / WEIGHTS) if ".experts." in name}


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
@pytest.mark.parametrize("parameters", [PARAMETERS, PARAMETERS[1:]], ids=["both", "one"])
def test_factors_of_all_experts_at_once_become_those_of_each(
    tmp_path: Path, bases: Callable[[str], Path], family: str, parameters: list[str]
) -> None:
    base = bases(family)
    kind = Kind({"target_parameters": parameters, "lora_alpha": 12, "r": 4})
    adapter = make_kind(tmp_path / "adapter", base, family, kind)
    convert_adapter(adapter, tmp_path / "out", base=str(base))
    assert is_served_form(tmp_path / "out")
    wanted = {f"base_model.model.{name.removesuffix('.weight')}" for name in on_disk(base) if ".experts." in name}
    assert expert_names(tmp_path / "out") == wanted  # vLLM wants all layers of all experts
    for folder in ("adapter", "out"):
        merge(base, [(tmp_path / folder, 1.0)], out=tmp_path / f"merged-{folder}")
    mine, theirs = on_disk(tmp_path / "merged-out"), on_disk(tmp_path / "merged-adapter")
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-5, atol=1e-5)


def test_factors_of_all_experts_at_once_stay_as_they_are_where_vllm_takes_them_so(
    tmp_path: Path, bases: Callable[[str], Path]
) -> None:
    base = bases("gpt-oss")
    kind = Kind({"target_parameters": PARAMETERS, "lora_alpha": 12, "r": 4})
    adapter = make_kind(tmp_path / "adapter", base, "gpt-oss", kind)
    verdict = check_adapter(load_adapter(adapter), read_base(base), max_rank=4)
    assert (verdict.problems, verdict.repairs, verdict.rank) == ((), (), 4)
    layers = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    assert set(verdict.stacked) == {*layers, *(f"{layer}.base_layer" for layer in layers)}
    assert (verdict.modules, verdict.applied) == (4 + len(verdict.plain.deltas), 4 + len(verdict.plain.deltas))
    assert "rank 4" in check_adapter(load_adapter(adapter), read_base(base), max_rank=3).problems[0]
    convert_adapter(adapter, tmp_path / "out", base=str(base))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    with pytest.raises(Refused, match="vLLM and PEFT alone"):
        convert_adapter(adapter, tmp_path / "other", base=str(base), target="lorax")


def test_factors_of_all_experts_at_once_are_never_cut(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    base = bases("gpt-oss")
    adapter = make_kind(tmp_path / "adapter", base, "gpt-oss", Kind({"target_parameters": PARAMETERS, "r": 4}))
    with pytest.raises(Refused, match=r"it has rank 4, but --max-lora-rank is 2: merge it into its base"):
        convert_adapter(adapter, tmp_path / "out", base=str(base), rank=2)
    assert leftovers(tmp_path) == []


def test_an_adapter_of_experts_alone_has_their_rank(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    base = bases("gpt-oss")
    kind = Kind({"target_modules": [], "target_parameters": PARAMETERS, "r": 4})
    verdict = check_adapter(load_adapter(make_kind(tmp_path / "adapter", base, "gpt-oss", kind)), read_base(base))
    assert (verdict.rank, verdict.modules, verdict.applied) == (4, 4, 4)
    assert "rank 4" in [check.reason for check in verdict.checks if check.name == "rank"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_parameters": PARAMETERS[1:]}, "both parameters"),
        ({"target_parameters": PARAMETERS, "rank_pattern": {"q_proj": 2}}, "beside factors of all experts"),
    ],
)
def test_what_vllm_would_want_otherwise_there_is_refused(
    tmp_path: Path, bases: Callable[[str], Path], settings: dict[str, Any], said: str
) -> None:
    base = bases("gpt-oss")
    adapter = make_kind(tmp_path / "adapter", base, "gpt-oss", Kind({"r": 4, **settings}))
    with pytest.raises(Refused, match=said):
        convert_adapter(adapter, tmp_path / "out", base=str(base))


def test_unsloths_order_and_the_other_way_round_are_refused_there(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    base = bases("gpt-oss")
    adapter = make_kind(tmp_path / "adapter", base, "gpt-oss", Kind({"target_parameters": PARAMETERS, "r": 4}))
    edit_config(adapter, lora_B_layout="grouped_by_expert")
    with pytest.raises(Refused, match="Unsloth's order"):
        convert_adapter(adapter, tmp_path / "out", base=str(base))


def test_experts_as_tinker_writes_them_become_those_of_each(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    base = bases("qwen3-moe")
    adapter = make_kind(tmp_path / "adapter", base, "qwen3-moe", Kind({"target_modules": ["q_proj"]}))
    tensors = load_file(adapter / WEIGHTS)
    path, chance = "base_model.model.model.layers.1.mlp.experts", torch.Generator().manual_seed(2)
    for layer, (out, into) in {"w1": (20, 32), "w3": (20, 32), "w2": (32, 20)}.items():
        tensors[f"{path}.{layer}.lora_A.weight"] = torch.randn(1 if layer == "w1" else 4, 8, into, generator=chance)
        tensors[f"{path}.{layer}.lora_B.weight"] = torch.randn(4, out, 8, generator=chance)
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    convert_adapter(adapter, tmp_path / "out", base=str(base))
    written = load_adapter(tmp_path / "out").deltas
    for expert in range(4):
        for layer, name in {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.items():
            a, b = (tensors[f"{path}.{layer}.lora_{part}.weight"] for part in "AB")
            wanted = 2 * b[expert].double() @ a[expert % len(a)].double()
            mine = written[f"model.layers.1.mlp.experts.{expert}.{name}"].dense()
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


def test_unsloths_order_of_experts_is_refused_where_nothing_tells_it(
    tmp_path: Path, bases: Callable[[str], Path]
) -> None:
    base = bases("qwen3-moe")
    adapter = make_kind(tmp_path / "adapter", base, "qwen3-moe", Kind({"target_parameters": PARAMETERS, "r": 8}))
    (adapter / "README.md").write_text("Trained with Unsloth.")
    with pytest.raises(Refused, match="Unsloth"):
        convert_adapter(adapter, tmp_path / "out", base=str(base))


# what ends it


def test_another_base_is_refused_even_when_something_near_would_do(
    tmp_path: Path, bases: Callable[[str], Path]
) -> None:
    adapter = make_kind(tmp_path / "adapter", bases("qwen2"), "qwen2", Kind())
    with pytest.raises(Refused, match="made for another base"):
        convert_adapter(adapter, tmp_path / "out", base=str(bases("qwen3-moe")), approximate=True)
    assert leftovers(tmp_path) == []


def test_what_the_arguments_contradict_writes_nothing(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    base = bases("llama")
    adapter = make_kind(tmp_path / "adapter", base, "llama", Kind())
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").touch()
    with pytest.raises(Conflict):
        convert_adapter(adapter, tmp_path / "there", base=str(base))
    with pytest.raises(UsageError, match="above"):
        convert_adapter(adapter, tmp_path / "out", base=str(base), rank=9, max_rank=8)
    with pytest.raises(UsageError, match="dry run"):
        convert_adapter(adapter, None, base=str(base))
    with pytest.raises(NotFound):
        convert_adapter(adapter, tmp_path / "out", base=str(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_none_are_refused(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    base = bases("llama")
    adapter = make_kind(tmp_path / "adapter", base, "llama", Kind())
    tensors = load_file(adapter / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(Refused, match="NaN"):
        convert_adapter(adapter, tmp_path / "out", base=str(base))


def test_a_dry_run_says_the_same_and_leaves_nothing(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    base = bases("llama")
    adapter = make_kind(tmp_path / "adapter", base, "llama", Kind({"use_rslora": True}))
    before = sorted(tmp_path.iterdir())
    dry = convert_adapter(adapter, None, base=str(base), dry_run=True)
    assert sorted(tmp_path.iterdir()) == before
    done = convert_adapter(adapter, tmp_path / "out", base=str(base))
    assert (dry.tensors, dry.notes, dry.dry_run, done.dry_run) == (done.tensors, done.notes, True, False)


def test_without_a_base_at_hand_it_is_written_and_said(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    adapter = make_kind(tmp_path / "adapter", bases("llama"), "llama", Kind({"rank_pattern": {"q_proj": 2}}))
    edit_config(adapter, base_model_name_or_path=None)
    report = convert_adapter(adapter, tmp_path / "out")
    assert is_served_form(tmp_path / "out")
    assert any("not compared" in note for note in report.notes)


@pytest.mark.parametrize("named", ["/nowhere/x", None])
def test_why_there_is_no_base_is_said_without_a_cure_that_is_another(
    tmp_path: Path, bases: Callable[[str], Path], named: str | None
) -> None:
    adapter = make_kind(tmp_path / "adapter", bases("llama"), "llama", Kind())
    edit_config(adapter, base_model_name_or_path=named)
    (note,) = convert_adapter(adapter, tmp_path / "out").notes
    assert note.startswith("names and sizes are not compared with any base: ")
    assert "--base" not in note


def test_a_base_that_may_be_another_is_said_and_noted_then(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    adapter = make_kind(tmp_path / "adapter", bases("llama"), "llama", Kind())
    convert_adapter(adapter, tmp_path / "one", base=str(bases("llama")))
    record = json.loads((tmp_path / "one" / "lorakit.json").read_text())
    (noted,) = (parent for parent in record["parents"] if parent["kind"] == "base")
    noted.update(path="/gone", weights="0123", identity="llama-0123456789abcdef")
    (tmp_path / "one" / "lorakit.json").write_text(json.dumps(record))
    judged = check_adapter(load_adapter(tmp_path / "one"), read_base(bases("llama")))
    assert "lorakit convert ADAPTER --base BASE" in judged.open_questions[0]
    report = convert_adapter(tmp_path / "one", tmp_path / "two", base=str(bases("llama")))
    assert any("another dtype, or another model" in note for note in report.notes)
    assert not check_adapter(load_adapter(tmp_path / "two"), read_base(bases("llama"))).open_questions


def test_what_an_adapter_has_that_needs_its_base_is_refused_without_one(
    tmp_path: Path, bases: Callable[[str], Path]
) -> None:
    adapter = make_kind(tmp_path / "adapter", bases("llama"), "llama", Kind({"trainable_token_indices": [1]}))
    edit_config(adapter, base_model_name_or_path=None)
    with pytest.raises(Refused, match="--base"):
        convert_adapter(adapter, tmp_path / "out")


def test_a_pickled_adapter_without_its_config_is_refused_for_that(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    adapter = make_kind(tmp_path / "adapter", bases("llama"), "llama", Kind())
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    for name in (WEIGHTS, "adapter_config.json"):
        (adapter / name).unlink()
    with pytest.raises(InvalidFile, match=r"it has no adapter_config\.json"):
        convert_adapter(adapter, tmp_path / "out", base=str(bases("llama")))


def test_a_pattern_that_re_never_ends_with_holds_nothing_up(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    base = bases("llama")
    adapter = make_kind(tmp_path / "adapter", base, "llama", Kind())
    wanted = answers_with(base, "llama", adapter)
    never = ["([a-z._0-9]+)+!", "(([a-z._0-9])+.?)+!"]
    edit_config(adapter, rank_pattern=dict.fromkeys(never, 4), alpha_pattern=dict.fromkeys(never, 4))
    convert_adapter(adapter, tmp_path / "out", base=str(base))
    torch.testing.assert_close(answers_with(base, "llama", tmp_path / "out"), wanted, rtol=1e-4, atol=1e-4)


def test_nor_does_one_that_peft_would_ask_re_about(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    config = peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    adapter, _ = of_method(tmp_path / "adapter", bases("llama"), config)
    edit_config(adapter, feedforward_modules="([a-z._0-9]+)+!")
    with pytest.raises(InvalidFile, match=r"feedforward_modules: the pattern .* may take for ever"):
        convert_adapter(adapter, tmp_path / "out", base=str(bases("llama")), rank=4)


def test_a_damaged_file_is_named(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    adapter = make_kind(tmp_path / "adapter", bases("llama"), "llama", Kind())
    shutil.copy(adapter / WEIGHTS, tmp_path / "whole")
    (adapter / WEIGHTS).write_bytes((tmp_path / "whole").read_bytes()[:-10])
    with pytest.raises(InvalidFile):
        convert_adapter(adapter, tmp_path / "out", base=str(bases("llama")))
