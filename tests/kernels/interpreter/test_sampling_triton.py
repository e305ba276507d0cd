"""The Triton sampler in the interpreter: the reference's tokens, whatever the rows ask for."""

import math

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from millrace.kernels import sampling_triton
from millrace.kernels.filters import kept_tokens
from millrace.kernels.logprobs import raw_logprobs_reference
from millrace.kernels.logprobs_triton import processed_logprobs_triton, raw_logprobs_triton
from millrace.kernels.order_triton import key_id, key_of, key_value
from millrace.kernels.processed_logprobs import processed_logprobs_reference
from millrace.kernels.rng import gumbel_noise, philox4x32, xtc_coins
from millrace.kernels.rng_triton import gumbel_at, gumbel_tile, xtc_coin
from millrace.kernels.sampling import SlotSampling, SlotValues, filters_of, sample_reference
from millrace.kernels.sampling_filters_triton import CAPACITY
from millrace.kernels.sampling_triton import MAX_VOCAB, sample_triton

# Infinities meet in masked-out lanes; NumPy, which plays the GPU here, warns of that.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TOLERANCE = 1e-5  # float32 sums in another order, at logits up to 60 from the best


def int64(*values):
    return torch.tensor(values, dtype=torch.int64)


def one_slot(vocab, **values):
    params = SlotSampling.zeros(1, vocab)
    params.write(0, SlotValues(**values))
    return params


@triton.jit
def _philox_kernel(p_out, seed, position, N: tl.constexpr):
    counters = tl.arange(0, N).to(tl.uint32)
    zero = counters * 0
    words = tl.philox(seed, counters, zero + position.to(tl.uint32), zero, zero)
    for i_word in tl.static_range(4):
        tl.store(p_out + i_word * N + tl.arange(0, N), words[i_word].to(tl.int64))


@pytest.mark.parametrize("seed", [0, 12345, -987654321012345, 1 << 62])
def test_reference_philox_is_triton_s_bit_for_bit(seed):
    out = torch.empty(4, 64, dtype=torch.int64)
    _philox_kernel[(1,)](out, seed, 77, 64)
    counters, zero = torch.arange(64), int64(0)
    key = (int64(seed & 0xFFFFFFFF), int64((seed >> 32) & 0xFFFFFFFF))
    words = philox4x32((counters, int64(77), zero, zero), key)
    assert torch.equal(out, torch.stack(words))


@triton.jit
def _noise_kernel(p_tile, p_at, p_seed, p_position, i_tile):
    seed, position = tl.load(p_seed), tl.load(p_position)
    o_tile = tl.arange(0, 4)[None, :] * 1024 + tl.arange(0, 1024)[:, None]
    tl.store(p_tile + o_tile, gumbel_tile(seed, position, i_tile))
    o_at = tl.arange(0, 4096)
    tl.store(p_at + o_at, gumbel_at(seed, position, i_tile * 4096 + o_at))


def test_noise_is_the_cpu_s_up_to_the_logarithm():
    seed, position = int64(-(1 << 60) + 3), int64((1 << 32) + 5)
    tile, at = torch.empty(4096), torch.empty(4096)
    _noise_kernel[(1,)](tile, at, seed, position, 1)
    expected = gumbel_noise(seed, position, 8192)[0, 4096:]
    assert torch.equal(tile, at)
    # 2e-6: log(1 - u) loses up to 5e-7 of it by rounding 1 - u, beside the ulps of two logarithms
    torch.testing.assert_close(tile, expected, rtol=2e-6, atol=2e-6)


@triton.jit
def _coin_kernel(p_out, p_seeds, p_positions):
    i = tl.program_id(0)
    tl.store(p_out + i, xtc_coin(tl.load(p_seeds + i), tl.load(p_positions + i)))


def test_coins_are_the_cpu_s_bit_for_bit():
    seeds, positions = int64(0, -5, 1 << 60, 7), int64(0, 1, 1 << 33, 9)
    out = torch.empty(4)
    _coin_kernel[(4,)](out, seeds, positions)
    assert torch.equal(out, xtc_coins(seeds, positions))


@triton.jit
def _key_kernel(p_x, p_key, p_value, p_id, N: tl.constexpr):
    o = tl.arange(0, N)
    key = key_of(tl.load(p_x + o), o)
    tl.store(p_key + o, key)
    tl.store(p_value + o, key_value(key))
    tl.store(p_id + o, key_id(key))


