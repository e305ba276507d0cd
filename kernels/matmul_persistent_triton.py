"""The matrix product of a prefill on a GPU with the bits of the decode product, for any rows of x.

`matmul_fused.py` defines it. The vendor's library picks a kernel by the number of rows, and with it
an order of summation: a prompt's keys then depend on how it was cut into chunks. Here the order is
that of `matmul_triton.py` whatever the rows: K ascends within a split, splits are added ascending,
a tile's squares by halves (so 128 columns make what two tiles of 64 make). One program does all
splits of its tile one after the other, so nothing goes through scratch. That instructions of
different width round alike is the device's to keep; tests/kernels/gpu compares.

Persistent: there are as many programs as multiprocessors, and each takes every so-manieth tile.
Tiles are ordered in groups of GROUP along the rows of x, so that those at work together share rows
of x and of the weight in the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.configs import UNFUSED, LaunchConfig, launch_config
from millrace.kernels.matmul_fused import PLAIN, Fusion, LinearOutput, check_linear
from millrace.kernels.matmul_plan import (
    SMS,
    decode_config,
    default_stages,
    split_length,
    weight_key,
)
from millrace.kernels.matmul_tile_triton import (
    describe,
    empty_output,
    finish,
    has_tma,
    launch_arguments,
    product_of_splits,
)

CONSTANTS = {"BLOCK_N": 128, "BLOCK_T": 128, "BLOCK_K": 64, "GROUP": 8, "TMA": 1}
CONSTANTS_FLOAT32 = {**CONSTANTS, "BLOCK_N": 64, "BLOCK_T": 64, "BLOCK_K": 32}
"""Without tensor cores a tile's operands live in registers as well."""
NUM_WARPS = 8


@triton.jit(do_not_specialize=["num_rows"])
def persistent_kernel(
    x,  # [T, K], or its descriptor
    weight,  # [N, K], or its descriptor
    epilogue,
    num_rows,
    stride_x,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_LENGTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tiles_n, tiles_t = tl.cdiv(N, BLOCK_N), tl.cdiv(num_rows, BLOCK_T)
    for i_tile in range(tl.program_id(0), tiles_n * tiles_t, tl.num_programs(0)):
        first_t = i_tile // (GROUP * tiles_n) * GROUP
        tiles_in_group = tl.minimum(tiles_t - first_t, GROUP)
        i_in_group = i_tile % (GROUP * tiles_n)
        i_t = first_t + i_in_group % tiles_in_group
        i_n = i_in_group // tiles_in_group
        first_n, first_t = i_n * BLOCK_N, i_t * BLOCK_T
        o_t = first_t + tl.arange(0, BLOCK_T)
        if TMA:
            w_rows, x_rows = weight, x
        else:  # rows past the end are the last row again: they are computed and not written
            o_n = tl.minimum(first_n + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
            o_row = tl.minimum(o_t, num_rows - 1).to(tl.int64)
            w_rows, x_rows = weight + o_n[:, None] * K, x + o_row[:, None] * stride_x
        b_acc = product_of_splits(
            w_rows,
            x_rows,
            first_n,
            first_t,
            K,
            SPLITS,
            SPLIT_LENGTH,
            BLOCK_N,
            BLOCK_T,
            BLOCK_K,
            TMA,
            UPCAST,
        )
        finish(b_acc, i_n, o_t, num_rows, epilogue, N, K, BLOCK_N, BLOCK_T)


def persistent_config(weight: Tensor) -> LaunchConfig:
    """How `linear_persistent` of this weight is launched: its row in configs.json, else default."""
    constants = CONSTANTS_FLOAT32 if weight.dtype == torch.float32 else CONSTANTS
    default = LaunchConfig(NUM_WARPS, default_stages(weight), constants)
    return launch_config("linear_persistent", weight_key(weight), weight.device, default)


def linear_persistent(
    x: Tensor,
    weight: Tensor,
    fusion: Fusion = PLAIN,
    config: LaunchConfig | None = None,
    decode: LaunchConfig | None = None,
) -> LinearOutput:
    """`linear_fused_reference` for any number of rows; x may have any row stride.

    `config` is `persistent_config(weight)` where not given. Splits are those of `decode`, which is
    `decode_config(weight)` where not given.
    """
    check_linear(x, weight, fusion)
    rows, (n, k) = x.shape[0], weight.shape
    config, decode = config or persistent_config(weight), decode or decode_config(weight)
    constants, splits = config.constants, decode.constants["SPLITS"]
    length = split_length(k, splits, decode.constants["BLOCK_K"])
    block_n, block_t, block_k = (constants[f"BLOCK_{letter}"] for letter in "NTK")
    if length % block_k:
        raise ValueError(f"config: expected a BLOCK_K that divides a split of {length}")
    output = empty_output(x, weight, fusion, block_n)
    if rows:
        tma = constants["TMA"] != 0 and has_tma(x) and has_tma(weight)
        tiles = triton.cdiv(n, block_n) * triton.cdiv(rows, block_t)
        persistent_kernel[(min(tiles, _multiprocessors(x.device)),)](
            x=describe(x, block_t, block_k) if tma else x,
            weight=describe(weight, block_n, block_k) if tma else weight,
            SPLITS=splits,
            SPLIT_LENGTH=length,
            BLOCK_N=block_n,
            BLOCK_T=block_t,
            BLOCK_K=block_k,
            GROUP=constants["GROUP"],
            TMA=tma,
            UPCAST=x.device.type == "cpu",
            **launch_arguments(x, weight, fusion, output),
            **config.options,
            **UNFUSED,
        )
    return output


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return SMS
    return torch.cuda.get_device_properties(device).multi_processor_count
