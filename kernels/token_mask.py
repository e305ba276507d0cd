"""Sets of token ids as bits: which tokens of a vocabulary a request may draw.

Bit j of word i is token 32 * i + j, in int32: the layout of xgrammar's and vLLM's bit masks, so
that a grammar's mask can be copied into a slot as it is. Bits past the vocabulary mean nothing. A
mask takes an eighth of a byte a token, a row of logits two or four bytes.

Example: of a vocabulary of 40, the set {0, 33} is the words [1, 2].
"""

import torch
from torch import Tensor

WORD_BITS = 32
ALL = -1
"""The word of 32 tokens, all of them in the set."""


def words_of(vocab: int) -> int:
    """Words that hold the bits of a vocabulary."""
    return -(-vocab // WORD_BITS)


def mask_of(ids: Tensor, vocab: int) -> Tensor:
    """The set of ids i64[N] in [0, V), in any order and any number of times: i32[words_of(V)]."""
    ids = ids.unique()  # so that a sum of bits is their union
    bits = torch.ones_like(ids) << ids % WORD_BITS
    words = ids.new_zeros(words_of(vocab)).index_add_(0, ids // WORD_BITS, bits)
    return words.to(torch.int32)  # 2^31 wraps around to the sign, which is bit 31


def members(words: Tensor, vocab: int) -> Tensor:
    """Which tokens are in the set: i32[words_of(V)] -> bool[V]."""
    i_bit = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(1) >> i_bit) & 1).view(-1)[:vocab].bool()
