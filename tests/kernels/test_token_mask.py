"""Sets of tokens as bits: what goes in comes out, and lies where xgrammar and vLLM put it."""

import pytest
import torch

from millrace.kernels.token_mask import ALL, mask_of, members, words_of


def test_bit_j_of_word_i_is_token_32_i_plus_j():
    assert mask_of(torch.tensor([0, 33]), 40).tolist() == [1, 2]
    assert mask_of(torch.tensor([31]), 32).tolist() == [-(1 << 31)]
    assert mask_of(torch.arange(64), 64).tolist() == [ALL, ALL]


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1000, 4099])
def test_a_set_comes_back_as_it_went_in(vocab):
    random = torch.Generator().manual_seed(vocab)
    for count in (0, 1, vocab // 2, 2 * vocab):  # with repetitions, in any order
        ids = torch.randint(vocab, (count,), generator=random)
        words = mask_of(ids, vocab)
        assert words.dtype == torch.int32
        assert words.shape == (words_of(vocab),)
        assert members(words, vocab).nonzero().squeeze(1).tolist() == sorted(set(ids.tolist()))


def test_bits_past_the_vocabulary_mean_nothing():
    words = mask_of(torch.tensor([2]), 3)
    assert members(words | ~0b111, 3).tolist() == [False, False, True]
