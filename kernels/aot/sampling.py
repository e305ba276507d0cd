"""The signatures with which sampling and logprobs are launched."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from millrace.kernels import (
    logprobs_triton,
    sampling_exhaustive_triton,
    sampling_filters_triton,
    sampling_flat_triton,
    sampling_triton,
)
from millrace.kernels.aot.compiler import KernelSpec
from millrace.kernels.rows_triton import Rows

ROWS = Rows(
    p_logits="*bf16",
    p_slots="*i64",
    p_positions="*i64",
    p_scalars="*fp32",
    p_seed="*i64",
    p_bias="*fp32",
    p_has_bias="*u1",
    p_allowed="*i32",
    p_has_bans="*u1",
    p_prompt_seen="*u1",
    p_output_counts="*i32",
    p_has_penalties="*u1",
    p_stop_ids="*i32",
    p_min_position="*i64",
    stride_logits="i32",
    vocab="i32",
)
TYPES: dict[str, Any] = {  # of the arguments that are not *fp32
    "rows": ROWS,
    "p_logits": "*bf16",
    "p_mass": "*i64",
    "p_moments": "*fp64",
    "p_best_id": "*i32",
    "p_note_mass": "*i64",
    "p_total": "*i64",
    "p_groups": "*i32",
    "p_num_groups": "*i32",
    "p_flat": "*i32",
    "p_bins": "*i32",
    "p_fates": "*i8",
    "p_sums": "*i64",
    "p_certain_id": "*i32",
    "p_certain_low": "*i64",
    "p_count": "*i32",
    "p_keys": "*i64",
    "p_token_ids": "*i64",
    "p_ok": "*u1",
    "p_kept": "*i64",
    "p_above": "*i32",
    "p_ranks": "*i64",
    "p_top_ids": "*i64",
    "stride_logits": "i32",
    "tiles": "i32",
    "vocab": "i32",
    "num_top": "i32",
}
CUDA, AMD = ("sm_80", "sm_90", "sm_100"), ("gfx942",)


def _spec(name: str, kernel: Any, options: Mapping[str, int], **constants: Any) -> KernelSpec:
    types: Mapping[str, Any] = {n: TYPES.get(n, "*fp32") for n in kernel.arg_names}
    return KernelSpec(name, kernel, types, constants, options)


def _specs(prefix: str, tiles: int, keys: int) -> tuple[KernelSpec, ...]:
    """The kernels of a row of `tiles` tiles, a power of two, and 1 is specialised."""
    sampling, filters, flat = sampling_triton, sampling_filters_triton, sampling_flat_triton
    logprobs, last = logprobs_triton, sampling_exhaustive_triton
    one = {"tiles": 1} if tiles == 1 else {}
    padded = {"TILES": tiles} | one
    sizes = {"BINS": flat.BINS, "SUMS": flat.SUMS}
    kernels: tuple[tuple[str, Any, dict[str, int], dict[str, Any]], ...] = (
        ("stats", sampling.stats_kernel, sampling.STATS_OPTIONS, {"SCORED": False} | one),
        ("stats, scored", sampling.stats_kernel, sampling.SCORED_OPTIONS, {"SCORED": True} | one),
        ("gather", filters.gather_kernel, sampling.GATHER_OPTIONS, {}),
        ("finish", filters.finish_kernel, sampling.FINISH_OPTIONS, sizes | padded),
        ("count", flat.count_kernel, sampling.FLAT_OPTIONS, one),
        ("bracket", flat.bracket_kernel, sampling.BRACKET_OPTIONS, {}),
        ("sift", flat.sift_kernel, sampling.FLAT_OPTIONS, one),
        ("settle", flat.settle_kernel, sampling.SETTLE_OPTIONS, padded),
        ("exhaust", last.exhaust_kernel, last.EXHAUST_OPTIONS, {}),
        ("raw tile", logprobs.raw_tile_kernel, logprobs.OPTIONS, one),
        ("part", logprobs.part_kernel, logprobs.PART_OPTIONS, one),
        ("merge", logprobs.merge_kernel, logprobs.OPTIONS, {"KEYS": keys} | padded),
    )
    everywhere = (
        _spec(f"{prefix} {name}", kernel, options, **constants)
        for name, kernel, options, constants in kernels
        if tiles > 1 or "tiles" in constants  # else nothing is specialised
    )
    return (*everywhere, *_by_vendor(prefix, padded))


def _by_vendor(prefix: str, padded: Mapping[str, int]) -> Iterator[KernelSpec]:
    """Those whose warps hold a row's group maxima: of a warp, AMD's registers are twice as many."""
    for amd, targets, vendor in ((False, CUDA, ""), (True, AMD, " AMD")):
        options = sampling_filters_triton.bound_options(padded["TILES"], amd)
        bound = _spec(f"{prefix} bound", sampling_filters_triton.bound_kernel, options, **padded)
        options = logprobs_triton.pick_options(padded["TILES"], amd)
        pick = _spec(f"{prefix} pick", logprobs_triton.pick_kernel, options, **padded)
        for spec in (bound, pick):
            yield replace(spec, name=spec.name + vendor, targets=targets)


SPECS = (*_specs("sampling", tiles=64, keys=4096), *_specs("sampling, one tile,", 1, keys=32))
