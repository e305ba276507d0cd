"""The Triton sampler in the interpreter: the reference's tokens, whatever the rows ask for."""

import math

import pytest
import scipy.stats
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from millrace.kernels import sampling_triton
from millrace.kernels.drawn_logprobs import drawn_logprobs_reference, processed_row
from millrace.kernels.filters import kept_tokens
from millrace.kernels.logprobs import raw_logprobs_reference
from millrace.kernels.logprobs_triton import drawn_logprobs_triton, raw_logprobs_triton
from millrace.kernels.order_triton import key_id, key_of, key_value
from millrace.kernels.rng import gumbel_noise, philox4x32, xtc_coins
from millrace.kernels.rng_triton import gumbel_at, gumbel_tile, xtc_coin
from millrace.kernels.sampling import (
    SlotSampling,
    SlotValues,
    edit_row,
    filters_of,
    sample_reference,
)
from millrace.kernels.sampling_filters_triton import CAPACITY, KEY_ROOM
from millrace.kernels.sampling_triton import MAX_VOCAB, sample_triton
from millrace.kernels.slot_sampling import PROCESSED_LOGPROBS

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


@pytest.mark.parametrize("seed", [0, -987654321012345, 1 << 62])
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


def assert_scored_alike(ours, expected):
    """Where nobody asked, both have NaN; then ranks and ids mean nothing."""
    close = {"rtol": 0, "atol": TOLERANCE, "equal_nan": True}
    torch.testing.assert_close(ours.logprobs, expected.logprobs, **close)
    known = ~expected.logprobs.isnan()
    torch.testing.assert_close(ours.top_logprobs[known], expected.top_logprobs[known], **close)
    assert torch.equal(ours.ranks[known], expected.ranks[known])
    assert torch.equal(ours.top_ids[known], expected.top_ids[known])


@pytest.mark.parametrize(("vocab", "seed", "num_top"), [(700, 0, 20), (5000, 2, 0)])
def test_tokens_and_their_logprobs_are_the_reference_s(sampling_case, vocab, seed, num_top):
    case = sampling_case(vocab, seed)
    inputs = (case.logits, case.slots, case.positions, case.params)
    ours, expected = sample_triton(*inputs, scored=True), sample_reference(*inputs)
    assert torch.equal(ours.ok, expected.ok)
    assert torch.equal(ours.token_ids, expected.token_ids)
    scored = drawn_logprobs_triton(*inputs, ours, num_top)
    assert_scored_alike(scored, drawn_logprobs_reference(*inputs, expected, num_top))
    # A row does not depend on its neighbours or place.
    one = torch.tensor([6])
    inputs = (case.logits[one], case.slots[one], case.positions[one], case.params)
    alone = sample_triton(*inputs, scored=True)
    assert torch.equal(alone.token_ids, ours.token_ids[one])
    assert torch.equal(alone.notes.kept, ours.notes.kept[one])
    apart = drawn_logprobs_triton(*inputs, alone, num_top)
    torch.testing.assert_close(apart.logprobs, scored.logprobs[one], rtol=0, atol=0, equal_nan=True)


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


def rows_of(vocab, wanted, **common):
    """A slot for each of the `wanted`, and (slots, positions, params) for one row of each."""
    params = SlotSampling.zeros(len(wanted), vocab)
    for slot, values in enumerate(wanted):
        params.write(slot, SlotValues(temperature=1.0, seed=slot, **common, **values))
    return torch.arange(len(wanted)), torch.zeros(len(wanted), dtype=torch.int64), params


class _Scratch:
    """Keeps what the kernels leave for one another."""

    def __init__(self, monkeypatch):
        empty = sampling_triton._Scratch.empty
        monkeypatch.setattr(sampling_triton._Scratch, "empty", lambda *a: self._keep(empty(*a)))

    def _keep(self, scratch):
        self.of_last_call = scratch
        return scratch


