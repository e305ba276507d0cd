"""What the matrix-product kernels share: a product over a range of K, and the end of a tile.

`matmul_fused.py` has the formulas. Weights are the left operand: a tile is [BLOCK_N rows of the
weight, BLOCK_T rows of x]. A tensor core's instruction takes 64 rows on its left but as few as 8 on
its right, so it is the weight, of which there is plenty, that goes left.

The order of every sum is written down: K ascends in steps, splits ascend, and columns are added by
halves (`ordered_sum`), never by tl.sum, whose order follows the tile's layout and so BLOCK_T.

TMA (sm_90 and later): tiles are copied by the tensor memory accelerator, which takes a descriptor
of the matrix where threads would compute an address for each 16 bytes. It needs rows that begin at
multiples of 16 bytes. The bits are the same with and without.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from millrace.kernels.matmul_fused import Fusion, LinearOutput

TMA_ALIGN = 16  # bytes
TMA_SINCE = (9, 0)  # compute capability


class Epilogue(NamedTuple):
    """Where a product's result goes and what is folded into it: one argument of each kernel.

    A launch fills it with values, `aot/` with the names of their types. None: not there, and then
    nothing that would need it is compiled.
    """

    eps: Any  # float
    p_y: Any  # [T, N], or [T, N / 2]
    p_bias: Any  # [N] or None
    p_norm_squares: Any  # f32 [T, NORM_TILES] or None
    p_residual: Any  # [T, N] or None
    p_gamma: Any  # [N] or None
    p_scaled: Any  # [T, N] or None
    p_squares: Any  # f32 [T, tiles] or None
    NORM_TILES: tl.constexpr
    SILU_MUL: tl.constexpr


@triton.jit
def prefetch(p_w, begin, K: tl.constexpr, LENGTH: tl.constexpr):
    """Ask the L2 cache for LENGTH columns of rows p_w [BLOCK_N, 1], a line of 128 bytes at a time.

    NVIDIA's alone: behind PDL, which the interpreter never sees.
    """
    LINE: tl.constexpr = 128 * 8 // p_w.dtype.element_ty.primitive_bitwidth
    o_line = begin + tl.arange(0, LENGTH // LINE) * LINE
    p_line = p_w + tl.minimum(o_line, K - 1)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [p_line],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def product(
    w,  # pointers to the rows of the weight, [BLOCK_N, 1]; or the weight's TMA descriptor
    x,  # pointers to the rows of x, [BLOCK_T, 1]; or its descriptor
    first_n,  # with descriptors: the first row of each
    first_t,
    begin,
    end,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter multiplies 16-bit floats by other rules
):
    """Sum over begin <= k < end, ascending: f32 [BLOCK_N, BLOCK_T]."""
    b_acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for i_k in range(begin, end, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)[None, :]
        if TMA:
            b_w = w.load([first_n, i_k])  # zeros past the end
            b_x = x.load([first_t, i_k])
        elif K % BLOCK_K == 0:
            b_w = tl.load(w + o_k)
            b_x = tl.load(x + o_k)
        else:
            b_w = tl.load(w + o_k, mask=o_k < K, other=0.0)
            b_x = tl.load(x + o_k, mask=o_k < K, other=0.0)
        if UPCAST:
            b_w = b_w.to(tl.float32)
            b_x = b_x.to(tl.float32)
        b_acc = tl.dot(b_w, tl.trans(b_x), b_acc, input_precision="ieee")
    return b_acc


@triton.jit
def product_of_splits(
    w,
    x,
    first_n,
    first_t,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_LENGTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The whole of K by one program, in the order of a product whose splits run apart."""
    if SPLITS == 1:
        return product(w, x, first_n, first_t, 0, K, K, BLOCK_N, BLOCK_T, BLOCK_K, TMA, UPCAST)
    else:
        b_acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for i_split in range(SPLITS):
            begin = i_split * SPLIT_LENGTH
            end = tl.minimum(begin + SPLIT_LENGTH, K)
            b_acc += product(
                w, x, first_n, first_t, begin, end, K, BLOCK_N, BLOCK_T, BLOCK_K, TMA, UPCAST
            )
        return b_acc


