"""Every tensor of a fine-tune is either a pair that factors can carry, or named with the reason why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.errors import NotFound, Refused, WrongBase
from lorakit.merge.base import read_base
from lorakit.mix.extraction.plan import ExtractPlan, plan_extract
from tests.folders import base_tensors, write_base

Tensors = dict[str, np.ndarray[Any, Any]]


def planned(
    folder: Path, tuned: Tensors, base: Tensors | None = None, patterns: Any = None, **config: Any
) -> ExtractPlan:
    one = write_base(folder / "tuned", tuned, **config)
    other = write_base(folder / "base", base, **config)
    return plan_extract(read_base(one), read_base(other), **(patterns or {}))


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray[Any, Any]:
    return np.zeros(shape, dtype)


def test_linear_layers_and_embeddings_are_pairs_and_the_rest_is_named(tmp_path: Path) -> None:
    more = {
        "model.layers.0.conv.weight": zeros(4, 1, 3),
        "model.layers.0.mlp.experts.gate_up_proj": zeros(2, 4, 6),
        "model.layers.0.mlp.gate.weight": zeros(2, 8),
        "model.layers.0.mixer.A_log": zeros(8, 4),
        "model.layers.0.self_attn.q_proj.bias": zeros(8),
        "model.steps": zeros(3, dtype="int64"),
        "model.mlp.gate.weight": zeros(2, 8),  # beside no experts
    }
    plan = planned(tmp_path, base_tensors(1) | more, base_tensors(1) | more)
    assert {pair.module: pair.kind for pair in plan.pairs} == {
        "model.embed_tokens": "embedding",
        "model.layers.0.self_attn.q_proj": "linear",
        "model.layers.0.mlp.up_proj": "linear",
        "model.layers.0.mlp.down_proj": "linear",
        "model.mlp.gate": "linear",
        "lm_head": "linear",
    }
    reasons = {part.tuned.name: part.reason for part in plan.uncarried}
    assert reasons == {
        "model.layers.0.norm.weight": "a vector",
        "model.layers.0.conv.weight": "a convolution's kernel, or a stack",
        "model.layers.0.mlp.experts.gate_up_proj": "experts in one tensor",
        "model.layers.0.mlp.gate.weight": "a router of experts",
        "model.layers.0.mixer.A_log": "a parameter that is no layer's weight",
        "model.layers.0.self_attn.q_proj.bias": "a bias",
        "model.steps": "it is stored as I64",
    }


def test_every_tensor_is_accounted_for_once(tmp_path: Path) -> None:
    plan = planned(tmp_path, base_tensors(), patterns={"exclude": ["up_proj"]})
    named = [*(pair.tuned.name for pair in plan.pairs), *(part.tuned.name for part in plan.uncarried), *plan.left_out]
    assert sorted(named) == sorted(base_tensors())


def test_names_below_another_prefix_are_the_same_weights(tmp_path: Path) -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in base_tensors().items()}
    plan = planned(tmp_path, base_tensors(), bare)
    pair = next(pair for pair in plan.pairs if pair.module.endswith("0.mlp.up_proj"))
    assert (pair.tuned.name, pair.base.name) == (
        "model.layers.0.mlp.up_proj.weight",
        "layers.0.mlp.up_proj.weight",
    )


def test_names_in_one_of_the_two_alone_stop_it_and_are_named(tmp_path: Path) -> None:
    tuned = base_tensors() | {"score.weight": zeros(2, 8)}
    base = base_tensors() | {"model.old.weight": zeros(2, 8)}
    with pytest.raises(WrongBase, match=r"tuned' has 'score.weight'; only .*base' has 'model.old.weight'"):
        planned(tmp_path, tuned, base)
    plan = plan_extract(read_base(tmp_path / "tuned"), read_base(tmp_path / "base"), exclude=["score", "model.old"])
    assert plan.left_out == ("score.weight",)


def test_a_head_that_only_one_of_the_two_has_tied_is_a_change_of_the_embedding(tmp_path: Path) -> None:
    tied = base_tensors()
    del tied["lm_head.weight"]
    one = write_base(tmp_path / "tuned", base_tensors())
    other = write_base(tmp_path / "base", tied, tie_word_embeddings=True)
    plan = plan_extract(read_base(one), read_base(other))
    head = next(pair for pair in plan.pairs if pair.module == "lm_head")
    assert (head.tuned.name, head.base.name, head.head) == ("lm_head.weight", "model.embed_tokens.weight", None)


@pytest.mark.parametrize("stored", ["tuned", "base", "both", "neither"])
def test_a_head_that_both_have_tied_goes_with_the_embedding(tmp_path: Path, stored: str) -> None:
    whole, bare = base_tensors(), base_tensors()
    whole["lm_head.weight"] = whole["model.embed_tokens.weight"]
    del bare["lm_head.weight"]
    tuned = write_base(tmp_path / "tuned", whole if stored in ("tuned", "both") else bare, tie_word_embeddings=True)
    base = write_base(tmp_path / "base", whole if stored in ("base", "both") else bare, tie_word_embeddings=True)
    plan = plan_extract(read_base(tuned), read_base(base))
    assert {pair.module: pair.head for pair in plan.pairs if pair.head or pair.module == "lm_head"} == {
        "model.embed_tokens": "lm_head"
    }


def test_an_encoder_has_no_head(tmp_path: Path) -> None:
    tensors = {"encoder.layer.0.output.dense.weight": zeros(8, 8), "embeddings.word_embeddings.weight": zeros(16, 8)}
    plan = planned(tmp_path, tensors, tensors, model_type="bert", architectures=["BertModel"])
    assert all(pair.head is None and pair.module != "lm_head" for pair in plan.pairs)


def test_a_resized_vocabulary_is_named_and_other_shapes_are_another_base(tmp_path: Path) -> None:
    tuned = base_tensors()
    tuned["model.embed_tokens.weight"] = zeros(20, 8)
    plan = planned(tmp_path / "resized", tuned)
    (part,) = (part for part in plan.uncarried if part.base is None)
    assert (part.tuned.name, part.reason) == (
        "model.embed_tokens.weight",
        "its vocabulary was resized from 16 to 20 rows",
    )
    tuned["model.layers.0.mlp.up_proj.weight"] = zeros(13, 8)
    with pytest.raises(WrongBase, match=r"up_proj.weight' is \[13, 8\] .* and \[12, 8\] in the base"):
        planned(tmp_path / "wrong", tuned)


def test_patterns_choose_modules_and_one_that_names_nothing_is_an_error(tmp_path: Path) -> None:
    plan = planned(tmp_path / "a", base_tensors(), patterns={"include": ["*.mlp.*"], "exclude": ["down_proj"]})
    assert [pair.module for pair in plan.pairs] == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    with pytest.raises(NotFound, match="'q_prj' names no module"):
        planned(tmp_path / "b", base_tensors(), patterns={"include": ["q_prj"]})


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="quantised"):
        planned(tmp_path, base_tensors(), quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 8})
