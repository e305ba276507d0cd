"""kv_append in Triton against its definition; caches and outputs start as NaN."""

import pytest
import torch

from millrace.kernels.attention import KVScales
from millrace.kernels.kv_append import FP8, kv_append_reference, to_fp8
from millrace.kernels.kv_append_triton import kv_append

# A fused a * b + c is a step of the dtype away; bf16 here: the interpreter truncates, up to three
# times with a norm, where the reference rounds. A rotation adds what may cancel: hence the atol.
STEPS = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 4}
FP8_NAN = 0x7F


def copied(arguments):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def assert_is_defined_append(arguments):
    expected = copied(arguments)
    dtype = arguments["qkv"].dtype
    step = STEPS[dtype] * torch.finfo(dtype).eps
    tolerance = {"rtol": step, "atol": 2 * step, "equal_nan": True}
    before = arguments["qkv"].clone()
    q, expected_q = kv_append(**arguments), kv_append_reference(**expected)
    torch.testing.assert_close(q, expected_q, **tolerance)
    torch.testing.assert_close(arguments["k_cache"], expected["k_cache"], **tolerance)
    torch.testing.assert_close(  # copied, bit by bit
        arguments["v_cache"], expected["v_cache"], rtol=0, atol=0, equal_nan=True
    )
    assert torch.equal(arguments["qkv"], before)


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("dtype", STEPS, ids=str)
def test_query_and_cache_rows_are_the_defined_ones(append_case, norm, dtype):
    assert_is_defined_append(append_case(17, 6, 2, 64, dtype, norm=norm))


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [
        (1, 1, 2),
        (9, 3, 64),
        (4, 4, 80),
        (6, 2, 96),
        (5, 1, 128),
        (18, 9, 128),  # several programs for q, several for k and v
        (10, 5, 256),
        (3, 1, 6),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_head_shapes(append_case, num_tokens, heads, kv_heads, head_dim, norm):
    assert_is_defined_append(
        append_case(num_tokens, heads, kv_heads, head_dim, torch.float32, norm=norm)
    )


@pytest.mark.parametrize("dtype", STEPS, ids=str)
def test_a_token_has_the_same_bits_alone_and_among_others(append_case, dtype):
    arguments = append_case(17, 18, 9, 80, dtype, norm=True)
    together = kv_append(**arguments)
    for start, stop in ((0, 1), (16, 17), (7, 10)):
        part = {n: arguments[n][start:stop] for n in ("qkv", "positions", "write_index")}
        k_cache = torch.full_like(arguments["k_cache"], float("nan"))
        assert torch.equal(
            kv_append(**(arguments | part | {"k_cache": k_cache})), together[start:stop]
        )
        rows = part["write_index"]
        written = arguments["k_cache"].flatten(0, 1)[rows]
        assert torch.equal(k_cache.flatten(0, 1)[rows], written)


@pytest.mark.usefixtures("guarded_outputs")
def test_a_padded_token_writes_no_row_and_leaves_the_others_alone(append_case):
    arguments = append_case(17, 6, 2, 16, torch.float32, norm=True)
    real = torch.arange(17) % 3 == 1
    alone = copied(arguments) | {
        name: arguments[name][real] for name in ("qkv", "positions", "write_index")
    }
    arguments["write_index"][~real] = -1
    q = kv_append(**arguments)
    assert torch.equal(q[real], kv_append(**alone)) and q.isfinite().all()
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(arguments[name], alone[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("dtype", STEPS, ids=str)
def test_an_fp8_cache_holds_what_a_plain_one_would_rounded_to_e4m3(append_case, dtype, norm):
    plain = append_case(9, 6, 3, 80, dtype, norm=norm)
    scales = KVScales(torch.tensor([0.01, 0.3, 2.0]), torch.tensor([1.0, 0.004, 0.7]))
    shape = plain["k_cache"].shape
    caches = [torch.full(shape, FP8_NAN, dtype=torch.uint8).view(FP8) for _ in "kv"]
    fp8 = copied(plain) | {"k_cache": caches[0], "v_cache": caches[1], "kv_scales": scales}
    fp8["write_index"][5] = -1
    assert torch.equal(kv_append(**plain), kv_append(**fp8))
    rows = plain["write_index"][fp8["write_index"] >= 0]
    for name, scale in (("k_cache", scales.key), ("v_cache", scales.value)):
        stored = fp8[name].view(torch.uint8).flatten(0, 1)
        expected = to_fp8(plain[name].flatten(0, 1)[rows], scale).view(torch.uint8)
        assert torch.equal(stored[rows], expected)
        stored[rows] = FP8_NAN
        assert (stored == FP8_NAN).all(), "nothing else was written"


@pytest.mark.usefixtures("guarded_outputs")
def test_rows_of_a_wider_qkv_are_read_where_they_lie(append_case):
    arguments = append_case(5, 4, 2, 24, torch.float32)
    wide = torch.full((5, 300), float("nan"))
    wide[:, 32 : 32 + 192] = arguments["qkv"]
    arguments["qkv"] = wide[:, 32 : 32 + 192]
    contiguous = copied(arguments) | {"qkv": arguments["qkv"].contiguous()}
    assert torch.equal(kv_append(**arguments), kv_append(**contiguous))
    assert_is_defined_append(contiguous)


def test_no_tokens_write_nothing(append_case):
    arguments = append_case(0, 3, 1, 8, torch.float32)
    assert kv_append(**arguments).shape == (0, 3, 8)
    assert arguments["k_cache"].isnan().all()


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("qkv", torch.randn(3, 47)),
        ("qkv", torch.randn(3, 96)[:, ::2]),
        ("positions", torch.zeros(3, dtype=torch.int32)),
        ("write_index", torch.zeros(4, dtype=torch.int64)),
        ("cos_sin", torch.zeros(200, 4)),
        ("v_cache", torch.zeros(7, 16, 1, 4)),
        ("k_cache", torch.zeros(7, 16, 1, 8, dtype=torch.float16)),
        ("k_norm_weight", torch.ones(8)),
        ("kv_scales", KVScales(torch.ones(1), torch.ones(1))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_argument_that_does_not_fit_is_named(append_case, name, bad):
    arguments = append_case(3, 4, 1, 8, torch.float32)
    with pytest.raises(ValueError, match=name):
        kv_append(**(arguments | {name: bad}))
