"""Would vLLM serve this adapter, and would it be right?"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.adapters.reading import load_adapter
from lorakit.convert.check import Verdict, check_adapter
from lorakit.errors import LorakitError
from lorakit.merge.base import BaseModel, read_base
from lorakit.merge.model import model_for
from tests.folders import base_tensors, factors, linear_modules, write_adapter, write_base

Q = "model.layers.0.self_attn.q_proj"
QUANTISED = Path(__file__).parents[1] / "merge" / "quantised" / "data"


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
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"lora_bias": True},
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


def test_a_part_of_what_the_base_has_in_one_piece_is_not_called_another_bases(tmp_path: Path) -> None:
    tensors = base_tensors()
    q = next(name for name in tensors if name.endswith("0.self_attn.q_proj.weight"))
    tensors[q.replace("q_proj", "qkv_proj")] = np.concatenate([tensors.pop(q)] * 3)
    base = read_base(write_base(tmp_path / "fused", tensors))
    problem = only(verdict(tmp_path, base, factors({Q: (8, 8)})))
    assert "in one piece with others, as 'model.layers.0.self_attn.qkv_proj.weight'" in problem
    assert "another base" not in problem


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


# what is made plain, exactly


def loha(rank: int = 2) -> dict[str, Any]:
    shapes = {"hada_w1_a": (8, rank), "hada_w1_b": (rank, 8), "hada_w2_a": (8, rank), "hada_w2_b": (rank, 8)}
    return {f"base_model.model.{Q}.{part}": np.ones(shape, "float32") for part, shape in shapes.items()}


def vera() -> dict[str, Any]:
    own = {f"base_model.model.{Q}.vera_lambda_b": np.ones(8, "float32"),
           f"base_model.model.{Q}.vera_lambda_d": np.ones(2, "float32")}  # fmt: skip
    return own | {"base_model.vera_A": np.ones((2, 8), "float32"), "base_model.vera_B": np.ones((8, 2), "float32")}


def test_another_method_of_low_rank_is_repaired_with_the_rank_that_it_has_then(tmp_path: Path, base: BaseModel) -> None:
    found = verdict(tmp_path / "a", base, loha(), peft_type="LOHA", alpha=2)
    assert found.problems == ()
    assert "LOHA" in found.repairs[0]
    assert (found.applied, found.plain is not None and found.plain.rank) == (1, 4)
    small = verdict(tmp_path / "b", base, loha(), peft_type="LOHA", alpha=2, max_rank=3)
    assert "exactly as plain LoRA it has rank 4" in only(small)


def test_a_method_that_needs_the_bases_sizes_is_unknown_without_one(tmp_path: Path, base: BaseModel) -> None:
    assert verdict(tmp_path / "a", base, vera(), peft_type="VERA").problems == ()
    alone = check_adapter(load_adapter(write_adapter(tmp_path / "b", vera(), peft_type="VERA")), None)
    assert (alone.problems, {check.name for check in alone.checks if check.ok is None}) == ((), {"features"})


def test_a_saved_module_that_equals_the_bases_is_repaired_and_one_that_does_not_is_refused(
    tmp_path: Path, base: BaseModel
) -> None:
    head = {"base_model.model.lm_head.weight": base_tensors()["lm_head.weight"]}
    found = verdict(tmp_path / "a", base, factors({Q: (8, 8)}) | head, modules_to_save=["lm_head"])
    assert (found.problems, found.copies) == ((), tuple(head))
    assert "modules_to_save" in found.repairs[0]
    trained = {name: value + 1 for name, value in head.items()}
    other = verdict(tmp_path / "b", base, factors({Q: (8, 8)}) | trained, modules_to_save=["lm_head"])
    assert "lorakit convert" in only(other)


def test_rows_of_an_embedding_are_repaired_and_those_of_another_vocabulary_refused(
    tmp_path: Path, base: BaseModel
) -> None:
    rows = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((2, 8), "float32")}
    tensors = factors({Q: (8, 8)}) | rows
    found = verdict(tmp_path / "a", base, tensors, trainable_token_indices={"embed_tokens": [1, 15]})
    assert (found.problems, found.applied) == ((), 2)
    beyond = verdict(tmp_path / "b", base, tensors, trainable_token_indices={"embed_tokens": [1, 16]})
    assert "row 16" in only(beyond)
    contradicted = verdict(tmp_path / "c", base, tensors, trainable_token_indices={"embed_tokens": [1]})
    assert not is_fine(contradicted)
    assert contradicted.problems


def test_two_modules_that_mean_one_weight_are_refused(tmp_path: Path, base: BaseModel) -> None:
    problem = only(verdict(tmp_path, base, factors({Q: (8, 8), Q.removeprefix("model."): (8, 8)})))
    assert f"both mean '{Q}'" in problem


EXTRA = {
    "base_model.model.lm_head.weight": base_tensors()["lm_head.weight"],
    "base_model.model.model.embed_tokens.base_layer.weight": base_tensors()["model.embed_tokens.weight"],
    "base_model.model.model.layers.0.norm.weight": base_tensors()["model.layers.0.norm.weight"] + 1,
    f"base_model.model.{Q}.bias": np.ones(8, "float32"),
    f"base_model.model.{Q}.lora_B.bias": np.ones(8, "float32"),
    f"base_model.model.{Q}.lora_magnitude_vector": np.ones(8, "float32"),
    f"base_model.model.{Q}.something": np.ones(8, "float32"),
    "base_model.model.conv.lora_A.weight": np.ones((2, 3, 1, 1), "float32"),
}
SETTINGS = {
    "bias": "all",
    "modules_to_save": ["norm"],
    "use_dora": True,
    "lora_bias": True,
    "trainable_token_indices": [1],
}


@given(st.sets(st.sampled_from(sorted(EXTRA))), st.sets(st.sampled_from(sorted(SETTINGS))))
def test_nothing_is_dropped_in_silence(base: BaseModel, extra: set[str], settings: set[str]) -> None:
    with TemporaryDirectory() as folder:
        tensors = factors({Q: (8, 8)}) | {name: EXTRA[name] for name in extra}
        found = verdict(Path(folder), base, tensors, **{name: SETTINGS[name] for name in settings})
    copies = {name for name in extra if "lm_head" in name or "base_layer" in name}
    asked = settings - {"bias"}  # which says nothing where nothing was trained
    assert bool(found.problems) == bool(extra - copies or asked)
    if not found.problems:
        assert set(found.copies) == copies


ODD: tuple[Any, ...] = (True, -1, 0, 10**30, 1.5, "3", "", [], [3], [-1], [10**9], ["q_proj"], [[0, 1]], {}, {"a": 1},
                        {"embed_tokens": [1]}, {"embed_tokens": "x"}, {"q_proj": 2}, "pissa", "unsloth")  # fmt: skip
FIELDS = ("bias", "modules_to_save", "trainable_token_indices", "target_parameters", "use_qalora", "qalora_group_size",
          "init_lora_weights", "use_dora", "layer_replication", "lora_bias", "peft_version", "lora_B_layout",
          "rank_pattern", "alpha_pattern", "target_modules", "base_model_name_or_path", "revision")  # fmt: skip
SHAPES = ((1, 8), (2, 4), (4, 8), (2, 8, 8), (3, 2, 8), (8,))
NAMES = ("model.layers.0.mlp.experts", "model.layers.0.mlp.experts.w1", "model.layers.0.mlp.experts.base_layer",
         "model.embed_tokens", "lm_head", "model.unembed_tokens", "model.layers.0.self_attn.qkv_proj")  # fmt: skip


@settings(max_examples=60)
@given(
    st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(ODD), max_size=4),
    st.dictionaries(st.sampled_from(NAMES), st.tuples(st.sampled_from(SHAPES), st.sampled_from(SHAPES)), max_size=3),
    st.sampled_from(["LORA", "LOHA", "LOKR", "VERA", "OFT", "IA3", "PROMPT_TUNING", "NEW"]),
    st.booleans(),
)
def test_whatever_an_adapter_says_there_is_an_answer_or_an_error_of_ours(
    base: BaseModel, said: dict[str, Any], odd: dict[str, Any], kind: str, rows: bool
) -> None:
    tensors = factors({Q: (8, 8)})
    for name, (a, b) in odd.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = np.ones(a, "float32")
        tensors[f"base_model.model.{name}.lora_B.weight"] = np.ones(b, "float32")
    if rows:
        tensors["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = np.ones((1, 8), "float32")
    with TemporaryDirectory() as folder:
        try:
            found = verdict(Path(folder), base, tensors, peft_type=kind, **said)
        except LorakitError:
            return
    assert found.checks
    assert all(check.cure or check.ok is not False for check in found.checks), found


@pytest.mark.parametrize("name", sorted(folder.name for folder in QUANTISED.iterdir()))
def test_sizes_are_known_of_a_quantised_base_and_those_of_another_are_refused(tmp_path: Path, name: str) -> None:
    base = read_base(QUANTISED / name)
    quantised = model_for(base, ()).quantised
    modules = {weight.removesuffix(".weight"): found.shape for weight, found in quantised.items()}
    assert modules
    right = check_adapter(load_adapter(write_adapter(tmp_path / "a", factors(modules))), base)
    assert (right.problems, right.applied) == ((), len(modules))
    half = {module: (out // 2, into) for module, (out, into) in modules.items()}
    wrong = check_adapter(load_adapter(write_adapter(tmp_path / "b", factors(half))), base)
    assert "made for another base" in wrong.problems[0]
    first = next(iter(modules))
    copy = {f"base_model.model.{first}.weight": np.ones(modules[first], "float32")}
    assert check_adapter(load_adapter(write_adapter(tmp_path / "c", factors(modules) | copy)), base).problems