@pytest.mark.parametrize(("kind", "wanted"), [("random", WIDE), ("ties", WIDE[:2])])
def test_rows_with_more_candidates_than_fit_are_exact_too(monkeypatch, kind, wanted):
    """And they are settled by a short list."""
    row = torch.randn(2500, generator=torch.Generator().manual_seed(8))
    if kind == "ties":
        row = (row * 2).round() / 2
    slots, positions, params = rows_of(2500, wanted, logprobs=PROCESSED_LOGPROBS)
    for slot in range(len(wanted)):
        assert len(kept_tokens(row, filters_of(slot, 0, params))) > CAPACITY
    inputs = (row.expand(len(wanted), -1), slots, positions, params)
    scratch = _Scratch(monkeypatch)
    ours, expected = sample_triton(*inputs, scored=True), sample_reference(*inputs)
    assert torch.equal(ours.token_ids, expected.token_ids)
    assert scratch.of_last_call.flat[0] == len(wanted)
    assert scratch.of_last_call.count.max() < (1000 if kind == "ties" else 300)
    scored = drawn_logprobs_triton(*inputs, ours, 5)
    assert_scored_alike(scored, drawn_logprobs_reference(*inputs, ours, 5))


def test_a_long_flat_row_is_settled_by_a_short_list(monkeypatch):
    """Of 40,000 candidates a few hundred stay in doubt, of whatever filter."""
    vocab = 40_000
    row = torch.randn(1, vocab, generator=torch.Generator().manual_seed(1)).mul_(2.5)
    wanted = [{"top_k": 20_000, "top_p": 0.9}, {"typical_p": 0.9}]
    slots, positions, params = rows_of(vocab, wanted)
    inputs = (row.expand(2, -1), slots, positions, params)
    scratch = _Scratch(monkeypatch)
    assert torch.equal(sample_triton(*inputs).token_ids, sample_reference(*inputs).token_ids)
    assert scratch.of_last_call.flat[0] == 2
    assert 0 < scratch.of_last_call.count.min() <= scratch.of_last_call.count.max() < 1000


def test_thousands_of_equal_logits_at_a_cut_are_cut_by_id(monkeypatch):
    vocab = KEY_ROOM + 1000
    row = torch.zeros(1, vocab)
    row[0, 5] = 1.0
    slots, positions, params = rows_of(vocab, [{"top_k": 3000, "typical_p": 0.4, "top_p": 0.9}])
    inputs = (row, slots, positions, params)
    scratch = _Scratch(monkeypatch)
    assert torch.equal(sample_triton(*inputs).token_ids, sample_reference(*inputs).token_ids)
    assert scratch.of_last_call.count[0] > KEY_ROOM


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


def test_drawn_logprobs_need_the_notes_of_this_sampler():
    logits, zero, params = torch.zeros(1, 50), int64(0), one_slot(50)
    for sampled in (
        sample_reference(logits, zero, zero, params),
        sample_triton(logits, zero, zero, params),
    ):
        with pytest.raises(ValueError, match=r"^sampled: expected"):
            drawn_logprobs_triton(logits, zero, zero, params, sampled, 1)


MODES = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 4, "top_p": 0.9},
    {"temperature": 1.0, "typical_p": 0.9, "top_n_sigma": 3.0, "xtc_probability": 1.0},
]


def test_rows_without_an_answer_are_reported_alone():
    nan, inf = math.nan, math.inf
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    logits[1, 13] = nan
    logits[2] = -inf
    logits[3, 5] = logits[3, 9] = inf
    logits[4] = -inf
    logits[4, 8] = -3e38
    params = SlotSampling.zeros(len(MODES), 40)
    for slot, values in enumerate(MODES):
        params.write(slot, SlotValues(logprobs=1 + slot % 2, **values))
    slots = torch.arange(len(MODES)).repeat_interleave(5)
    inputs = (logits.repeat(len(MODES), 1), slots, torch.arange(len(slots)), params)
    ours, expected = sample_triton(*inputs, scored=True), sample_reference(*inputs)
    assert ours.ok.tolist() == [True, False, False, True, True] * len(MODES)
    assert torch.equal(ours.token_ids, expected.token_ids)
    scored = drawn_logprobs_triton(*inputs, ours, 2)
    assert_scored_alike(scored, drawn_logprobs_reference(*inputs, expected, 2))
    assert scored.logprobs.isnan().tolist() == [False, True, True, True, False] * len(MODES)


