"""The matrix product of one to four rows of x on a GPU: dot products without tensor cores.

`matmul_fused.py` defines it. A program reads BLOCK_N rows of the weight once, all of K, and
multiplies them by every row of x in float32: each thread adds up its own columns, in ascending
order, and the threads' sums are added at the end. Few rows of the weight a program make a grid that
fills the device without splits: 2048 rows are 512 programs.

The work grows with the rows of x, and the order of the sums is not that of the tensor cores: a row
does not have the bits that `matmul_triton.py` gives it. So this form is for where the table of
`linear_choice.py` measured it faster, and never for deterministic serving.

PDL is as in `matmul_triton.py`.
"""

import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.configs import LaunchConfig, launch_config
from millrace.kernels.matmul_fused import PLAIN, Fusion, LinearOutput, check_linear
from millrace.kernels.matmul_plan import weight_key
from millrace.kernels.matmul_tile_triton import empty_output, finish, launch_arguments, prefetch

MAX_GEMV_ROWS = 4
NUM_WARPS = 4
LOAD_BYTES = 16  # of a thread, at once


@triton.jit(do_not_specialize=["num_rows"])
def gemv_kernel(
    p_x,  # [T, K]
    p_weight,  # [N, K]
    epilogue,
    num_rows,
    stride_x,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,  # steps whose loads are on their way together
    PDL: tl.constexpr,
):
    i_tile = tl.program_id(0)
    # Rows past the end are the last row again: they are computed and not written.
    o_n = tl.minimum(i_tile * BLOCK_N + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
    o_t = tl.arange(0, BLOCK_T)
    p_w = p_weight + o_n[:, None, None] * K
    p_row = p_x + tl.minimum(o_t, num_rows - 1).to(tl.int64)[None, :, None] * stride_x
    if PDL:
        prefetch(p_weight + o_n[:, None] * K, 0, K, BLOCK_K * 2)
        tl.extra.cuda.gdc_wait()
    b_acc = tl.zeros([BLOCK_N, BLOCK_T, BLOCK_K], tl.float32)
    for i_k in tl.range(0, K, BLOCK_K, loop_unroll_factor=UNROLL):
        o_k = i_k + tl.arange(0, BLOCK_K)[None, None, :]
        if K % BLOCK_K == 0:
            b_w = tl.load(p_w + o_k, eviction_policy="evict_first")
            b_x = tl.load(p_row + o_k)
        else:
            b_w = tl.load(p_w + o_k, mask=o_k < K, other=0.0, eviction_policy="evict_first")
            b_x = tl.load(p_row + o_k, mask=o_k < K, other=0.0)
        b_acc += b_w.to(tl.float32) * b_x.to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    finish(tl.sum(b_acc, axis=2), i_tile, o_t, num_rows, epilogue, N, K, BLOCK_N, BLOCK_T)


def gemv_config(weight: Tensor) -> LaunchConfig:
    """How `linear_gemv` of this weight is launched: its row in configs.json, else the default."""
    default = default_gemv_config(weight.element_size())
    return launch_config("linear_gemv", weight_key(weight), weight.device, default)


def default_gemv_config(element_size: int) -> LaunchConfig:
    """A step is one load a thread: x then lies in the same threads as the weight, and no step needs
    a barrier."""
    block_k = NUM_WARPS * 32 * LOAD_BYTES // element_size
    constants = {"BLOCK_N": 4, "BLOCK_K": block_k, "UNROLL": 2, "PDL": 0}
    return LaunchConfig(NUM_WARPS, num_stages=1, constants=constants)


def linear_gemv(
    x: Tensor, weight: Tensor, fusion: Fusion = PLAIN, config: LaunchConfig | None = None
) -> LinearOutput:
    """`linear_fused_reference` for at most MAX_GEMV_ROWS rows; x may have any row stride.

    `config` is `gemv_config(weight)` where not given.
    """
    check_linear(x, weight, fusion)
    rows, n = x.shape[0], weight.shape[0]
    if rows > MAX_GEMV_ROWS:
        raise ValueError(f"x: expected at most {MAX_GEMV_ROWS} rows, got {rows}")
    config = config or gemv_config(weight)
    block_n, pdl = config.constants["BLOCK_N"], config.constants["PDL"] != 0
    output = empty_output(x, weight, fusion, block_n)
    if rows:
        gemv_kernel[(triton.cdiv(n, block_n),)](
            p_x=x,
            p_weight=weight,
            BLOCK_N=block_n,
            BLOCK_T=triton.next_power_of_2(rows),
            BLOCK_K=config.constants["BLOCK_K"],
            UNROLL=config.constants["UNROLL"],
            PDL=pdl,
            **launch_arguments(x, weight, fusion, output),
            **config.options,
            **({"launch_pdl": True} if pdl else {}),
        )
    return output
