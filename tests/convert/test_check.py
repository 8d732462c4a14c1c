"""Would vLLM serve this adapter, and would it be right?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.adapters.reading import load_adapter
from lorakit.convert.check import Verdict, check_adapter
from lorakit.merge.base import BaseModel, read_base
from tests.folders import base_tensors, factors, linear_modules, write_adapter, write_base

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return read_base(write_base(tmp_path_factory.mktemp("base") / "llama"))


def verdict(folder: Path, base: BaseModel, tensors: Any = None, *, max_rank: int = 16, **config: Any) -> Verdict:
    return check_adapter(load_adapter(write_adapter(folder / "a", tensors, **config)), base, max_rank=max_rank)


def only(found: Verdict) -> str:
    """The one problem, which has a cure."""
    (check,) = (check for check in found.checks if check.ok is False)
    assert found.repairs == ()
    assert check.cure
    (problem,) = found.problems
    assert problem == f"{check.reason}: {check.cure}"
    return problem


def is_fine(found: Verdict) -> bool:
    return found.problems == found.repairs == () and not found.rename and all(check.ok for check in found.checks)


def test_a_plain_lora_is_fine_as_it_is(tmp_path: Path, base: BaseModel) -> None:
    assert is_fine(verdict(tmp_path, base))


def test_rslora_and_a_part_of_the_layers_are_fine(tmp_path: Path, base: BaseModel) -> None:
    assert is_fine(verdict(tmp_path, base, factors({Q: (8, 8)}), use_rslora=True))


@pytest.mark.parametrize(
    "config",
    [{"use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}, {"lora_bias": True},
     {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"peft_type": "IA3"},
     {"layer_replication": [[0, 1]]}, {"trainable_token_indices": [1]}],
    ids=lambda config: next(iter(config)),
)  # fmt: skip
def test_what_vllm_has_no_form_for_is_refused_with_the_cure(
    tmp_path: Path, base: BaseModel, config: dict[str, Any]
) -> None:
    assert "lorakit merge" in only(verdict(tmp_path, base, **config))


def test_a_rank_beyond_the_servers_is_refused_with_both_cures(tmp_path: Path, base: BaseModel) -> None:
    problem = only(verdict(tmp_path, base, rank=4, max_rank=2))
    assert "rank 4" in problem
    assert "lorakit shrink" in problem
    assert "--max-lora-rank 4" in problem


def test_smaller_factors_that_vllm_would_copy_into_a_corner_are_refused(tmp_path: Path, base: BaseModel) -> None:
    assert "another base" in only(verdict(tmp_path, base, factors({Q: (4, 4)})))


def test_larger_factors_are_refused(tmp_path: Path, base: BaseModel) -> None:
    assert "another base" in only(verdict(tmp_path, base, factors({Q: (16, 8)})))


def test_swapped_sizes_are_refused(tmp_path: Path, base: BaseModel) -> None:
    assert "another base" in only(verdict(tmp_path, base, factors({"model.layers.0.mlp.up_proj": (8, 12)})))


@pytest.mark.parametrize("module", ["model.layers.9.self_attn.q_proj", "model.layers.0.self_attn.qkv", "visual.q_proj"])
def test_a_module_that_the_base_lacks_is_refused_and_named(tmp_path: Path, base: BaseModel, module: str) -> None:
    problem = only(verdict(tmp_path, base, factors({module: (8, 8), Q: (8, 8)})))
    assert module in problem
    assert "1 of its 2 modules" in problem


def test_another_prefix_is_repaired_by_the_names_that_the_base_has(tmp_path: Path, base: BaseModel) -> None:
    found = verdict(tmp_path, base, factors({"layers.0.self_attn.q_proj": (8, 8)}))
    assert found.problems == ()
    assert found.rename == {"layers.0.self_attn.q_proj": Q}
    assert Q in found.repairs[0]


def test_names_of_a_raw_state_dict_are_repaired(tmp_path: Path, base: BaseModel) -> None:
    tensors = {name.replace(".weight", ".default.weight"): value for name, value in factors({Q: (8, 8)}).items()}
    found = verdict(tmp_path, base, tensors)
    assert found.problems == ()
    assert "raw tensor names" in found.repairs[0]


def test_patterns_are_repaired(tmp_path: Path, base: BaseModel) -> None:
    found = verdict(
        tmp_path, base, factors({Q: (8, 8)}, rank=4), rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 1}
    )
    assert found.problems == ()
    assert "rank_pattern" in found.repairs[0]


@pytest.mark.parametrize("name", ["lora_alpha", "target_modules"])
def test_a_config_that_leaves_out_what_vllm_wants_is_repaired(tmp_path: Path, base: BaseModel, name: str) -> None:
    found = verdict(tmp_path, base, **{name: None})
    assert found.problems == ()
    assert "config" in found.repairs[0]


def test_pefts_copy_of_the_bases_embedding_is_no_news(tmp_path: Path, base: BaseModel) -> None:
    copy = base_tensors()["model.embed_tokens.weight"]
    tensors = {**factors({Q: (8, 8)}), "base_model.model.model.embed_tokens.base_layer.weight": copy}
    assert is_fine(verdict(tmp_path, base, tensors))


@pytest.mark.parametrize("shape", [(17, 8), (16, 8)])
def test_a_copy_that_differs_is_refused(tmp_path: Path, base: BaseModel, shape: tuple[int, int]) -> None:
    copy = np.ones(shape, dtype="float32")
    tensors = {**factors({Q: (8, 8)}), "base_model.model.model.embed_tokens.base_layer.weight": copy}
    problem = only(verdict(tmp_path, base, tensors))
    assert ("resized" if shape == (17, 8) else "another base") in problem


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "surprise"])
def test_tensors_that_no_lora_has_are_refused(tmp_path: Path, base: BaseModel, name: str) -> None:
    tensors = {**factors({Q: (8, 8)}), f"base_model.model.{name}": np.ones((16, 8), dtype="float32")}
    assert name in only(verdict(tmp_path, base, tensors))


def test_no_factors_at_all_are_refused(tmp_path: Path, base: BaseModel) -> None:
    tensors = {"base_model.model.model.embed_tokens.base_layer.weight": base_tensors()["model.embed_tokens.weight"]}
    assert "no low-rank factors" in only(verdict(tmp_path, base, tensors))


def test_whole_numbers_are_refused(tmp_path: Path, base: BaseModel) -> None:
    tensors = {name: value.astype("int32") for name, value in factors({Q: (8, 8)}).items()}
    assert "I32" in only(verdict(tmp_path, base, tensors))


def test_everything_wrong_is_said_at_once(tmp_path: Path, base: BaseModel) -> None:
    found = verdict(tmp_path, base, factors({"nowhere": (8, 8)}, rank=4), rank=4, use_dora=True, max_rank=2)
    assert len(found.problems) == 3
    assert {check.name for check in found.checks if check.ok is False} == {"features", "rank", "modules"}
    assert found.applied == 0


def test_the_whole_adapter_is_checked_against_a_sharded_base(tmp_path: Path) -> None:
    base = read_base(write_base(tmp_path / "base", shards=3))
    assert is_fine(verdict(tmp_path, base, factors(linear_modules())))


def test_a_conv1d_of_gpt2_is_stored_the_other_way_round_and_its_embedding_is_not(tmp_path: Path) -> None:
    tensors = {
        "transformer.h.0.attn.c_attn.weight": np.ones((8, 24), "float32"),
        "transformer.lm_head.weight": np.ones((16, 8), "float32"),
    }
    base = read_base(write_base(tmp_path / "gpt2", tensors, model_type="gpt2"))

    def problems(module: str, out: int, into: int) -> tuple[str, ...]:
        folder = tmp_path / f"{module}-{out}"
        return check_adapter(load_adapter(write_adapter(folder, factors({module: (out, into)}))), base).problems

    assert not problems("transformer.h.0.attn.c_attn", 24, 8)
    assert not problems("transformer.lm_head", 16, 8)
    assert "made for another base" in problems("transformer.h.0.attn.c_attn", 8, 24)[0]
    assert "made for another base" in problems("transformer.lm_head", 8, 16)[0]


def test_a_copy_of_the_bases_rows_in_another_dtype_is_still_a_copy(tmp_path: Path) -> None:
    base = read_base(write_base(tmp_path / "half", base_tensors(dtype="float16")))
    rows = base_tensors(dtype="float16")["model.embed_tokens.weight"].astype("float32")
    copied = {"base_model.model.model.embed_tokens.base_layer.weight": rows}
    assert is_fine(verdict(tmp_path / "same", base, {**factors(linear_modules()), **copied}))
    copied = {"base_model.model.model.embed_tokens.base_layer.weight": rows + 1}
    other = verdict(tmp_path / "other", base, {**factors(linear_modules()), **copied})
    assert "differs from the base's" in only(other)


def test_without_a_base_the_rest_is_judged_and_what_needs_one_is_unknown(tmp_path: Path) -> None:
    found = check_adapter(load_adapter(write_adapter(tmp_path / "a")), None)
    assert (found.problems, found.applied) == ((), None)
    assert {check.name for check in found.checks if check.ok is None} == {"modules", "shapes"}
    wrong = check_adapter(load_adapter(write_adapter(tmp_path / "b", use_dora=True)), None, max_rank=1)
    assert {check.name for check in wrong.checks if check.ok is False} == {"features", "rank"}


def test_the_modules_that_would_apply_are_counted(tmp_path: Path, base: BaseModel) -> None:
    assert verdict(tmp_path / "all", base).applied == 6
    some = {Q: (8, 8), "nowhere": (8, 8), "model.layers.0.mlp.up_proj": (8, 12), "model.layers.1.mlp.up_proj": (8, 12)}
    found = verdict(tmp_path / "some", base, factors(some))
    assert found.applied == 1
    assert "1 of its 4 modules" in found.problems[0]
    assert "and 1 more don't fit" in found.problems[1]
