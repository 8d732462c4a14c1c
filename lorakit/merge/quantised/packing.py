"""Small whole numbers in the bits of int32 words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WORD = 32


def unpacked(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Along `dim`, a stream of `bits` bits a number, the lowest first; a number may stand in two words (3 bits do).

    GPTQ's packing, of AutoGPTQ's `qlinear` for 2, 3, 4 and 8 bits.
    """
    import torch

    words = words.movedim(dim, -1)
    mask = (1 << bits) - 1
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
        codes = ((words.unsqueeze(-1) >> shifts) & mask).flatten(-2)
    else:
        long = words.long() & 0xFFFFFFFF
        following = torch.nn.functional.pad(long[..., 1:], (0, 1))
        first = torch.arange(0, words.shape[-1] * WORD // bits * bits, bits)
        pairs = long | (following << WORD)
        codes = ((pairs[..., first // WORD] >> (first % WORD)) & mask).int()
    return codes.movedim(-1, dim)


def packed(codes: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The inverse: int32 words. The count of bits along `dim` is a multiple of 32."""
    import torch

    codes = codes.movedim(dim, -1).long()
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits)
        words = (codes.reshape(*codes.shape[:-1], -1, WORD // bits) << shifts).sum(-1)
    else:
        first = torch.arange(codes.shape[-1]) * bits
        spread = codes << (first % WORD)
        words = torch.zeros(*codes.shape[:-1], codes.shape[-1] * bits // WORD + 1, dtype=torch.int64)
        index = (first // WORD).expand_as(codes)
        words.scatter_add_(-1, index, spread & 0xFFFFFFFF)  # no two numbers share a bit
        words.scatter_add_(-1, index + 1, spread >> WORD)
        words = words[..., :-1]
    return _as_int32(words).movedim(-1, dim).contiguous()


def _as_int32(words: torch.Tensor) -> torch.Tensor:
    """The low 32 bits, as a signed number."""
    import torch

    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
