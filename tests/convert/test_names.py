"""Names find their places: as real wrappers make them, and as people nest models in models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lorakit.convert.names import WRAPPERS, named
from tests.models import CONFIGS


def model() -> LlamaForCausalLM:
    made: LlamaForCausalLM = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    return made


OWN = {name: tuple(tensor.shape) for name, tensor in model().state_dict().items()}


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def checkpointed() -> Any:
    found = model()
    apply_activation_checkpointing(found, check_fn=lambda part: isinstance(part, LlamaDecoderLayer))
    return found


def compiled_inside() -> Any:
    found = model()
    found.model.layers[1] = torch.compile(found.model.layers[1], backend="eager")
    return torch.compile(found, backend="eager")


class InLightning(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = model()


def shaped(names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Each as the tensor of the model whose name it ends with, or of no shape that the model has."""
    return {name: next((shape for own, shape in OWN.items() if name.endswith(own)), (3,)) for name in names}


def places(names: Any) -> dict[str, str]:
    found = named(shaped(names), OWN)
    assert (found.unplaced, found.rivals) == ({}, None)
    return dict(found.names)


@pytest.mark.parametrize(
    "wrapped", [checkpointed, compiled_inside, InLightning, lambda: torch.compile(InLightning(), backend="eager")]
)  # fmt: skip
def test_wrapped_models_have_the_plain_names(wrapped: Any) -> None:
    names = [name for name, _ in wrapped().named_parameters()]
    assert any(name not in OWN for name in names)
    assert list(places(names).values()) == list(OWN)


@pytest.mark.usefixtures("alone")
def test_distributed_models_have_the_plain_names() -> None:
    wrapped = torch.nn.parallel.DistributedDataParallel(checkpointed())
    names = [name for name, _ in wrapped.named_parameters()]
    assert all(name.startswith("module.") for name in names)
    assert list(places(names).values()) == list(OWN)


def test_a_model_without_its_prefix_gets_it_back() -> None:
    """`AutoModel` saved the inner model alone, and the head stands beside it."""
    names = [*model().model.state_dict(), "lm_head.weight"]
    assert sorted(places(names).values()) == sorted(OWN)


@given(prefix=st.lists(st.sampled_from(["net", "actor", "model", "student", *sorted(WRAPPERS)]), max_size=4))
def test_any_prefix_is_found(prefix: list[str]) -> None:
    names = [".".join([*prefix, name]) for name in OWN]
    assert list(places(names).values()) == list(OWN)


def test_what_has_no_place_is_named() -> None:
    strays = ("loss.weight", "teacher.model.norm.weight", "model.layers.0.self_attn.q_proj.bias")
    found = named(shaped([*OWN, *strays]), OWN)
    assert set(found.names) == set(OWN)
    assert tuple(found.unplaced) == strays


def test_buffers_that_are_computed_anew_are_apart() -> None:
    buffers = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "h.0.attn.masked_bias")
    found = named(shaped([*OWN, *buffers]), OWN)
    assert (found.unplaced, found.recomputed) == ({}, buffers)


def test_a_module_that_is_called_like_a_wrapper_keeps_its_name() -> None:
    expected = {"module.weight": (1,), "block.module.weight": (1,)}
    assert dict(named(expected, expected).names) == {name: name for name in expected}


NORM, HEAD, LAYER = "model.norm.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("hole", "stray"),
    [
        (NORM, "probe.ln.weight"),
        (NORM, "teacher.model.norm.weight"),
        (NORM, "norm.weight"),
        (HEAD, "teacher_head.weight"),
        (HEAD, "teacher.lm_head.weight"),
        (HEAD, "lm_head.original_module.weight"),
        (HEAD, "lm_head.modules_to_save.default.weight"),
        (LAYER, "aux.ln.weight"),
        (LAYER, "layers.1.input_layernorm.weight"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "student.", "base_model.model."])
def test_no_stray_tensor_takes_the_place_of_one_that_is_missing(prefix: str, hole: str, stray: str) -> None:
    """Of its very shape, too; and whether what was trained stands under a prefix or not."""
    whole = {f"{prefix}{name}": name for name in OWN if name != hole}
    for name in {stray, f"{prefix}{stray}"}:
        found = named({**{source: OWN[own] for source, own in whole.items()}, name: OWN[hole]}, OWN)
        assert (found.names, tuple(found.unplaced)) == (whole, (name,))


def test_each_part_of_a_model_may_have_moved_on_its_own() -> None:
    """As models that see did between two versions of transformers."""
    inner = {"embed_tokens.weight": (9, 4), "layers.0.mlp.up.weight": (8, 4), "norm.weight": (4,)}
    sees = {"blocks.0.mlp.up.weight": (6, 4), "merger.norm.weight": (4,), "patch_embed.proj.weight": (4, 3)}
    expected = {f"model.language_model.{name}": shape for name, shape in inner.items()}
    expected |= {f"model.visual.{name}": shape for name, shape in sees.items()} | {"lm_head.weight": (9, 4)}
    for text, vision in (("model.", "visual."), ("net.model.", "net.visual."), ("llm.", "tower.vision.")):
        parts = {f"{text}{name}": shape for name, shape in inner.items()}
        parts |= {f"{vision}{name}": shape for name, shape in sees.items()}
        head = "net.lm_head.weight" if text.startswith("net.") else "lm_head.weight"
        found = named({**parts, head: (9, 4)}, expected)
        assert set(found.names) == {*parts, head}
        assert set(found.names.values()) == set(expected)


def two(one: str, other: str) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}{name}": shape for prefix in (one, other) for name, shape in OWN.items()}


@pytest.mark.parametrize(("one", "other"), [("policy.", "ref."), ("ref.", "policy."), ("module.", "")])
def test_of_two_models_that_fit_equally_well_none_is_guessed(one: str, other: str) -> None:
    found = named(two(one, other), OWN)
    assert found.rivals is not None
    assert sorted(found.rivals) == sorted(f"{prefix}{next(iter(OWN))}" for prefix in (one, other))


def test_a_head_that_is_the_embedding_does_not_make_one_of_two_models_the_better_one() -> None:
    names = two("policy.", "ref.")
    del names["policy.lm_head.weight"]
    assert named(names, OWN, spare=["lm_head.weight"]).rivals
    found = named(names, OWN)
    assert found.rivals is None
    assert found.passed == ("ref.model.embed_tokens.weight", "policy.model.embed_tokens.weight")


def test_of_two_models_that_of_the_right_shapes_is_meant() -> None:
    names = {name: (2, *shape) if name.startswith("draft.") else shape for name, shape in two("draft.", "net.").items()}
    found = named(names, OWN)
    assert found.rivals is None
    assert list(found.names) == [f"net.{name}" for name in OWN]


def test_what_has_no_place_is_called_as_the_others_are() -> None:
    names = shaped(f"_orig_mod.module.net.{name}" for name in (*OWN, "mtp.fc.weight"))
    assert dict(named(names, OWN).unplaced) == {"_orig_mod.module.net.mtp.fc.weight": "mtp.fc.weight"}


def test_names_of_any_number_of_families_are_matched_in_passing() -> None:
    """None of them fits; each has a prefix of its own, which are a hundred million pairs of prefixes."""
    many = {f"a{number}.b{number}.c.weight": (1,) for number in range(10_000)}
    others = {f"d{number}.e{number}.c.weight": (1,) for number in range(10_000)}
    found = named(many, others)
    assert len(found.names) + len(found.unplaced) == len(many)