def test_keys_sort_like_values_then_ids_and_lead_back():
    x = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 1.0, 3e38, -3e38, 1e-45] + [2.0] * 6
    )
    keys, values, ids = torch.empty(16, dtype=torch.int64), torch.empty(16), torch.empty(16).int()
    _key_kernel[(1,)](x, keys, values, ids, 16)
    assert torch.equal(keys.argsort(descending=True), x.argsort(descending=True, stable=True))
    assert torch.equal(values, x)
    assert ids.tolist() == list(range(16))
    assert keys.min() >= 0


@pytest.mark.parametrize(("vocab", "seed"), [(700, 0), (4096, 1), (5000, 2)])
def test_tokens_are_the_reference_s(sampling_case, vocab, seed):
    case = sampling_case(vocab, seed)
    inputs = (case.logits, case.slots, case.positions, case.params)
    ours, expected = sample_triton(*inputs), sample_reference(*inputs)
    assert torch.equal(ours.ok, expected.ok)
    assert torch.equal(ours.token_ids, expected.token_ids)


WIDE = [
    {"top_k": 1500},
    {"top_p": 0.97},
    {"top_k": 1800, "top_p": 0.97, "min_p": 0.001},
    {"min_p": 1e-3},
    {"top_k": 10**6, "top_p": 0.99},
    {"top_n_sigma": 4.0},
    {"typical_p": 0.9},
    {"xtc_probability": 1.0, "xtc_threshold": 2e-3},
    {"top_n_sigma": 4.5, "top_p": 0.98, "temperature_last": True},
    {"top_k": 2300, "typical_p": 0.97, "top_p": 0.98, "min_p": 1e-3, "xtc_probability": 1.0},
]


@pytest.mark.parametrize(
    ("kind", "values"),
    [*(("random", values) for values in WIDE), *(("ties", values) for values in WIDE[:2])],
    ids=str,
)
def test_rows_with_more_candidates_than_fit_are_exact_too(kind, values):
    row = torch.randn(1, 2500, generator=torch.Generator().manual_seed(8))
    if kind == "ties":
        row = (row * 2).round() / 2
    params = one_slot(2500, temperature=1.0, seed=4, **values)
    assert len(kept_tokens(row[0], filters_of(0, 0, params))) > CAPACITY
    inputs = (row, int64(0), int64(0), params)
    ours, expected = sample_triton(*inputs), sample_reference(*inputs)
    assert torch.equal(ours.token_ids, expected.token_ids)
    kept = processed_logprobs_triton(*inputs, ours, 64)
    expected = processed_logprobs_reference(*inputs, ours, 64)
    assert torch.equal(kept.ranks, expected.ranks)
    torch.testing.assert_close(kept.logprobs, expected.logprobs, rtol=0, atol=TOLERANCE)


class _Poison:
    """`bound_kernel`, after which every group of logits that does not reach its bound is NaN."""

    def __init__(self, logits):
        self.logits, self.kernel = logits, sampling_triton.bound_kernel
        self.left = 0

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.kernel[grid](*args, **options)
            bound = args[self.kernel.arg_names.index("p_bound")]
            groups = self.logits.view(self.logits.shape[0], -1, 32)
            groups[groups.amax(2) < bound[:, None]] = math.nan
            self.left = int(groups.isfinite().sum())

        return launch


