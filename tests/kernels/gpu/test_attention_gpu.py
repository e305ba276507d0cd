"""Paged attention on the GPU: the definition's values, and a row's bits whatever the batch.

Tensor cores are chosen by tile: that a query has the same bits in a prefill chunk of any length,
and behind a warm prefix, can only be found out here.
"""

from dataclasses import replace

import pytest
import torch

from millrace.kernels.attention import prepare_attention
from millrace.kernels.dispatch import operations

SCALE = 0.125
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 2e-6}
MIXED = ([1, 63, 64, 65, 257, 900, 700, 64], [1, 1, 1, 1, 1, 1, 129, 64])


def on(device, case):
    batch = case.batch
    names = ("block_table", "slots", "query_start", "context_lens")
    moved = {name: getattr(batch, name).to(device) for name in names}
    tensors = {name: getattr(case, name).to(device) for name in ("q", "k_cache", "v_cache")}
    return replace(case, batch=replace(batch, **moved), **tensors)


def attend(case, backend="triton", window=None, softcap=None):
    table = operations(case.q.device, backend)
    prepared = table.prepare_attention(case.batch, case.block_size, window)
    inputs = (case.q, case.k_cache, case.v_cache, prepared)
    return table.paged_attention(*inputs, scale=SCALE, softcap=softcap)


def only_rows(case, rows):
    """These rows of a case, as a batch of their own over the same cache."""
    batch = case.batch
    starts = batch.query_start.tolist()
    queries = [starts[row + 1] - starts[row] for row in rows]
    kept = torch.cat([case.q[starts[row] : starts[row + 1]] for row in rows])
    contexts = batch.context_lens[rows].contiguous()
    device = case.q.device
    alone = replace(
        batch,
        slots=batch.slots[rows].contiguous(),
        query_start=torch.tensor([0, *queries], device=device).cumsum(0).int(),
        context_lens=contexts,
        max_query_len=max(queries),
        max_context_len=int(contexts.max()),
        num_decodes=sum(n == 1 for n in queries),
    )
    return replace(case, q=kept, batch=alone)


def last_queries(case, count):
    """The last `count` queries of a case of one row: what is left after a cached prefix."""
    device = case.q.device
    batch = replace(
        case.batch,
        query_start=torch.tensor([0, count], dtype=torch.int32, device=device),
        max_query_len=count,
        num_decodes=int(count == 1),
    )
    return replace(case, q=case.q[-count:], batch=batch)


def first_queries(case, count):
    """The first `count` queries of a prompt of one row, before the others are in the cache."""
    device = case.q.device
    batch = replace(
        case.batch,
        query_start=torch.tensor([0, count], dtype=torch.int32, device=device),
        context_lens=torch.tensor([count], dtype=torch.int32, device=device),
        max_query_len=count,
        max_context_len=count,
        num_decodes=int(count == 1),
    )
    return replace(case, q=case.q[:count], batch=batch)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "block_size"), [(64, 16), (80, 16), (96, 16), (128, 16), (128, 128), (256, 64)]
)
def test_values_are_the_definitions(attention_case, gpu, dtype, head_dim, block_size):
    shape = {"head_dim": head_dim, "block_size": block_size, "dtype": dtype}
    case = on(gpu, attention_case(*MIXED, **shape))
    got, wanted = attend(case).double(), attend(case, "reference").double()
    assert (got - wanted).norm() <= TOLERANCES[dtype] * wanted.norm()


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_window_and_soft_cap_are_the_definitions(attention_case, gpu, window, softcap):
    case = on(gpu, attention_case(*MIXED, head_dim=128, dtype=torch.bfloat16))
    got = attend(case, window=window, softcap=softcap).double()
    wanted = attend(case, "reference", window=window, softcap=softcap).double()
    assert (got - wanted).norm() <= TOLERANCES[torch.bfloat16] * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_row_has_the_same_bits_alone_and_among_others(attention_case, gpu, dtype, head_dim):
    case = on(gpu, attention_case(*MIXED, head_dim=head_dim, dtype=dtype))
    together = attend(case)
    starts = case.batch.query_start.tolist()
    for row in range(len(MIXED[0])):
        alone = attend(only_rows(case, [row]))
        assert torch.equal(alone, together[starts[row] : starts[row + 1]]), f"row {row}"


def test_two_hundred_rows_have_the_bits_of_two(attention_case, gpu):
    case = on(gpu, attention_case([300] * 200, head_dim=64, dtype=torch.bfloat16))
    together = attend(case)
    assert torch.equal(attend(only_rows(case, [0, 199])), together[[0, 199]])


@pytest.mark.parametrize("count", [1, 2, 16, 17, 64, 129, 300])
def test_a_warm_prefix_leaves_the_bits(attention_case, gpu, count):
    """The last queries of a prompt, whether the ones before are computed with them or cached."""
    case = on(gpu, attention_case([600], [600], head_dim=128, dtype=torch.bfloat16))
    assert torch.equal(attend(last_queries(case, count)), attend(case)[-count:])


@pytest.mark.parametrize("count", [1, 16, 63, 64, 65, 257, 599])
def test_the_length_of_a_chunk_leaves_the_bits(attention_case, gpu, count):
    case = on(gpu, attention_case([600], [600], head_dim=128, dtype=torch.bfloat16))
    assert torch.equal(attend(first_queries(case, count)), attend(case)[:count])


def test_a_launch_can_be_replayed_in_a_graph(attention_case, gpu):
    """Nothing in it waits for the device, prefill rows or not."""
    case = on(gpu, attention_case(*MIXED, head_dim=64, dtype=torch.bfloat16))
    prepared = prepare_attention(case.batch, case.block_size)
    table = operations(gpu, "triton")
    wanted = attend(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = table.paged_attention(case.q, case.k_cache, case.v_cache, prepared, scale=SCALE)
    got.fill_(torch.nan)
    graph.replay()
    assert torch.equal(got, wanted)
