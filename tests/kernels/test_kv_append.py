"""kv_append against transformers' rotation, and against its definition."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from millrace.kernels.attention import KVScales
from millrace.kernels.kv_append import (
    FP8,
    _write_rows_without_waiting,
    kv_append,
    kv_append_reference,
    to_fp8,
)

BLOCKS, BLOCK_SIZE = 7, 16  # of append_case
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def expected_by_transformers(arguments, heads, kv_heads):
    """(q, k, v) [T, heads, D] in float32, by transformers' own functions."""
    head_dim = arguments["k_cache"].shape[-1]
    qkv = arguments["qkv"].view(len(arguments["positions"]), -1, head_dim)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    for name, x in (("q_norm_weight", q), ("k_norm_weight", k)):
        if arguments[name] is not None:
            norm = LlamaRMSNorm(head_dim, eps=1e-6).to(x.dtype)
            norm.weight.data = arguments[name]
            x = norm(x).detach()
        if name[0] == "q":
            q = x
        else:
            k = x
    cos, sin = arguments["cos_sin"][arguments["positions"]].chunk(2, dim=-1)
    cos, sin = torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None]
    q, k = q.float().transpose(0, 1)[None], k.float().transpose(0, 1)[None]
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    return q[0].transpose(0, 1), k[0].transpose(0, 1), v.float()


@pytest.mark.parametrize("form", [kv_append, kv_append_reference])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_query_and_cache_rows_are_those_of_transformers(append_case, form, norm, dtype):
    heads, kv_heads = 6, 2
    arguments = append_case(33, heads, kv_heads, 64, dtype, norm=norm)
    before = arguments["qkv"].clone()
    q = form(**arguments)
    rows = {name: arguments[name].flatten(0, 1) for name in ("k_cache", "v_cache")}
    expected_q, expected_k, expected_v = expected_by_transformers(arguments, heads, kv_heads)
    written = arguments["write_index"]
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(q.float(), expected_q, **tolerance)
    torch.testing.assert_close(rows["k_cache"][written].float(), expected_k, **tolerance)
    assert torch.equal(rows["v_cache"][written].float(), expected_v)
    assert torch.equal(arguments["qkv"], before)
    untouched = torch.ones(BLOCKS * BLOCK_SIZE, dtype=torch.bool)
    untouched[written] = False
    assert rows["k_cache"][untouched].isnan().all() and rows["v_cache"][untouched].isnan().all()


@pytest.mark.parametrize(
    "heads,kv_heads,head_dim", [(1, 1, 2), (9, 3, 64), (4, 4, 80), (8, 1, 128)]
)
@pytest.mark.parametrize("num_tokens", [1, 63])
def test_fast_form_agrees_with_the_definition(append_case, num_tokens, heads, kv_heads, head_dim):
    fast = append_case(num_tokens, heads, kv_heads, head_dim, torch.bfloat16)
    slow = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in fast.items()}
    tolerance = {"rtol": torch.finfo(torch.bfloat16).eps, "atol": 1e-6}  # one step: a fused a*b+c
    torch.testing.assert_close(kv_append(**fast), kv_append_reference(**slow), **tolerance)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(fast[name], slow[name], equal_nan=True, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_a_token_has_the_same_bits_alone_and_among_others(append_case, head_dim, dtype):
    arguments = append_case(33, 6, 2, head_dim, dtype)
    together = kv_append(**arguments)
    for t in range(33):
        one = {name: arguments[name][t : t + 1] for name in ("qkv", "positions", "write_index")}
        k_cache = torch.full_like(arguments["k_cache"], float("nan"))
        alone = kv_append(**{**arguments, **one, "k_cache": k_cache})
        row = arguments["write_index"][t]
        assert torch.equal(alone[0], together[t])
        written = arguments["k_cache"].flatten(0, 1)[row]
        assert torch.equal(k_cache.flatten(0, 1)[row], written)


def test_worked_example_of_the_docstring(append_case):
    """Position 37 of a sequence in blocks (5, 9, 4) is written to block 4, offset 5: row 69."""
    arguments = append_case(1, 1, 1, 4, torch.float32)
    arguments["positions"], arguments["write_index"] = torch.tensor([37]), torch.tensor([69])
    kv_append(**arguments)
    assert torch.equal(arguments["v_cache"][4, 5, 0], arguments["qkv"][0, 8:])


def test_no_tokens_write_nothing(append_case):
    arguments = append_case(0, 3, 1, 8, torch.float32)
    assert kv_append(**arguments).shape == (0, 3, 8)
    assert arguments["k_cache"].isnan().all()


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("qkv", torch.randn(3, 47)),
        ("positions", torch.zeros(2, dtype=torch.int64)),
        ("positions", torch.zeros(3, dtype=torch.int32)),
        ("write_index", torch.zeros(4, dtype=torch.int64)),
        ("cos_sin", torch.zeros(200, 4)),
        ("v_cache", torch.zeros(BLOCKS, BLOCK_SIZE, 1, 4)),
        ("k_cache", torch.zeros(BLOCKS, BLOCK_SIZE, 1, 16)[..., ::2]),
    ],
    ids=lambda value: value if isinstance(value, str) else str(tuple(value.shape)),
)
def test_an_argument_that_does_not_fit_is_named(append_case, name, bad):
    arguments = append_case(3, 4, 1, 8, torch.float32)
    with pytest.raises(ValueError, match=name):
        kv_append(**{**arguments, name: bad})


