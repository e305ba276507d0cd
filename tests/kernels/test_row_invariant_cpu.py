"""A row's bits, alone and in any batch; threads that make the plain forms differ."""

from dataclasses import dataclass

import pytest
import torch

from millrace.kernels import row_invariant_cpu
from millrace.kernels.activation import silu_mul_reference
from millrace.kernels.attention import AttentionBatch, paged_attention_reference, prepare_attention
from millrace.kernels.attention_cpu import paged_attention_cpu
from millrace.kernels.matmul import PackedLinear, pack_linear
from millrace.kernels.norm import rms_norm_reference
from millrace.kernels.row_invariant_cpu import (
    NotRowInvariant,
    RowInvariantPacking,
    agreeing_sizes,
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
    linear = RowInvariantPacking()(weight, torch.randn(n) if bias else None)
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


@dataclass(frozen=True)
class OddLinear(PackedLinear):
    """Its products of some sizes differ: in all rows, or in the last one."""

    odd_sizes: set
    uneven: bool

    def __call__(self, x):
        y = x.round() @ self.weight.t()  # exact in any order
        if len(x) in self.odd_sizes:
            y[-1 if self.uneven else slice(None)] += 2.0**-10
        return y


def odd_linear(odd_sizes, uneven):
    weight = torch.arange(64.0).view(8, 8)
    return OddLinear(weight, None, 8, 8, weight.dtype, False, odd_sizes, uneven)


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
def test_sizes_that_disagree_are_not_used(odd_sizes, uneven, sizes):
    assert agreeing_sizes(odd_linear(odd_sizes, uneven)) == sizes


def test_a_library_without_such_a_product_is_refused(monkeypatch):
    monkeypatch.setattr(row_invariant_cpu, "ROW_SIZES", (4, 16))
    with pytest.raises(NotRowInvariant, match=r"weight \[8, 8\]"):
        agreeing_sizes(odd_linear({4, 16}, uneven=True))


@pytest.fixture
def looked_at(monkeypatch):
    """The layers whose sizes were compared."""
    layers = []
    monkeypatch.setattr(
        row_invariant_cpu, "agreeing_sizes", lambda linear: (layers.append(linear), (1,))[1]
    )
    return layers


def test_a_shape_is_looked_at_once_by_a_weight_of_the_model(looked_at):
    pack, weights = RowInvariantPacking(), torch.randn(3, 70, 80)
    packed = [pack(weight) for weight in (*weights, weights[0, :40])]
    assert [(of.out_features, of.in_features) for of in looked_at] == [(70, 80), (40, 80)]
    assert looked_at[0].weight is packed[0].weight, "nothing is packed for the comparison"
    pack(weights[0], torch.randn(70))  # other products
    RowInvariantPacking()(weights[0])  # another model's
    assert len(looked_at) == 4


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("few", [0, 5], ids=["alike", "nearly alike"])
def test_a_weight_that_shows_no_order_of_its_sums_is_not_what_is_looked_at(looked_at, value, few):
    weight = torch.full((200, 300), value)
    weight[:few] = torch.randn(few, 300)
    packed = RowInvariantPacking()(weight, torch.zeros(200))
    (other,) = looked_at
    assert other.weight is not packed.weight and other.bias is not None
    torch.testing.assert_close(packed(weight[:1]), weight[:1] @ weight.t())


def test_weights_of_a_bf16_checkpoint_tell():
    assert row_invariant_cpu.tells(torch.randn(576, 1000).mul(0.02).bfloat16().float())


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"weight: expected .*float32"):
        RowInvariantPacking()(torch.ones(4, 4).bfloat16())
