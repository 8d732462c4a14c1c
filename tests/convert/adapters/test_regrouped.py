"""Layers in other pieces than the base has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.adapters.delta import Delta, Made
from lorakit.convert.adapters.regrouped import WHOLES, regrouped
from lorakit.files.safetensors import StoredTensor
from lorakit.merge.resolve import Resolver

LAYER = "model.layers.0.self_attn"


def delta(out: int, into: int, rank: int = 2, seed: int = 0) -> Delta:
    chance = torch.Generator().manual_seed(seed)
    b, a = torch.randn(out, rank, generator=chance), torch.randn(rank, into, generator=chance)
    return Delta((Made((out, into), lambda: (b, a), 0.5, rank),))


def run(
    deltas: dict[str, Delta], base: dict[str, tuple[int, ...]], config: dict[str, int] | None = None
) -> dict[str, Delta]:
    tensors = {f"{name}.weight": StoredTensor(f"{name}.weight", Path("x"), "F32", shape, 0, 0)
               for name, shape in base.items()}  # fmt: skip
    return regrouped(deltas, tensors, Resolver(tensors), config or {}).deltas


sizes = st.lists(st.integers(1, 5), min_size=3, max_size=3)


@given(sizes, st.integers(1, 4), st.integers(1, 4))
def test_what_is_in_one_piece_becomes_the_bases_pieces_and_the_other_way_round(
    rows: list[int], into: int, rank: int
) -> None:
    pieces = {f"{LAYER}.{piece}": (size, into) for piece, size in zip(WHOLES["qkv_proj"], rows, strict=True)}
    whole = delta(sum(rows), into, rank)
    apart = run({f"{LAYER}.qkv_proj": whole}, pieces)
    assert list(apart) == list(pieces)
    torch.testing.assert_close(torch.cat([part.dense() for part in apart.values()]), whole.dense())
    (together,) = run(apart, {f"{LAYER}.qkv_proj": (sum(rows), into)}).values()
    torch.testing.assert_close(together.dense(), whole.dense())
    assert together.known_rank == 3 * rank


def test_what_does_not_add_up_or_is_not_all_there_stays_as_it_is() -> None:
    pieces = {f"{LAYER}.{piece}": (4, 4) for piece in WHOLES["qkv_proj"]}
    assert list(run({f"{LAYER}.qkv_proj": delta(11, 4)}, pieces)) == [f"{LAYER}.qkv_proj"]
    two = {f"{LAYER}.q_proj": delta(4, 4), f"{LAYER}.v_proj": delta(4, 4)}
    assert list(run(two, {f"{LAYER}.qkv_proj": (12, 4)})) == list(two)
    wide = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 3}
    assert list(run(two, {f"{LAYER}.qkv_proj": (12, 4)}, wide)) == list(two)


@pytest.mark.parametrize("trained", [{"q_proj"}, {"v_proj"}, {"q_proj", "v_proj"}, {"k_proj", "v_proj"}])
@pytest.mark.parametrize("config", [{"head_dim": 3}, {"hidden_size": 12}], ids=["its own size", "by the width"])
def test_parts_that_were_not_trained_are_zeros_where_the_config_says_their_sizes(
    trained: set[str], config: dict[str, int]
) -> None:
    rows = dict(zip(WHOLES["qkv_proj"], (12, 6, 6), strict=True))
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, **config}
    parts = {f"{LAYER}.{piece}": delta(rows[piece], 5, seed=number) for number, piece in enumerate(sorted(trained))}
    found = run(parts, {f"{LAYER}.qkv_proj": (24, 5)}, config)
    assert list(found) == [f"{LAYER}.qkv_proj"]
    empty = {piece: torch.zeros(size, 5, dtype=torch.float64) for piece, size in rows.items()}
    wanted = empty | {path.rpartition(".")[2]: part.dense() for path, part in parts.items()}
    torch.testing.assert_close(found[f"{LAYER}.qkv_proj"].dense(), torch.cat(list(wanted.values())))


def test_half_of_gate_and_up_is_enough() -> None:
    gate = delta(6, 5)
    (found,) = run({"model.layers.0.mlp.up_proj": gate}, {"model.layers.0.mlp.gate_up_proj": (12, 5)}).values()
    torch.testing.assert_close(found.dense(), torch.cat([torch.zeros(6, 5, dtype=torch.float64), gate.dense()]))


@pytest.mark.parametrize(
    "base", [{f"{LAYER}.q_proj": (4, 4)}, {"language_model.model.layers.0.self_attn.q_proj": (4, 4)}]
)
def test_what_the_base_has_is_left_alone(base: dict[str, tuple[int, ...]]) -> None:
    assert list(run({f"{LAYER}.q_proj": delta(4, 4)}, base)) == [f"{LAYER}.q_proj"]


def test_tinkers_head_is_the_bases() -> None:
    assert list(run({"model.unembed_tokens": delta(9, 4)}, {"lm_head": (9, 4)})) == ["lm_head"]
