"""The matrix product of a decode step on a GPU: up to 64 rows of x, the weight read once.

`matmul_fused.py` defines it. A program multiplies BLOCK_N rows of the weight by all rows of x over
one split of K (`matmul_plan.py`), and adds in float32. With several splits each program leaves its
sums in scratch and takes a ticket; the one that draws the last adds all of them in ascending order,
its own included, and finishes the tile. Who comes last does not change a bit.

Bits. What a row of x gives depends on the row, the weight and the splits, which the weight's shape
fixes: BLOCK_T, the rows of x in a tile padded to 16, 32 or 64, chooses the instruction's width and
not the order of its sums. `block_t` forces one, to compare.

PDL (programmatic dependent launch, sm_90 and later): the program starts before the kernel in front
of it has ended, asks for its first weights, waits, and only then touches what that kernel wrote or
may still read. The next kernel may start once every program has multiplied.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.configs import UNFUSED, LaunchConfig
from millrace.kernels.matmul_fused import PLAIN, Fusion, LinearOutput, check_linear
from millrace.kernels.matmul_plan import MAX_ROWS, decode_config, split_length
from millrace.kernels.matmul_tile_triton import (
    describe,
    empty_output,
    finish,
    has_tma,
    launch_arguments,
    prefetch,
    product,
)

MIN_BLOCK_T = 16
WIDE_STAGES = 3  # of 64 rows of x: two programs must fit into a multiprocessor's shared memory


@triton.jit(do_not_specialize=["num_rows"])
def decode_kernel(
    x,  # [T, K], or its descriptor
    weight,  # [N, K], or its descriptor
    p_partial,  # f32 [tiles, SPLITS, BLOCK_N, BLOCK_T]
    p_tickets,  # i32 [tiles], zero before and after
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
    PDL: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    i_tile, i_split = tl.program_id(0), tl.program_id(1)
    begin = i_split * SPLIT_LENGTH
    end = tl.minimum(begin + SPLIT_LENGTH, K)
    o_t = tl.arange(0, BLOCK_T)
    if TMA:
        w_rows, x_rows = weight, x
    else:  # rows past the end are the last row again: they are computed and not written
        o_n = tl.minimum(i_tile * BLOCK_N + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        o_row = tl.minimum(o_t, num_rows - 1).to(tl.int64)
        w_rows, x_rows = weight + o_n[:, None] * K, x + o_row[:, None] * stride_x
    if PDL:
        if not TMA:
            prefetch(w_rows, begin, K, BLOCK_K * 2)
        tl.extra.cuda.gdc_wait()
    b_acc = product(
        w_rows, x_rows, i_tile * BLOCK_N, 0, begin, end, K, BLOCK_N, BLOCK_T, BLOCK_K, TMA, UPCAST
    )
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLITS > 1:
        o_nt = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + o_t[None, :]
        p_part = p_partial + i_tile.to(tl.int64) * (SPLITS * BLOCK_N * BLOCK_T) + o_nt
        tl.store(p_part + i_split * (BLOCK_N * BLOCK_T), b_acc)
        tl.debug_barrier()  # every thread has stored, before one of them takes the ticket
        if tl.atomic_add(p_tickets + i_tile, 1, sem="acq_rel") != SPLITS - 1:
            return
        tl.store(p_tickets + i_tile, 0)
        b_acc = tl.load(p_part, cache_modifier=".cg")
        for i_other in tl.static_range(1, SPLITS):
            b_acc += tl.load(p_part + i_other * (BLOCK_N * BLOCK_T), cache_modifier=".cg")
    finish(b_acc, i_tile, o_t, num_rows, epilogue, N, K, BLOCK_N, BLOCK_T)


@dataclass(frozen=True, slots=True)
class Workspace:
    """Scratch for the partial sums of any of a model's weights; all layers share it.

    Allocated once, at its greatest: a captured graph keeps its address. Launches that share it must
    follow one another on one stream. Tickets are zero between launches.
    """

    partial: Tensor  # f32, flat
    tickets: Tensor  # i32, flat

    @classmethod
    def for_weights(cls, weights: Iterable[Tensor]) -> "Workspace":
        """Room for MAX_ROWS rows of x times any of `weights` [N, K], all on one device."""
        partial, tickets, device = 1, 1, torch.device("cpu")
        for weight in weights:
            constants, device = decode_config(weight).constants, weight.device
            tiles = triton.cdiv(weight.shape[0], constants["BLOCK_N"])
            splits = constants["SPLITS"]
            if splits > 1:
                partial = max(partial, tiles * splits * constants["BLOCK_N"] * MAX_ROWS)
                tickets = max(tickets, tiles)
        return cls(
            torch.empty(partial, dtype=torch.float32, device=device),
            torch.zeros(tickets, dtype=torch.int32, device=device),
        )

    def expect(self, partial: int, tickets: int) -> None:
        """ValueError unless this much fits."""
        if self.partial.numel() < partial or self.tickets.numel() < tickets:
            raise ValueError(
                f"workspace: expected at least {partial} partial sums and {tickets} tickets, "
                f"got {self.partial.numel()} and {self.tickets.numel()}"
            )


def decode_options(config: LaunchConfig, block_t: int) -> dict[str, int]:
    """How a product with tiles of `block_t` rows of x is launched, and all that has its bits."""
    stages = min(config.num_stages, WIDE_STAGES) if block_t > 32 else config.num_stages
    return {"num_warps": config.num_warps, "num_stages": stages, **UNFUSED}


def linear_decode(
    x: Tensor,
    weight: Tensor,
    workspace: Workspace,
    fusion: Fusion = PLAIN,
    config: LaunchConfig | None = None,
    block_t: int | None = None,
) -> LinearOutput:
    """`linear_fused_reference` for at most MAX_ROWS rows; x may have any row stride.

    `config` is `decode_config(weight)` where not given; `block_t` forces the padded rows of a tile.
    """
    check_linear(x, weight, fusion)
    rows, (n, k) = x.shape[0], weight.shape
    if rows > MAX_ROWS:
        raise ValueError(f"x: expected at most {MAX_ROWS} rows, got {rows}")
    config = config or decode_config(weight)
    constants = config.constants
    block_n, block_k, splits = constants["BLOCK_N"], constants["BLOCK_K"], constants["SPLITS"]
    block_t = block_t or max(MIN_BLOCK_T, triton.next_power_of_2(rows))
    tiles = triton.cdiv(n, block_n)
    if splits > 1:
        workspace.expect(tiles * splits * block_n * block_t, tiles)
    output = empty_output(x, weight, fusion, block_n)
    if rows == 0:
        return output
    tma = constants["TMA"] != 0 and has_tma(x) and has_tma(weight)
    decode_kernel[(tiles, splits)](
        x=describe(x, block_t, block_k) if tma else x,
        weight=describe(weight, block_n, block_k) if tma else weight,
        p_partial=workspace.partial,
        p_tickets=workspace.tickets,
        SPLITS=splits,
        SPLIT_LENGTH=split_length(k, splits, block_k),
        BLOCK_N=block_n,
        BLOCK_T=block_t,
        BLOCK_K=block_k,
        PDL=constants["PDL"] != 0,
        TMA=tma,
        UPCAST=x.device.type == "cpu",
        **launch_arguments(x, weight, fusion, output),
        **decode_options(config, block_t),
        **({"launch_pdl": True} if constants["PDL"] else {}),
    )
    return output