def test_one_norm_weight_without_the_other_is_refused(append_case):
    arguments = append_case(3, 4, 1, 8, torch.float32)
    with pytest.raises(ValueError, match="k_norm_weight"):
        kv_append(**{**arguments, "q_norm_weight": torch.ones(8)})


def test_a_write_outside_the_cache_raises_and_corrupts_nothing(append_case):
    arguments = append_case(1, 4, 1, 8, torch.float32)
    arguments["write_index"] = torch.tensor([BLOCKS * BLOCK_SIZE])
    with pytest.raises(IndexError):
        kv_append(**arguments)
    assert arguments["k_cache"].isnan().all()


@pytest.mark.parametrize("form", [kv_append, kv_append_reference])
def test_a_padded_token_writes_no_row_and_leaves_the_others_alone(append_case, form):
    arguments = append_case(33, 6, 2, 16, torch.float32)
    alone = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    real = torch.arange(33) % 3 == 1
    for name in ("qkv", "positions", "write_index"):
        alone[name] = alone[name][real]
    arguments["write_index"][~real] = -1
    assert torch.equal(form(**arguments)[real], form(**alone))
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(arguments[name], alone[name], equal_nan=True, rtol=0, atol=0)


def with_fp8_caches(arguments):
    """The same arguments with caches of e4m3 NaN, and scales that differ from head to head."""
    shape = arguments["k_cache"].shape
    scales = [2.0 ** torch.arange(-7, shape[2] - 7) * 1.3 ** torch.arange(shape[2]) for _ in "kv"]
    caches = [torch.full(shape, 0x7F, dtype=torch.uint8).view(FP8) for _ in "kv"]
    fp8 = {"k_cache": caches[0], "v_cache": caches[1], "kv_scales": KVScales(*scales)}
    return arguments | fp8


@pytest.mark.parametrize("form", [kv_append, kv_append_reference])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_fp8_cache_holds_what_a_plain_one_would_rounded_to_e4m3(append_case, form, dtype):
    plain = append_case(33, 6, 2, 16, dtype, norm=True)
    fp8 = with_fp8_caches(plain)
    fp8["write_index"] = plain["write_index"].clone()
    fp8["write_index"][5] = -1
    assert torch.equal(form(**plain), form(**fp8))
    written = fp8["write_index"] >= 0
    rows = plain["write_index"][written]
    for name, scale in (("k_cache", fp8["kv_scales"].key), ("v_cache", fp8["kv_scales"].value)):
        stored = fp8[name].view(torch.uint8).flatten(0, 1)
        expected = to_fp8(plain[name].flatten(0, 1)[rows], scale).view(torch.uint8)
        assert torch.equal(stored[rows], expected)
        stored[rows] = 0x7F
        assert (stored == 0x7F).all(), "nothing else was written"


def test_fp8_rounds_to_the_nearest_and_saturates():
    x = torch.tensor([[1.0, 17.0, 1e6, -torch.inf, 2.0**-10, 3 * 2.0**-10]])  # scaled: halved
    stored = to_fp8(x, torch.tensor([2.0]))
    # 8.5 lies in the middle of 8 and 9; 2^-11 is nearer to 0 than to 2^-9, 3 * 2^-11 is not.
    assert stored.float().tolist() == [[0.5, 8.0, 448.0, -448.0, 0.0, 2.0**-9]]


def test_scales_belong_to_fp8_caches_and_to_their_heads(append_case):
    plain = append_case(3, 4, 2, 8, torch.float32)
    fp8 = with_fp8_caches(plain)
    wrong = KVScales(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="kv_scales: expected with a float8"):
        kv_append(**plain, kv_scales=fp8["kv_scales"])
    with pytest.raises(ValueError, match="kv_scales: expected with a float8"):
        kv_append(**(fp8 | {"kv_scales": None}))
    with pytest.raises(ValueError, match=r"kv_scales\.key: expected \[2\]"):
        kv_append(**(fp8 | {"kv_scales": wrong}))


@pytest.mark.parametrize("real", [[], [4], [0, 2, 3], [0, 1, 2, 3, 4]], ids=str)
def test_a_gpu_s_way_around_padding_writes_the_same_rows(real):
    """Among them row 0, which padding is led to where there is nothing else."""
    rows = torch.randn(5, 2, 8)
    write_index = torch.full((5,), -1)
    write_index[real] = torch.tensor([0, 9, 4, 7, 2])[real]
    cache = torch.randn(12, 2, 8)
    expected = cache.clone()
    expected[write_index[real]] = rows[real]
    _write_rows_without_waiting(cache, write_index, rows)
    assert torch.equal(cache, expected)
    _write_rows_without_waiting(cache, write_index[:0], rows[:0])
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("cache_dtype", [torch.float32, FP8], ids=str)
def test_off_the_cpu_nothing_is_asked_of_the_tensors_values(append_case, cache_dtype):
    """Tensors without memory raise where a value is wanted, as a captured graph would."""
    arguments = append_case(5, 6, 2, 16, torch.float32)
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    if cache_dtype == FP8:
        meta |= {name: meta[name].to(FP8) for name in ("k_cache", "v_cache")}
        meta["kv_scales"] = KVScales(*torch.ones(2, 2, device="meta"))
    assert kv_append(**meta).shape == (5, 6, 16)
