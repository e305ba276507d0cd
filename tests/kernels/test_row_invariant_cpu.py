"""A row's bits, alone and in any batch; threads that make the plain forms differ."""

import pytest
import torch

from millrace.kernels import row_invariant_cpu
from millrace.kernels.activation import silu_mul_reference
from millrace.kernels.attention import AttentionBatch, paged_attention_reference, prepare_attention
from millrace.kernels.attention_cpu import paged_attention_cpu
from millrace.kernels.matmul import pack_linear
from millrace.kernels.norm import rms_norm_reference
from millrace.kernels.row_invariant_cpu import (
    NotRowInvariant,
    agreeing_sizes,
    pack_row_invariant,
    prepare_queries,
    rms_norm,
    silu_mul,
)
from millrace.kernels.sampling import sample_reference
from millrace.kernels.slot_sampling import SlotSampling, SlotValues


@pytest.fixture(params=[1, 3])
def threads(request):
    """A third of a batch ends in the middle of a row, where its width is no multiple of three."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("n", "k", "bias"), [(199, 48, False), (96, 576, True), (576, 100, True)])
def test_a_product_gives_a_row_the_same_bits_among_any_number(threads, n, k, bias):
    weight = torch.randn(n, k)
    linear = pack_row_invariant(weight, torch.randn(n) if bias else None)
    x = torch.randn(150, k)
    alone = torch.cat([linear(x[i : i + 1]) for i in range(150)])
    torch.testing.assert_close(alone, pack_linear(weight, linear.bias)(x), rtol=1e-4, atol=1e-4)
    for rows in (0, 2, 4, 5, 16, 17, 63, 64, 65, 150):
        assert torch.equal(linear(x[:rows]), alone[:rows])
        assert torch.equal(linear(x[150 - rows :]), alone[150 - rows :])


@pytest.mark.usefixtures("threads")
def test_elementwise_operations_do_not_notice_where_a_thread_begins():
    x, weight = torch.randn(257, 2 * 1003), torch.randn(2 * 1003)
    for form, reference, arguments in (
        (silu_mul, silu_mul_reference, ()),
        (rms_norm, rms_norm_reference, (weight, 1e-5)),
    ):
        together = form(x, *arguments)
        torch.testing.assert_close(together, reference(x, *arguments), rtol=1e-5, atol=1e-5)
        for start, end in ((0, 1), (64, 129), (200, 257)):
            assert torch.equal(form(x[start:end], *arguments), together[start:end])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("window", [None, 9])
def test_attention_is_the_same_in_a_chunk_of_any_length_and_in_a_decode(attention_case, window):
    case = attention_case([70, 40], [70, 3])

    def attend(start, end, neighbour):
        """Queries start .. end - 1 of the first row, with or without the second one."""
        rows = 2 if neighbour else 1
        queries = torch.tensor([0, end - start, 3][: rows + 1]).cumsum(0).int()
        batch = AttentionBatch(
            block_table=case.batch.block_table,
            slots=case.batch.slots[:rows],
            query_start=queries,
            context_lens=torch.tensor([end, 40][:rows], dtype=torch.int32),
            max_query_len=max(end - start, 3),
            max_context_len=max(end, 40),
            num_decodes=int(end - start == 1),
        )
        q = torch.cat([case.q[start:end], case.q[70:]]) if neighbour else case.q[start:end]
        caches = (case.k_cache, case.v_cache)
        prepared = prepare_queries(batch, case.block_size, window)
        reference = prepare_attention(batch, case.block_size, window)
        out = paged_attention_cpu(q, *caches, prepared, scale=0.125)
        expected = paged_attention_reference(q, *caches, reference, scale=0.125)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        return out[: end - start]

    whole = attend(0, 70, neighbour=True)
    for start, end, neighbour in ((0, 1, True), (0, 33, False), (33, 70, True), (69, 70, False)):
        assert torch.equal(attend(start, end, neighbour), whole[start:end])


def test_draws_are_those_of_the_definition():
    params = SlotSampling.zeros(3, 1003)
    for slot, temperature in enumerate((0.0, 1.0, 0.6)):
        params.write(slot, SlotValues(temperature=temperature, seed=slot, top_k=40 * (slot // 2)))
    logits, slots = torch.randn(3, 1003), torch.tensor([2, 0, 1])
    positions = torch.tensor([5, 6, 7])
    sampled = row_invariant_cpu.sample(logits, slots, positions, params)
    expected = sample_reference(logits, slots, positions, params)
    assert torch.equal(sampled.token_ids, expected.token_ids) and sampled.ok.all()
    none = row_invariant_cpu.sample(logits[:0], slots[:0], positions[:0], params)
    assert none.token_ids.shape == (0,)


def packed_with(odd_sizes, uneven):
    """A pack_linear whose products of some sizes differ: in all rows, or in the last one."""

    def pack(weight, bias=None):
        def linear(x):
            y = x.round() @ weight.round().t()  # exact in any order
            if len(x) in odd_sizes:
                y[-1 if uneven else slice(None)] += 2.0**-10
            return y

        return linear

    return pack


@pytest.mark.parametrize(
    ("odd_sizes", "uneven", "sizes"),
    [
        ({1, 4}, False, (16, 64)),
        ({16}, False, (1, 4, 64)),
        ({16, 64}, True, (1, 4)),
        ({4, 16, 64}, True, (1,)),
    ],
    ids=str,
)
def test_sizes_that_disagree_are_not_used(monkeypatch, odd_sizes, uneven, sizes):
    monkeypatch.setattr(row_invariant_cpu, "pack_linear", packed_with(odd_sizes, uneven))
    assert agreeing_sizes.__wrapped__(8, 8, False, 1) == sizes


def test_a_library_without_such_a_product_is_refused(monkeypatch):
    monkeypatch.setattr(row_invariant_cpu, "ROW_SIZES", (4, 16))
    monkeypatch.setattr(row_invariant_cpu, "pack_linear", packed_with({4, 16}, uneven=True))
    with pytest.raises(NotRowInvariant, match=r"weight \[8, 8\]"):
        agreeing_sizes.__wrapped__(8, 8, False, 1)


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"weight: expected .*float32"):
        pack_row_invariant(torch.ones(4, 4).bfloat16())