KERNELS = [name for name in vars(sampling_triton) if name.endswith("_kernel")]


class _Counted:
    """A kernel whose launches are noted."""

    def __init__(self, name, launched):
        self.name, self.launched = name, launched
        self.kernel = getattr(sampling_triton, name)

    def __getitem__(self, grid):
        self.launched.append(self.name)
        return self.kernel[grid]


def test_rows_without_filters_are_two_launches_and_the_same_bits(monkeypatch):
    """Greedy and with a temperature, edited, in several tiles, with nothing left and with NaN."""
    vocab, edits = 5000, {"bias": {7: 9.0}, "frequency_penalty": 0.4, "output_ids": (5, 5)}
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(4)) * 3
    logits[3, 4999], logits[4] = math.nan, -math.inf
    logits[5, 4500] = logits[5, 90] = math.inf
    params = SlotSampling.zeros(3, vocab)
    for slot, values in enumerate(({}, {"temperature": 1.3}, {"temperature": 0.7, **edits})):
        params.write(slot, SlotValues(seed=slot, **values))
    inputs = (logits, int64(0, 1, 2, 1, 1, 2), torch.arange(6), params)
    expected, launched = sample_triton(*inputs), []
    for name in KERNELS:
        monkeypatch.setattr(sampling_triton, name, _Counted(name, launched))
    plain = sample_triton(*inputs, plain=True)
    assert launched == ["stats_kernel", "finish_kernel"]
    for name in ("token_ids", "ok"):
        assert torch.equal(getattr(plain, name), getattr(expected, name))
    assert torch.equal(plain.notes.kept, expected.notes.kept)
    launched.clear()
    sample_triton(*(t[:1] for t in inputs[:3]), params)
    assert len(launched) == len(set(launched)) == len(KERNELS) == 9


@pytest.mark.parametrize(("vocab", "num_top"), [(60, 60), (4096, 5), (5000, 0)])
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


ASKED = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "top_n_sigma": {"top_n_sigma": 1.2},
    "typical_p": {"typical_p": 0.6},
    "xtc": {"xtc_probability": 0.5, "xtc_threshold": 0.2},
    "temperature last": {"temperature": 2.0, "temperature_last": True, "top_p": 0.7},
    "edits": {
        "bias": {3: 1.0, 5: -math.inf},
        "repetition_penalty": 1.4,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
        "prompt_ids": [1, 2, 3],
        "output_ids": [2, 7, 7],
    },
}
RAREST = 3.0  # tokens that are expected less often are counted as one


@pytest.mark.slow
def test_draws_follow_the_definition_s_distribution():
    """Chi-square, for each filter and edit; one launch for all. XTC's coins are given."""
    draws = 40
    row = torch.randn(8, generator=torch.Generator().manual_seed(1)) * 1.2
    params = SlotSampling.zeros(len(ASKED), 8)
    for slot, values in enumerate(ASKED.values()):
        params.write(slot, SlotValues(**({"temperature": 1.0, "seed": 2024} | values)))
    slots, positions = torch.arange(len(ASKED)).repeat(draws), torch.arange(draws * len(ASKED))
    tokens = sample_triton(row.expand(len(slots), -1), slots, positions, params).token_ids
    for slot, name in enumerate(ASKED):
        edited = edit_row(row.clone(), slot, 0, params)
        expected = torch.zeros(8, dtype=torch.float64)
        for position in positions[slots == slot].tolist():
            expected += processed_row(edited, slot, position, params).double().softmax(0)
        observed = torch.bincount(tokens[slots == slot], minlength=8)
        assert not observed[expected == 0].any(), name
        rare = expected < RAREST
        bins = [(n[~rare].tolist(), float(n[rare].sum())) for n in (observed, expected)]
        (seen, seen_rarely), (due, due_rarely) = bins
        if due_rarely > RAREST:
            seen, due = [*seen, seen_rarely], [*due, due_rarely]
        else:  # into the likeliest
            seen[0], due[0] = seen[0] + seen_rarely, due[0] + due_rarely
        assert scipy.stats.chisquare(seen, due).pvalue > 1e-3, name


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
