"""A link of the chain that bench_boundary.py times: a kernel that depends on the one before it.

Program i of a link streams its own stretch of a weight and puts what it found on state[i], which
the same program of the link before has left there. So links must run one after the other, and a
link that does not wait gives another state.
"""

import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.matmul_plan import SMS
from millrace.kernels.matmul_tile_triton import prefetch

PROGRAMS = 2 * SMS  # two of a link, and two of the next, are resident at once
TILE = 8192  # elements of a program's step: four loads of 16 bytes in each thread
NUM_WARPS = 8
UNROLL = 2  # steps whose loads are on their way together
DECAY = 0.5  # of the state from link to link: a chain of any length stays in range


@triton.jit
def link_kernel(
    p_weight,  # bf16 [PROGRAMS, LENGTH]
    p_state,  # f32 [PROGRAMS], read and written
    LENGTH: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
    DECAY: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,  # with PDL: the next link may start when this one does
    PREFETCH: tl.constexpr,  # with PDL: elements that are asked for before the wait
):
    i_program = tl.program_id(0)
    p_row = p_weight + i_program.to(tl.int64) * LENGTH
    if PDL:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            prefetch(p_row + tl.zeros([1, 1], tl.int32), 0, LENGTH, PREFETCH)
        tl.extra.cuda.gdc_wait()
    b_sum = tl.zeros([TILE], tl.float32)
    for i_tile in tl.range(0, LENGTH, TILE, loop_unroll_factor=UNROLL):
        b_w = tl.load(p_row + i_tile + tl.arange(0, TILE), eviction_policy="evict_first")
        b_sum += b_w.to(tl.float32)
    if PDL and not EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    state = tl.load(p_state + i_program)
    tl.store(p_state + i_program, state * DECAY + tl.sum(b_sum, axis=0))


def link(
    weight: Tensor, state: Tensor, pdl: bool = False, early: bool = False, prefetched: int = 0
) -> None:
    """One link: weight bf16 [PROGRAMS, LENGTH], LENGTH whole tiles or none; state f32 [PROGRAMS].

    `prefetched` is a power of two of elements, at least 64.
    """
    link_kernel[(state.shape[0],)](
        weight,
        state,
        LENGTH=weight.shape[1],
        TILE=TILE,
        UNROLL=UNROLL,
        DECAY=DECAY,
        PDL=pdl,
        EARLY=early,
        PREFETCH=min(prefetched, weight.shape[1]),
        num_warps=NUM_WARPS,
        **({"launch_pdl": True} if pdl else {}),
    )


def link_reference(weight: Tensor, state: Tensor) -> None:
    """The definition."""
    state.mul_(DECAY).add_(weight.float().sum(dim=1))
