"""What the boundary between two Triton kernels in a CUDA graph costs, and what takes it away.

A chain of links (link_triton.py), each of which streams a weight of its own from a cold cache and
needs what the link before it wrote. A row is the time of one link in a long chain. Without bytes it
is the boundary alone; with bytes, the last rows fit time = boundary + bytes / rate to the sizes, so
that their time is the boundary and their share the rate of the stream between boundaries.

    millrace                      the next link starts when all of this one has ended
    millrace PDL                  programmatic dependent launch: it starts once every program has
                                  read its weight, and waits
    millrace PDL early            it starts as soon as every program of this one has started
    millrace PDL prefetch         as PDL, and before it waits it asks the L2 cache for the first
                                  32 KiB of each program's weight
    millrace PDL early prefetch   both

To compare with: a decode step of k kernels that streams at 0.97 of the roof's rate is within g
times the roof if a boundary takes (g - 1 / 0.97) * roof / k at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import linear_regression

import torch
from torch import Tensor

from millrace.perf.kernels.case import OURS, Absent, Call, Case, Outputs, Provider, Row, close_to
from millrace.perf.kernels.link_triton import PROGRAMS, TILE, link, link_reference
from millrace.perf.kernels.session import Session, line_of

TILES = (0, 1, 2, 4, 8)  # of a program: links of 0 to 35 MB; Llama 8B's o projection has 34 MB
DRY_TILES, DRY_PROGRAMS = (0, 1, 2), 2
LINKS_OF_CHECK = 100
PREFETCHED = 16384  # elements of bf16: 32 KiB
PDL_SINCE = (9, 0)  # compute capability
TOLERANCE = 1e-5  # float32 sums in another order
VARIANTS = {  # name: (PDL, early, prefetched)
    "": (False, False, 0),
    " PDL": (True, False, 0),
    " PDL early": (True, True, 0),
    " PDL prefetch": (True, False, PREFETCHED),
    " PDL early prefetch": (True, True, PREFETCHED),
}


@dataclass(frozen=True, slots=True)
class Inputs:
    weight: Tensor  # bf16 [programs, length]
    state: Tensor  # f32 [programs], of the whole chain
    links: int  # of one call


def run(session: Session) -> None:
    assert session.ceilings is not None, "the suite measures the ceilings first"
    rows = session.measure_all(cases(session.device, session.dry_run))
    for row in boundaries(rows, session.ceilings.copy_bytes_per_s):
        print(line_of(row), flush=True)
        session.record(asdict(row))


def cases(device: torch.device, dry_run: bool) -> Iterator[Case]:
    programs, tiles = (DRY_PROGRAMS, DRY_TILES) if dry_run else (PROGRAMS, TILES)
    state = torch.zeros(programs, device=device)  # one for all links that are timed
    for count in tiles:
        size = programs * count * TILE * torch.bfloat16.itemsize
        make = partial(_inputs, programs, count * TILE, device)
        yield Case(
            kernel="boundary",
            name=f"link of {size / 1e6:.2f} MB",
            bytes=size + 2 * programs * torch.float32.itemsize,
            flops=programs * count * TILE,
            bound="memory",
            goal=None,
            make=partial(make, state, 1),
            make_small=partial(make, None, 2 if dry_run else LINKS_OF_CHECK),
            reference=_reference,
            providers={OURS + name: _provider(device, *how) for name, how in VARIANTS.items()},
            check=close_to(TOLERANCE),
            axes={"bytes": size},
        )


def _inputs(
    programs: int, length: int, device: torch.device, state: Tensor | None, links: int, seed: int
) -> Inputs:
    random = torch.Generator(device).manual_seed(seed)
    weight = torch.empty(programs, length, dtype=torch.bfloat16, device=device)
    weight.normal_(generator=random)
    if state is None:
        state = torch.empty(programs, device=device).normal_(generator=random)
    return Inputs(weight, state, links)


def _provider(device: torch.device, pdl: bool, early: bool, prefetched: int) -> Provider | Absent:
    if pdl and (
        device.type != "cuda"
        or torch.version.hip
        or torch.cuda.get_device_capability(device) < PDL_SINCE
    ):
        return Absent("needs an NVIDIA GPU of compute capability 9.0")

    def prepare(x: Inputs) -> Call:
        def call() -> Outputs:
            for _ in range(x.links):
                link(x.weight, x.state, pdl, early, prefetched)
            return (x.state,)

        return call

    return Provider(prepare)


def _reference(x: Inputs) -> Call:
    def call() -> Outputs:
        for _ in range(x.links):
            link_reference(x.weight, x.state)
        return (x.state,)

    return call


def boundaries(rows: Sequence[Row], copy_bytes_per_s: float) -> Iterator[Row]:
    """For each provider a row with the time of no bytes, fitted to its links with bytes."""
    for name in dict.fromkeys(row.provider for row in rows):
        timed = [
            row
            for row in rows
            if row.provider == name and row.median_us is not None and row.axes["bytes"]
        ]
        if len(timed) < 2:
            continue
        sizes, times_us = (
            [row.axes["bytes"] for row in timed],
            [row.median_us or 0 for row in timed],
        )
        us_a_byte, boundary_us = linear_regression(sizes, times_us)
        yield replace(
            timed[0],
            case="boundary, by the fit",
            bytes=0,
            flops=0,
            axes={"bytes": 0},
            median_us=boundary_us,
            p20_us=boundary_us,
            p80_us=boundary_us,
            share=1e6 / us_a_byte / copy_bytes_per_s,
            share_at_size=None,
        )
