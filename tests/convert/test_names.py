"""Names find their places: as real wrappers make them, and as people nest models in models."""

from __future__ import annotations

from collections.abc import Iterator
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


OWN = tuple(model().state_dict())


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


def places(names: Any) -> dict[str, str]:
    found = named(names, OWN)
    assert found.unplaced == ()
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
    found = named([*OWN, "loss.weight", "teacher.model.norm.weight", "model.layers.0.self_attn.q_proj.bias"], OWN)
    assert set(found.names) == set(OWN)
    assert found.unplaced == ("loss.weight", "teacher.model.norm.weight", "model.layers.0.self_attn.q_proj.bias")


def test_buffers_that_are_computed_anew_are_apart() -> None:
    buffers = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "h.0.attn.masked_bias")
    found = named([*OWN, *buffers], OWN)
    assert (found.unplaced, found.recomputed) == ((), buffers)


def test_a_module_that_is_called_like_a_wrapper_keeps_its_name() -> None:
    expected = ["module.weight", "block.module.weight"]
    assert dict(named(expected, expected).names) == dict(zip(expected, expected, strict=True))
