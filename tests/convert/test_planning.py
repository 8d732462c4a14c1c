"""Files of a wanted size, and a config that says what the weights are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from lorakit.convert.expected import Expected, Part
from lorakit.convert.planning import ConvertPlan, plan_convert
from lorakit.convert.source import Source, SourceTensor
from lorakit.files.safetensors import DTYPE_BITS


@dataclass(frozen=True)
class Shaped:
    """A tensor that is never read."""

    dtype: str
    shape: tuple[int, ...]

    def read(self, begin: int, end: int) -> object:
        raise AssertionError((begin, end))


def plan_of(tensors: dict[str, Shaped], **settings: object) -> ConvertPlan:
    shapes = {name: one.shape for name, one in tensors.items()}
    stored = {name: Part(name, 0, shape) for name, shape in shapes.items()}
    held: dict[str, SourceTensor] = {f"module.{name}": one for name, one in tensors.items()}  # type: ignore[misc]
    source = Source(Path("nowhere"), "torch", held, {}, None, {})
    config = {"dtype": "float16", "vision_config": {"torch_dtype": "float16"}}
    integers = frozenset(name for name, one in tensors.items() if one.dtype == "I64")
    return plan_convert(source, Expected(shapes, {}, stored, integers=integers), config, **settings)  # type: ignore[arg-type]


SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=12)


@given(shapes=SHAPES, most=st.integers(1, 4000), dtype=st.sampled_from(["keep", "bf16", "fp32"]))
def test_every_tensor_is_in_one_file_and_none_is_larger_than_it_has_to_be(
    shapes: list[tuple[int, ...]], most: int, dtype: str
) -> None:
    tensors = {f"layer.{number}.weight": Shaped("F16", shape) for number, shape in enumerate(shapes)}
    plan = plan_of(tensors, max_shard_size=most, dtype=dtype)
    written = [name for shard in plan.shards for name in shard.target.tensors]
    assert written == list(tensors)
    kept = {"keep": "F16", "bf16": "BF16", "fp32": "F32"}[dtype]
    for shard in plan.shards:
        sizes = [math.prod(one.shape) * DTYPE_BITS[kept] // 8 for one in shard.target.tensors.values()]
        assert sum(sizes) <= most or sum(size > 0 for size in sizes) == 1
        assert {one.dtype for one in shard.target.tensors.values()} == {kept}
        assert shard.target.size == len(shard.head) + sum(sizes)
    count = len(plan.shards)
    assert [shard.name for shard in plan.shards][-1] == (
        "model.safetensors" if count == 1 else f"model-{count:05}-of-{count:05}.safetensors"
    )


def test_the_config_says_the_dtype_of_most_of_the_weights() -> None:
    tensors = {"norm.weight": Shaped("F32", (4,)), "up.weight": Shaped("BF16", (4, 4)), "ids": Shaped("I64", (99,))}
    plan = plan_of(tensors)
    assert plan.config == {"dtype": "bfloat16", "vision_config": {"torch_dtype": "bfloat16"}}
    assert plan.notes == ("config.json says bfloat16 for its dtype, as the weights are; it said float16",)
    asked = plan_of(tensors, dtype="fp32")
    assert (asked.config["dtype"], asked.notes) == ("float32", ())
