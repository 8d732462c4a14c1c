"""Numbers in the bits of words, against AutoGPTQ's own way of packing them and against big integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.merge.quantised.awq import _outputs, _words
from lorakit.merge.quantised.packing import packed, unpacked


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 4), st.integers(1, 5), st.sampled_from([0, 1]), st.integers(0, 99))
def test_what_is_packed_is_unpacked(bits: int, groups: int, others: int, dim: int, seed: int) -> None:
    shape = (groups * 32, others) if dim == 0 else (others, groups * 32)
    codes = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    words = packed(codes, bits, dim)
    assert words.dtype == torch.int32
    assert words.shape[dim] == groups * bits
    assert torch.equal(unpacked(words, bits, dim), codes)


@given(st.sampled_from([2, 3, 4, 8]), st.lists(st.integers(0, 255), min_size=32, max_size=32))
def test_the_words_are_one_number_written_low_end_first(bits: int, values: list[int]) -> None:
    values = [value % (1 << bits) for value in values]
    whole = sum(value << (index * bits) for index, value in enumerate(values))
    words = np.frombuffer(whole.to_bytes(bits * 4, "little"), dtype=np.int32)
    assert packed(torch.tensor([values]), bits, 1)[0].tolist() == words.tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@given(st.integers(0, 1 << 31))
def test_what_is_unpacked_is_packed(bits: int, seed: int) -> None:
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (2, 24), generator=torch.Generator().manual_seed(seed))
    words = words.to(torch.int32)
    assert torch.equal(packed(unpacked(words, bits, 1), bits, 1), words)


@given(st.integers(0, 1 << 31))
def test_awq_has_its_own_order_within_a_word(seed: int) -> None:
    codes = torch.randint(0, 16, (3, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    words = _words(codes)
    assert torch.equal(_outputs(words), codes)
    assert [(int(words[0, 0]) >> shift) & 15 for shift in range(0, 32, 4)] == codes[
        0, [0, 2, 4, 6, 1, 3, 5, 7]
    ].tolist()