@triton.jit
def ordered_sum(b_x, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """Sum of [ROWS, COUNT] over COUNT, a power of two: neighbours first, whatever the layout."""
    if COUNT == 1:
        return tl.reshape(b_x, (ROWS,))
    else:
        low, high = tl.split(tl.reshape(b_x, (ROWS, COUNT // 2, 2)))
        return ordered_sum(low + high, ROWS, COUNT // 2)


@triton.jit
def inverse_rms(
    p_squares, o_t, m_t, eps, K: tl.constexpr, TILES: tl.constexpr, BLOCK_T: tl.constexpr
):
    """1 / sqrt(sum of squares / K + eps) of rows o_t (i64) of squares f32 [T, TILES]."""
    PADDED: tl.constexpr = triton.next_power_of_2(TILES)
    o_s = tl.arange(0, PADDED)[None, :]
    m_s = m_t[:, None] & (o_s < TILES)
    b_s = tl.load(p_squares + o_t[:, None] * TILES + o_s, mask=m_s, other=0.0)
    return tl.rsqrt(ordered_sum(b_s, BLOCK_T, PADDED) / K + eps)


@triton.jit
def finish(
    b_acc,  # f32 [BLOCK_N, BLOCK_T]
    i_tile,
    o_t,  # rows of x, [BLOCK_T]
    num_rows,
    epilogue,  # an `Epilogue`
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """From the sums of a tile to what is written of it."""
    o_n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n, m_t = o_n < N, o_t < num_rows
    o_t = o_t.to(tl.int64)
    if epilogue.p_norm_squares is not None:
        p_norm, eps = epilogue.p_norm_squares, epilogue.eps
        b_inverse = inverse_rms(p_norm, o_t, m_t, eps, K, epilogue.NORM_TILES, BLOCK_T)
        b_acc *= b_inverse[None, :]
    if epilogue.p_bias is not None:
        b_acc += tl.load(epilogue.p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    b_y = tl.trans(b_acc)  # [BLOCK_T, BLOCK_N]
    if epilogue.SILU_MUL:
        gate, up = tl.split(tl.reshape(b_y, (BLOCK_T, BLOCK_N // 2, 2)))
        o_f = i_tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        b_f = (gate * tl.sigmoid(gate) * up).to(epilogue.p_y.dtype.element_ty)
        m_f = m_t[:, None] & (o_f < N // 2)[None, :]
        tl.store(epilogue.p_y + o_t[:, None] * (N // 2) + o_f[None, :], b_f, mask=m_f)
    else:
        m_y = m_t[:, None] & m_n[None, :]
        o_y = o_t[:, None] * N + o_n[None, :]
        if epilogue.p_residual is not None:
            b_y += tl.load(epilogue.p_residual + o_y, mask=m_y, other=0.0).to(tl.float32)
        b_written = b_y.to(epilogue.p_y.dtype.element_ty)
        tl.store(epilogue.p_y + o_y, b_written, mask=m_y)
        if epilogue.p_residual is not None:
            b_y = tl.where(m_y, b_written.to(tl.float32), 0.0)
            b_gamma = tl.load(epilogue.p_gamma + o_n, mask=m_n, other=0.0).to(tl.float32)
            b_scaled = (b_y * b_gamma[None, :]).to(epilogue.p_scaled.dtype.element_ty)
            tl.store(epilogue.p_scaled + o_y, b_scaled, mask=m_y)
            p_square = epilogue.p_squares + o_t * tl.cdiv(N, BLOCK_N) + i_tile
            tl.store(p_square, ordered_sum(b_y * b_y, BLOCK_T, BLOCK_N), mask=m_t)


def empty_output(x: Tensor, weight: Tensor, fusion: Fusion, block_n: int) -> LinearOutput:
    """The tensors that `finish` writes, with tiles of block_n columns."""
    rows, n = x.shape[0], weight.shape[0]
    y = torch.empty(rows, n // 2 if fusion.silu_mul else n, dtype=x.dtype, device=x.device)
    if fusion.residual is None:
        return LinearOutput(y)
    squares = torch.empty(rows, triton.cdiv(n, block_n), dtype=torch.float32, device=x.device)
    return LinearOutput(y, torch.empty_like(y), squares)


def launch_arguments(
    x: Tensor, weight: Tensor, fusion: Fusion, output: LinearOutput
) -> dict[str, int | Epilogue]:
    """What each of the kernels takes under the same name: the sizes, and what `finish` needs."""
    norm = fusion.norm
    return {
        "num_rows": x.shape[0],
        "stride_x": x.stride(0),
        "N": weight.shape[0],
        "K": weight.shape[1],
        "epilogue": Epilogue(
            eps=0.0 if norm is None else norm.eps,
            p_y=output.y,
            p_bias=fusion.bias,
            p_norm_squares=None if norm is None else norm.squares,
            p_residual=fusion.residual,
            p_gamma=fusion.gamma,
            p_scaled=output.scaled,
            p_squares=output.squares,
            NORM_TILES=tl.constexpr(1 if norm is None else norm.squares.shape[1]),
            SILU_MUL=tl.constexpr(fusion.silu_mul),
        ),
    }


def has_tma(matrix: Tensor) -> bool:
    """Whether TMA exists on its device and takes this matrix; the interpreter plays it."""
    device = matrix.device
    if torch.version.hip or (
        device.type == "cuda" and torch.cuda.get_device_capability(device) < TMA_SINCE
    ):
        return False
    row_bytes = matrix.stride(0) * matrix.element_size()
    aligned = row_bytes % TMA_ALIGN == 0 and matrix.data_ptr() % TMA_ALIGN == 0
    return aligned and row_bytes > 0  # an expanded row has a stride of 0


def describe(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What TMA must know to copy tiles [rows, columns] of a matrix."""
    return TensorDescriptor.from_tensor(matrix, [rows, columns])
