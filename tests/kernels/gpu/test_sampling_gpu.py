"""The sampler on the GPU at a model's vocabulary: rows of every kind, flat ones, and logprobs."""

import dataclasses

import pytest
import torch

from millrace.kernels.dispatch import operations
from millrace.kernels.drawn_logprobs import drawn_logprobs_reference
from millrace.kernels.logprobs_triton import drawn_logprobs_triton
from millrace.kernels.sampling import SlotSampling, SlotValues, sample_reference
from millrace.kernels.sampling_triton import sample_triton
from millrace.kernels.slot_sampling import PROCESSED_LOGPROBS

VOCAB = 128_256
VOCABS = (1, 127, 4096, 4097, 50_000, VOCAB)
FLAT = [
    {"top_p": 0.9},
    {"top_k": 20_000, "top_p": 0.95},
    {"typical_p": 0.9},
    {"min_p": 1e-3},
    {"top_n_sigma": 3.0, "top_p": 0.99},
    {"xtc_probability": 1.0, "xtc_threshold": 1e-4},
    {"top_k": 60_000, "typical_p": 0.9, "top_p": 0.95, "min_p": 1e-3},
]


def on(device, params):
    return SlotSampling(
        **{f.name: getattr(params, f.name).to(device) for f in dataclasses.fields(params)}
    )


@pytest.mark.parametrize("seed", range(3))
def test_tokens_and_their_logprobs_are_the_reference_s(sampling_case, gpu, seed):
    """One token of ten may differ: the device's own log and exp decide near ties."""
    case = sampling_case(VOCAB, seed)
    inputs = (case.logits, case.slots, case.positions)
    there = (*(t.to(gpu) for t in inputs), on(gpu, case.params))
    ours = sample_triton(*there, scored=True)
    expected = sample_reference(*inputs, case.params)
    assert torch.equal(ours.ok.cpu(), expected.ok)
    assert int((ours.token_ids.cpu() != expected.token_ids).sum()) <= 1
    scored = drawn_logprobs_triton(*there, ours, 5)
    drawn = dataclasses.replace(expected, token_ids=ours.token_ids.cpu())
    wanted = drawn_logprobs_reference(*inputs, case.params, drawn, 5)
    close = torch.isclose(scored.logprobs.cpu(), wanted.logprobs, rtol=0, atol=1e-4, equal_nan=True)
    assert int((~close).sum()) <= 1


@pytest.mark.parametrize("values", FLAT, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_flat_row_is_cut_where_the_reference_cuts_it(gpu, dtype, values):
    row = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3)).to(dtype)
    params = SlotSampling.zeros(1, VOCAB)
    params.write(0, SlotValues(temperature=1.0, seed=9, logprobs=PROCESSED_LOGPROBS, **values))
    zero = torch.zeros(1, dtype=torch.int64)
    there = (row.to(gpu), zero.to(gpu), zero.to(gpu), on(gpu, params))
    ours = sample_triton(*there, scored=True)
    scored = drawn_logprobs_triton(*there, ours, 5)
    drawn = dataclasses.replace(ours, token_ids=ours.token_ids.cpu(), ok=ours.ok.cpu())
    wanted = drawn_logprobs_reference(row, zero, zero, params, drawn, 5)
    torch.testing.assert_close(scored.logprobs.cpu(), wanted.logprobs, rtol=0, atol=1e-3)


def test_bits_do_not_depend_on_the_batch(sampling_case, gpu):
    case = sampling_case(VOCAB, 11)
    params = on(gpu, case.params)
    inputs = [t.to(gpu) for t in (case.logits.bfloat16(), case.slots, case.positions)]
    alone = [sample_triton(*(t[i : i + 1] for t in inputs), params) for i in range(10)]
    for rows in (7, 256):
        index = torch.arange(rows, device=gpu) % 10
        together = sample_triton(*(t[index] for t in inputs), params)
        for field in ("token_ids", "ok"):
            expected = torch.cat([getattr(one, field) for one in alone])[index]
            assert torch.equal(getattr(together, field), expected), field
        kept = torch.cat([one.notes.kept for one in alone])[index]
        assert torch.equal(together.notes.kept, kept)


@pytest.mark.parametrize("vocab", [127, 4096, 4097, 50_000, 128_256])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_the_references(sampling_case, gpu, vocab, seed):
    """Near ties may fall otherwise, as log is the device's: no more than one row in the thirty."""
    case = sampling_case(vocab, seed)
    params = on(gpu, case.params)
    inputs = (case.logits.to(gpu), case.slots.to(gpu), case.positions.to(gpu), params)
    got = operations(gpu, "triton").sample(*inputs)
    wanted = operations(gpu, "reference").sample(*inputs)
    assert torch.equal(got.ok, wanted.ok)
    assert int((got.token_ids != wanted.token_ids).sum()) <= 1


def test_the_same_call_twice_gives_the_same_tokens(sampling_case, gpu):
    case = sampling_case(128_256, 6)
    params = on(gpu, case.params)
    inputs = (case.logits.to(gpu), case.slots.to(gpu), case.positions.to(gpu), params)
    sample = operations(gpu, "triton").sample
    first = sample(*inputs).token_ids
    for _ in range(20):
        assert torch.equal(sample(*inputs).token_ids, first)


@pytest.mark.parametrize("rows", [1, 64, 256])
def test_without_filters_two_launches_draw_what_nine_do(gpu, rows):
    random = torch.Generator(gpu).manual_seed(rows)
    logits = torch.empty(rows, VOCAB, device=gpu).normal_(generator=random).bfloat16()
    params = SlotSampling.zeros(2, VOCAB)
    params.write(1, SlotValues(temperature=1.1, seed=7))
    slots, positions = torch.arange(rows, device=gpu) % 2, torch.arange(rows, device=gpu)
    inputs = (logits, slots, positions, on(gpu, params))
    plain, expected = sample_triton(*inputs, plain=True), sample_triton(*inputs)
    assert torch.equal(plain.token_ids, expected.token_ids) and plain.ok.all()


@pytest.mark.parametrize("vocab", VOCABS)
def test_logprobs_are_the_references(gpu, vocab):
    random = torch.Generator(gpu).manual_seed(vocab)
    logits = torch.empty(7, vocab, device=gpu).normal_(generator=random) * 4
    token_ids = torch.randint(vocab, (7,), device=gpu, generator=random)
    num_top = min(vocab, 5)
    got = operations(gpu, "triton").raw_logprobs(logits, token_ids, num_top)
    wanted = operations(gpu, "reference").raw_logprobs(logits, token_ids, num_top)
    assert torch.equal(got.ranks, wanted.ranks)
    assert torch.equal(got.top_ids, wanted.top_ids)
    torch.testing.assert_close(got.logprobs, wanted.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.top_logprobs, wanted.top_logprobs, rtol=1e-5, atol=1e-5)
