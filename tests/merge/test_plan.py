"""Every tensor of base and adapters is accounted for before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.adapters.reading import load_adapter
from lorakit.errors import InvalidFile, LorakitError, Refused, UnplacedTensors, UnsupportedAdapter, WrongBase
from lorakit.merge.base import read_base
from lorakit.merge.plan import MergePlan, plan_merge
from lorakit.merge.steps import AddProduct, Step
from tests.folders import HIDDEN, VOCABULARY, base_tensors, factors, linear_modules, write_adapter, write_base

MODULE = "model.layers.0.self_attn.q_proj"
EMBEDDING = "base_model.model.model.embed_tokens"


def planned(tmp_path: Path, tensors: dict[str, Any] | None = None, *, strict: bool = True, **config: Any) -> MergePlan:
    base = read_base(write_base(tmp_path / "base", shards=2))
    return plan_merge(base, [load_adapter(write_adapter(tmp_path / "adapter", tensors, **config))], strict=strict)


def products(step: Step) -> AddProduct:
    assert isinstance(step, AddProduct)
    return step


def embedding_factors() -> dict[str, Any]:
    return {
        f"{EMBEDDING}.lora_embedding_A": np.ones((2, VOCABULARY), "float32"),
        f"{EMBEDDING}.lora_embedding_B": np.ones((HIDDEN, 2), "float32"),
    }


def test_each_tensor_is_copied_or_computed_once(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    copied = [tensor.source.name for shard in plan.shards for tensor in shard.copied]
    computed = [tensor.source.name for tensor in plan.computed]
    assert sorted(copied + computed) == sorted(base_tensors())
    assert sorted(computed) == sorted(f"{module}.weight" for module in linear_modules())
    assert len({placed.tensor for placed in plan.placements}) == 2 * len(linear_modules())


@settings(max_examples=40)
@given(data=st.data(), shards=st.integers(1, 4), strict=st.booleans())
def test_each_adapter_tensor_is_used_once_or_the_merge_refuses(data: st.DataObject, shards: int, strict: bool) -> None:
    there, foreign = linear_modules(), {"model.layers.9.mlp.up_proj": (12, 8), "other": (8, 8)}
    modules = data.draw(st.dictionaries(st.sampled_from([*there, *foreign]), st.integers(1, 5), min_size=1))
    prefix = data.draw(st.sampled_from(["", "model.", "module."]))
    tensors: dict[str, Any] = {}
    for module, rank in modules.items():
        tensors |= factors({prefix + module: (there | foreign)[module]}, rank)
    pattern = {prefix + module: rank for module, rank in modules.items()}
    with TemporaryDirectory() as folder:
        base = read_base(write_base(Path(folder) / "base", shards=shards))
        adapter = load_adapter(write_adapter(Path(folder) / "adapter", tensors, rank_pattern=pattern))
        if modules.keys() <= foreign.keys() or (strict and modules.keys() & foreign.keys()):
            with pytest.raises(UnplacedTensors):
                plan_merge(base, [adapter], strict=strict)
            return
        plan = plan_merge(base, [adapter], strict=strict)
    placed = [placement.tensor for placement in plan.placements]
    unplaced = [line.split(":")[0] for line in plan.unplaced]
    assert sorted(placed + unplaced) == sorted(tensors)
    used = [stored.name for computed in plan.computed for step in computed.steps for stored in products(step).stored]
    assert sorted(used) == sorted(placed)
    written = [tensor.source.name for shard in plan.shards for tensor in (*shard.copied, *shard.computed)]
    assert sorted(written) == sorted(base.tensors)


def test_a_plan_is_a_value(tmp_path: Path) -> None:
    base = read_base(write_base(tmp_path / "base"))
    adapter = load_adapter(write_adapter(tmp_path / "adapter"))
    assert plan_merge(base, [adapter]) == plan_merge(base, [adapter])
    assert plan_merge(base, [adapter]) != plan_merge(base, [adapter], dtype="bf16")


def test_another_width_is_another_base(tmp_path: Path) -> None:
    with pytest.raises(WrongBase, match=r"made for another base: its .*q_proj' is \[8, 10\], and .* is \[8, 8\]"):
        planned(tmp_path, factors({MODULE: (HIDDEN, HIDDEN + 2)}))


def test_more_layers_are_another_base(tmp_path: Path) -> None:
    with pytest.raises(UnplacedTensors) as refused:
        planned(tmp_path, factors(linear_modules(3)))
    assert "6 adapter tensors have no place" in str(refused.value)
    assert "model.layers.2.self_attn.q_proj.lora_A.weight: nearest in the base: " in str(refused.value)


def test_without_strict_the_unplaced_are_listed(tmp_path: Path) -> None:
    extra = {"base_model.model.something.else": np.ones(3, "float32")}
    plan = planned(tmp_path, factors({MODULE: (8, 8), "model.layers.7.mlp.up_proj": (12, 8)}) | extra, strict=False)
    assert [line.split(":")[0] for line in plan.unplaced] == [
        "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight",
        "base_model.model.model.layers.7.mlp.up_proj.lora_B.weight",
        "base_model.model.something.else",
    ]
    assert [tensor.source.name for tensor in plan.computed] == [f"{MODULE}.weight"]


def test_the_unplaced_of_several_adapters_are_told_apart(tmp_path: Path) -> None:
    base = read_base(write_base(tmp_path / "base"))
    extra = {"odd": np.ones(1)}
    paths = [write_adapter(tmp_path / name, factors({MODULE: (8, 8)}) | extra) for name in ("one", "two")]
    plan = plan_merge(base, [load_adapter(path) for path in paths], strict=False)
    assert plan.unplaced == tuple(f"{path}: odd: no weight of the base takes it" for path in paths)


def test_without_strict_something_has_to_fit_nevertheless(tmp_path: Path) -> None:
    with pytest.raises(UnplacedTensors, match="nothing of the adapters fits"):
        planned(tmp_path, factors({"other.proj": (8, 8)}), strict=False)


def test_unknown_tensors_are_refused_and_named(tmp_path: Path) -> None:
    with pytest.raises(UnplacedTensors, match=r"q_proj\.lora_oddity: nearest in the base: "):
        planned(tmp_path, factors({MODULE: (8, 8)}) | {f"base_model.model.{MODULE}.lora_oddity": np.ones(8)})


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4', which changed the base"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq', which changed the base"),
        ({"alora_invocation_tokens": [1]}, "it acts only after its invocation tokens"),
        ({"arrow_config": {"top_k": 1}}, "it routes between experts"),
        ({"kasa_config": {"beta": 1}}, "smallest singular values"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_what_no_merge_can_do_is_refused_with_the_reason(
    tmp_path: Path, config: dict[str, Any], why: str, strict: bool
) -> None:
    with pytest.raises(UnsupportedAdapter, match=f"can't be merged exactly: it has .*{why}"):
        planned(tmp_path, strict=strict, **config)


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        ({"use_dora": True}, "no lora_magnitude_vector for 'model.layers"),
        ({"lora_bias": True}, "no bias of lora_B for 'model.layers"),
        ({"modules_to_save": ["lm_head"]}, "no tensor of 'lm_head'"),
        ({"trainable_token_indices": [1]}, "no rows"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "no factors for any"),
    ],
)
def test_what_the_config_speaks_of_has_to_be_in_the_file(tmp_path: Path, config: dict[str, Any], missing: str) -> None:
    with pytest.raises(InvalidFile, match=f"incomplete: its config says .*{missing}"):
        planned(tmp_path, **config)


def test_layers_that_the_base_lacks_can_not_be_repeated(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match="names layer 2, and the base has 2 layers"):
        planned(tmp_path, layer_replication=[[0, 3]])


def test_a_delta_on_the_embedding_is_a_step_of_its_own(tmp_path: Path) -> None:
    plan = planned(tmp_path, factors({MODULE: (8, 8)}) | embedding_factors())
    (found,) = [tensor for tensor in plan.computed if tensor.source.name == "model.embed_tokens.weight"]
    assert products(found.steps[0]).shape == (VOCABULARY, HIDDEN)


@pytest.mark.parametrize("said_by", ["config", "text_config", "a missing head"])
def test_a_delta_on_a_tied_head_unties_it(tmp_path: Path, said_by: str) -> None:
    tensors = base_tensors()
    del tensors["lm_head.weight"]
    config: dict[str, Any] = {"config": {"tie_word_embeddings": True}, "a missing head": {}}.get(
        said_by, {"text_config": {"tie_word_embeddings": True}}
    )
    base = read_base(write_base(tmp_path / "base", tensors, **config))
    adapter = load_adapter(write_adapter(tmp_path / "adapter", factors({"lm_head": (VOCABULARY, HIDDEN)})))
    plan = plan_merge(base, [adapter])
    (head,) = plan.computed
    assert (head.target.name, head.source.name) == ("lm_head.weight", "model.embed_tokens.weight")
    assert (plan.config or base.config)["tie_word_embeddings"] is False
    assert "becomes two" in plan.notes[0]
    copied = [tensor.target.name for shard in plan.shards for tensor in shard.copied]
    assert sorted(copied) == sorted(tensors)


def test_an_untied_head_of_another_name_takes_its_delta(tmp_path: Path) -> None:
    tensors = base_tensors()
    tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
    base = read_base(write_base(tmp_path / "base", tensors, model_type="gpt_neox"))
    adapter = load_adapter(write_adapter(tmp_path / "adapter", factors({"embed_out": (VOCABULARY, HIDDEN)})))
    assert [tensor.source.name for tensor in plan_merge(base, [adapter]).computed] == ["embed_out.weight"]


def test_factors_that_are_no_floats_are_refused(tmp_path: Path) -> None:
    whole = {name: tensor.astype("int8") for name, tensor in factors({MODULE: (8, 8)}).items()}
    with pytest.raises(UnsupportedAdapter, match="stored as I8"):
        planned(tmp_path, whole)


def test_an_equal_copy_of_the_base_is_nothing_to_do(tmp_path: Path) -> None:
    copy = {f"{EMBEDDING}.base_layer.weight": base_tensors()["model.embed_tokens.weight"]}
    plan = planned(tmp_path, factors({MODULE: (8, 8)}) | copy)
    assert [placed.weight for placed in plan.placements if placed.role == "copy"] == ["model.embed_tokens.weight"]
    assert [tensor.source.name for tensor in plan.computed] == [f"{MODULE}.weight"]


def test_half_a_resized_vocabulary_is_refused(tmp_path: Path) -> None:
    copy = {f"{EMBEDDING}.base_layer.weight": np.ones((VOCABULARY + 1, HIDDEN), "float32")}
    with pytest.raises(WrongBase, match="the head has"):
        planned(tmp_path, factors({MODULE: (8, 8)}) | copy)


def test_quantised_weights_are_refused_with_the_cure(tmp_path: Path) -> None:
    tensors = base_tensors() | {f"{MODULE}.weight": np.ones((32, 1), "uint8")}
    base = read_base(write_base(tmp_path / "base", tensors, quantization_config={"quant_method": "bitsandbytes"}))
    adapter = load_adapter(write_adapter(tmp_path / "adapter"))
    with pytest.raises(Refused, match=r"stored as U8 \(quantised by bitsandbytes\): merge onto the model before"):
        plan_merge(base, [adapter])


def test_two_modules_of_one_adapter_can_not_mean_the_same_weight(tmp_path: Path) -> None:
    with pytest.raises(UnplacedTensors, match="both mean"):
        planned(tmp_path, factors({MODULE: (8, 8), MODULE.removeprefix("model."): (8, 8)}))


def test_the_same_module_under_two_names_is_added_up_over_adapters(tmp_path: Path) -> None:
    base = read_base(write_base(tmp_path / "base"))
    one = load_adapter(write_adapter(tmp_path / "one", factors({MODULE: (8, 8)})))
    two = load_adapter(write_adapter(tmp_path / "two", factors({MODULE.removeprefix("model."): (8, 8)})))
    for adapters in ([one, two], [one + two]):
        (computed,) = plan_merge(base, adapters).computed
        assert len(computed.steps) == 2


def test_conv1d_is_known_by_model_and_layer(tmp_path: Path) -> None:
    tensors = {"h.0.attn.c_proj.weight": np.ones((8, 8), "float32"), "h.0.attn.q.weight": np.ones((8, 8), "float32")}
    tensors |= {"wte.weight": np.ones((16, 8), "float32")}
    base = read_base(write_base(tmp_path / "base", tensors, model_type="gpt2"))
    modules = {"transformer.h.0.attn.c_proj": (8, 8), "transformer.h.0.attn.q": (8, 8)}
    plan = plan_merge(base, [load_adapter(write_adapter(tmp_path / "adapter", factors(modules)))])
    assert {tensor.source.name: products(tensor.steps[0]).transposed for tensor in plan.computed} == {
        "h.0.attn.c_proj.weight": True, "h.0.attn.q.weight": False,
    }  # fmt: skip


def test_a_change_of_dtype_leaves_what_is_no_float_as_it_is(tmp_path: Path) -> None:
    tensors = base_tensors() | {"ids": np.arange(4)}
    base = read_base(write_base(tmp_path / "base", tensors))
    plan = plan_merge(base, [load_adapter(write_adapter(tmp_path / "adapter"))], dtype="bf16")
    (shard,) = plan.shards
    assert [tensor.source.name for tensor in shard.copied] == ["ids"]
    assert {tensor.target.dtype for tensor in shard.computed} == {"BF16"}
    length = int.from_bytes(shard.head[:8], "little")
    assert json.loads(shard.head[8 : 8 + length])["__metadata__"] == {"format": "pt"}


def test_every_refusal_has_the_exit_code_of_one() -> None:
    assert {error.code for error in (UnplacedTensors, UnsupportedAdapter, WrongBase)} == {4}
    assert LorakitError.code == 1
