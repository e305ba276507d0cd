"""The last layer fused with the draw: the token that the sampler draws from the same logits."""

import pytest
import torch

pytest.importorskip("triton")

from millrace.kernels.lm_head import draw_from_hidden_reference
from millrace.kernels.lm_head_triton import draw_from_hidden, num_blocks
from millrace.kernels.matmul_fused import Fusion, InputNorm
from millrace.kernels.matmul_triton import Workspace, linear_decode
from millrace.kernels.sampling import SlotSampling, SlotValues
from millrace.kernels.sampling_triton import sample_triton

# Masked lanes compute what is not written; NumPy, which plays the GPU here, warns of that.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SLOTS, K = 6, 64
TEMPERATURES = (0.0, 1.0, 0.3, 5.0, 0.7, 1e-6)


def grid(rows, k):
    """Numbers whose sums of products are exact: a product has one value in any order."""
    return torch.randint(-8, 9, (rows, k)) / 8


def params_for(vocab):
    params = SlotSampling.zeros(SLOTS, vocab)
    for slot, temperature in enumerate(TEMPERATURES):
        params.write(slot, SlotValues(temperature=temperature, seed=1000 + slot))
    return params


def assert_same(sampled, expected):
    assert torch.equal(sampled.ok, expected.ok)
    assert torch.equal(sampled.token_ids, expected.token_ids)


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(17, torch.float32), (1025, torch.bfloat16), (1025, torch.float16), (4116, torch.float16)],
    ids=str,
)
def test_the_token_is_the_sampler_s_on_the_layer_s_logits(vocab, dtype):
    x, head = grid(SLOTS, K).to(dtype), grid(vocab, K).to(dtype)
    slots, positions = torch.randperm(SLOTS), torch.randint(1 << 40, (SLOTS,))
    params = params_for(vocab)
    logits = linear_decode(x, head, Workspace.for_weights([head])).y
    fused = draw_from_hidden(x, head, slots, positions, params)
    assert_same(fused, sample_triton(logits, slots, positions, params))
    if dtype != torch.bfloat16:  # the interpreter truncates where torch rounds
        assert_same(fused, draw_from_hidden_reference(x, head, slots, positions, params))


def test_a_norm_is_divided_out_before_the_logits_are_rounded():
    x, head, params = grid(3, K), grid(50, K), params_for(50)
    slots, positions = torch.arange(3), torch.arange(3)
    norm = InputNorm(torch.rand(3, 2) * K, 1e-5)
    workspace = Workspace.for_weights([head])
    logits = linear_decode(x, head, workspace, Fusion(norm=norm)).y
    fused = draw_from_hidden(x, head, slots, positions, params, norm)
    assert_same(fused, sample_triton(logits, slots, positions, params))


def test_k_in_several_splits():
    x, head, params = torch.randn(3, 300), torch.randn(40, 300), params_for(40)
    slots, positions = torch.arange(3), torch.arange(3)
    logits = linear_decode(x, head, Workspace.for_weights([head])).y
    fused = draw_from_hidden(x, head, slots, positions, params)
    assert_same(fused, sample_triton(logits, slots, positions, params))


def test_a_row_draws_the_same_alone_and_among_twenty():
    x, head, params = grid(20, K), grid(150, K), params_for(150)
    slots, positions = torch.arange(20) % SLOTS, torch.arange(20)
    together = draw_from_hidden(x, head, slots, positions, params)
    for i_row in (0, 19):
        row = slice(i_row, i_row + 1)
        alone = draw_from_hidden(x[row], head, slots[row], positions[row], params)
        assert torch.equal(alone.token_ids, together.token_ids[row])


def test_ties_go_to_the_lowest_id_and_nan_is_not_ok():
    x, head, params = torch.ones(2, K), torch.ones(1100, K), params_for(1100)
    x[1, 3] = float("nan")
    slots, positions = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    head[:5] = 0  # then ids 5 to 1099 are equal: the first lies in the first quarter of a tile
    sampled = draw_from_hidden(x, head, slots, positions, params)
    assert sampled.ok.tolist() == [True, False]
    assert sampled.token_ids.tolist() == [5, 0]


def test_rows_without_a_token_are_not_ok():
    x, head, params = torch.ones(1, K), torch.full((70, K), float("-inf")), params_for(70)
    zero = torch.zeros(1, dtype=torch.int64)
    assert draw_from_hidden(x, head, zero, zero, params).ok.tolist() == [False]
    assert draw_from_hidden(x[:0], head, zero[:0], zero[:0], params).token_ids.shape == (0,)


def test_blocks_cover_the_vocabulary():
    assert [num_blocks(v) for v in (1, 16, 17, 1024, 1025, 4096, 4097)] == [1, 1, 2, 64, 64, 64, 65]


def test_what_does_not_fit_is_named():
    x, head, params, ids = torch.ones(1, K), torch.ones(70, K), params_for(70), torch.arange(1)
    with pytest.raises(ValueError, match=r"^x: expected at most 64"):
        draw_from_hidden(torch.ones(65, K), head, torch.arange(65), torch.arange(65), params)
    with pytest.raises(ValueError, match=r"^head: expected 80 rows"):
        draw_from_hidden(x, head, ids, ids, params_for(80))
    with pytest.raises(ValueError, match=r"^slots: expected"):
        draw_from_hidden(x, head, ids.int(), ids, params)
