"""Sampling on the GPU: the reference's tokens, on the device's own exp and log."""

import dataclasses

import pytest
import torch

from millrace.kernels.dispatch import operations
from millrace.kernels.slot_sampling import SlotSampling

VOCABS = (1, 127, 4096, 4097, 50_000, 128_256)


def on(device, params):
    moved = {f.name: getattr(params, f.name).to(device) for f in dataclasses.fields(params)}
    return SlotSampling(**moved)


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


def test_a_rows_token_does_not_depend_on_the_others(sampling_case, gpu):
    case = sampling_case(50_000, 5)
    params = on(gpu, case.params)
    inputs = (case.logits.to(gpu), case.slots.to(gpu), case.positions.to(gpu))
    sample = operations(gpu, "triton").sample
    together = sample(*inputs, params).token_ids
    for row in range(len(together)):
        alone = sample(*(x[row : row + 1].contiguous() for x in inputs), params).token_ids
        assert torch.equal(alone, together[row : row + 1]), f"row {row}"


def test_the_same_call_twice_gives_the_same_tokens(sampling_case, gpu):
    case = sampling_case(128_256, 6)
    params = on(gpu, case.params)
    inputs = (case.logits.to(gpu), case.slots.to(gpu), case.positions.to(gpu), params)
    sample = operations(gpu, "triton").sample
    first = sample(*inputs).token_ids
    for _ in range(20):
        assert torch.equal(sample(*inputs).token_ids, first)


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
