"""The noise of sampling: the published words, the documented layout, the right distribution."""

import math

import pytest
import scipy.stats
import torch

from millrace.kernels import rng
from millrace.kernels.rng import gumbel_noise, gumbel_noise_at, philox4x32

# Random123's known-answer tests (kat_vectors) for philox4x32-10: counter, key, words.
ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def int64(*values):
    return torch.tensor(values, dtype=torch.int64)


def words_of(counter, key):
    words = philox4x32(tuple(int64(c) for c in counter), tuple(int64(k) for k in key))
    return tuple(int(word) for word in words)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, words):
    assert words_of(counter, key) == words


@pytest.mark.parametrize(("token_id", "counter", "word"), [(5000, 1928, 0), (7000, 1880, 2)])
def test_documented_example_is_what_a_token_gets(token_id, counter, word):
    seed, position = 0x1234_5678_9ABC_DEF0, 77
    drawn = words_of((counter, position, 0, 0), (0x9ABC_DEF0, 0x1234_5678))[word]
    u = (torch.tensor(drawn).float() + 0.5) * 2.0**-32
    expected = -torch.log(-torch.log1p(-u))
    assert gumbel_noise_at(int64(seed), int64(position), int64(token_id).view(1, 1)) == expected


@pytest.mark.parametrize("vocab", [1, 1000, 4096, 4097, 9000])
def test_whole_row_equals_single_tokens(vocab):
    seeds, positions = int64(3, -7, 2**40 + 5, 0, 1), int64(1, 2, 2**33 + 9, 0, 5)
    row = gumbel_noise(seeds, positions, vocab)
    single = gumbel_noise_at(seeds, positions, torch.arange(vocab).expand(5, vocab))
    assert torch.equal(row, single)


def test_noise_of_a_row_does_not_depend_on_the_batch():
    seeds, positions = torch.arange(9) * 10**12, torch.arange(9) + 100
    together = gumbel_noise(seeds, positions, 5000)
    for i in (0, 4, 8):
        assert torch.equal(
            gumbel_noise(seeds[i : i + 1], positions[i : i + 1], 5000)[0], together[i]
        )


def test_every_bit_of_the_seed_and_of_the_position_counts():
    seeds = int64(0, *(1 << i for i in range(63)), -(1 << 63))
    at_zero = gumbel_noise(seeds, torch.zeros_like(seeds), 8)
    assert torch.unique(at_zero, dim=0).shape[0] == seeds.shape[0]
    positions = int64(0, *(1 << i for i in range(32)))
    of_zero = gumbel_noise(torch.zeros_like(positions), positions, 8)
    assert torch.unique(of_zero, dim=0).shape[0] == positions.shape[0]


def test_extreme_words_give_finite_noise():
    words = torch.tensor([0.0, float(1 << 31), float(ONES)])
    highest, _, lowest = rng._gumbel_(words).tolist()
    assert highest == pytest.approx(33 * math.log(2), rel=1e-6)
    assert lowest == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)


def test_noise_is_gumbel_distributed():
    noise = gumbel_noise(torch.arange(8), torch.arange(8), 16384).flatten()
    assert scipy.stats.kstest(noise.double().numpy(), "gumbel_r").pvalue > 1e-3


def test_neighbouring_seeds_positions_and_tokens_are_uncorrelated():
    base = gumbel_noise(int64(1, 2, 1), int64(5, 5, 6), 65536).double()
    shifted = torch.stack((base[0, :-1], base[0, 1:]))
    for pair in (base[[0, 1]], base[[0, 2]], shifted):
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / math.sqrt(65536)


@pytest.mark.parametrize(
    ("seeds", "positions", "name"),
    [
        (torch.zeros(2), int64(1, 2), "seeds"),
        (int64(1, 2), int64(1), "positions"),
        (int64(1, 2), torch.zeros(2, dtype=torch.int32), "positions"),
    ],
)
def test_malformed_rows_are_refused_by_name(seeds, positions, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        gumbel_noise(seeds, positions, 8)


def test_malformed_ids_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^ids: expected"):
        gumbel_noise_at(int64(1), int64(1), int64(1))