@pytest.mark.parametrize(
    "values", [{"top_k": 20}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_n_sigma": 1.0}], ids=str
)
def test_only_groups_whose_maximum_reaches_the_bound_are_read_again(monkeypatch, values):
    logits = torch.randn(2, 8192, generator=torch.Generator().manual_seed(5)) * 3
    params = one_slot(8192, temperature=1.0, seed=3, **values)
    inputs = (int64(0, 0), int64(1, 2), params)
    expected = sample_reference(logits, *inputs)
    poison = _Poison(logits)
    monkeypatch.setattr(sampling_triton, "bound_kernel", poison)
    assert torch.equal(sample_triton(logits, *inputs).token_ids, expected.token_ids)
    assert poison.left < logits.numel() // 5


@pytest.mark.parametrize(("vocab", "seed", "num_top"), [(700, 5, 20), (700, 6, 0), (4100, 7, 3)])
def test_processed_logprobs_are_the_reference_s(sampling_case, vocab, seed, num_top):
    case = sampling_case(vocab, seed)
    inputs = (case.logits, case.slots, case.positions, case.params)
    sampled = sample_triton(*inputs)
    ours = processed_logprobs_triton(*inputs, sampled, num_top)
    expected = processed_logprobs_reference(*inputs, sampled, num_top)
    close = {"rtol": 0, "atol": TOLERANCE, "equal_nan": True}
    torch.testing.assert_close(ours.logprobs, expected.logprobs, **close)
    torch.testing.assert_close(ours.top_logprobs, expected.top_logprobs, **close)
    assert torch.equal(ours.ranks, expected.ranks)
    assert torch.equal(ours.top_ids, expected.top_ids)


def test_processed_logprobs_need_what_this_sampler_kept():
    logits, zero, params = torch.zeros(1, 50), int64(0), one_slot(50)
    sampled = sample_reference(logits, zero, zero, params)
    with pytest.raises(ValueError, match=r"^sampled: expected"):
        processed_logprobs_triton(logits, zero, zero, params, sampled, 1)


MODES = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 4, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "typical_p": 0.9, "top_n_sigma": 3.0, "xtc_probability": 1.0},
]


@pytest.mark.parametrize("values", MODES, ids=str)
def test_rows_without_an_answer_are_reported_alone(values):
    nan, inf = math.nan, math.inf
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    logits[1, 13] = nan
    logits[2] = -inf
    logits[3, 5] = logits[3, 9] = inf
    logits[4] = -inf
    logits[4, 8] = -3e38
    inputs = (logits, torch.zeros(6, dtype=torch.int64), torch.arange(6), one_slot(40, **values))
    ours, expected = sample_triton(*inputs), sample_reference(*inputs)
    assert ours.ok.tolist() == [True, False, False, True, True, True]
    assert torch.equal(ours.token_ids, expected.token_ids)


def test_a_row_does_not_depend_on_its_neighbours_or_place(sampling_case):
    case = sampling_case(4100, 6)
    together = sample_triton(case.logits, case.slots, case.positions, case.params)
    rows = torch.tensor([6, 0, 3])
    inputs = (case.logits[rows], case.slots[rows], case.positions[rows], case.params)
    apart = sample_triton(*inputs)
    for field in ("token_ids", "ok", "kept"):
        assert torch.equal(getattr(apart, field), getattr(together, field)[rows]), field


@pytest.mark.parametrize(("vocab", "num_top"), [(60, 60), (4096, 5), (9000, 3), (9000, 0)])
def test_logprobs_are_the_reference_s(vocab, num_top):
    wide = torch.randn(5, vocab + 7, generator=torch.Generator().manual_seed(vocab)) * 8
    logits = wide[:, :vocab]  # a row stride of its own
    logits[1] = (logits[1] / 4).round()
    logits[2, 3] = math.nan
    logits[3, 3] = math.inf
    logits[4, : vocab // 2] = -math.inf
    token_ids = torch.tensor([0, 7, 8, 9, vocab - 1])
    ours = raw_logprobs_triton(logits, token_ids, num_top)
    expected = raw_logprobs_reference(logits, token_ids, num_top)
    close = {"rtol": 0, "atol": TOLERANCE, "equal_nan": True}
    torch.testing.assert_close(ours.logprobs, expected.logprobs, **close)
    torch.testing.assert_close(ours.top_logprobs, expected.top_logprobs, **close)
    ordinary = [0, 1, 4]
    assert torch.equal(ours.ranks[ordinary], expected.ranks[ordinary])
    assert torch.equal(ours.top_ids[ordinary], expected.top_ids[ordinary])


def test_an_empty_batch_gives_an_empty_answer():
    none = torch.empty(0, dtype=torch.int64)
    sampled = sample_triton(torch.empty(0, 50), none, none, one_slot(50))
    assert sampled.token_ids.shape == (0,)
    assert sampled.ok.shape == (0,)


@pytest.mark.parametrize(
    "logits",
    [torch.zeros(50, 1).T.expand(1, 50)[:, ::2], torch.zeros(1, 1).expand(1, MAX_VOCAB + 1)],
    ids=["strided", "too wide"],
)
def test_logits_that_the_kernels_cannot_take_are_refused(logits):
    params = SlotSampling.zeros(1, 25)
    if logits.shape[1] != 25:
        params.bias = logits  # only its shape is looked at
    with pytest.raises(ValueError, match=r"^logits: expected"):
        sample_triton(logits, int64(0), int64(0), params)
