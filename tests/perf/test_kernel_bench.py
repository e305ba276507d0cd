"""Benchmark rows: a speed only behind a passed check, and shares of what was measured."""

import math
import time
from dataclasses import replace

import pytest
import torch

from millrace.perf.kernels import (
    bench_activation,
    bench_attention,
    bench_kv_append,
    bench_matmul,
    bench_norm,
    bench_sampling,
)
from millrace.perf.kernels.case import OURS, Absent, Case, Provider, close_to
from millrace.perf.kernels.ceilings import from_rows
from millrace.perf.kernels.logits import SamplingInputs
from millrace.perf.kernels.sampling_peers import torch_sort
from millrace.perf.kernels.session import Ceilings, Session
from millrace.perf.measure import Timing

CPU = torch.device("cpu")
COPY_RATE, MATMUL_RATE = 1e12, 1e15


@pytest.fixture
def rows():
    """What the session records."""
    return []


@pytest.fixture
def session(rows):
    ceilings = Ceilings(COPY_RATE, MATMUL_RATE, {1 << 20: 1e11, 1 << 30: 1e12})
    return Session(CPU, False, 0, time.monotonic() + 60, rows.append, ceilings)


def double(x):
    return lambda: (2 * x,)


def case_of(**providers):
    return Case(
        kernel="double",
        name="8",
        bytes=1 << 30,
        flops=1 << 40,
        bound="memory",
        goal=0.5,
        make=lambda seed: torch.full((8,), float(seed)),
        make_small=lambda seed: torch.full((3,), float(seed)),
        reference=double,
        providers=providers,
        check=close_to(1e-6),
        axes={"size": 8},
    )


def timed_as(monkeypatch, seconds):
    """Every call takes so long."""
    timing = Timing(1e6 * seconds, 9e5 * seconds, 2e6 * seconds, 1, 5, "graph")
    monkeypatch.setattr(Session, "_time", lambda self, case, provider: timing)


def test_a_row_has_the_share_of_the_copy_bandwidth(session, rows, monkeypatch):
    timed_as(monkeypatch, 4e-3)  # a GiB in 4 ms
    session.measure_all([case_of(millrace=Provider(double))])
    assert rows[0]["status"] == "measured" and rows[0]["ok"] is False
    assert rows[0]["share"] == pytest.approx((1 << 30) / 4e-3 / COPY_RATE)
    assert rows[0]["median_us"] == pytest.approx(4e3)


def test_a_row_bound_by_the_matrix_units_has_a_share_of_those(session, rows, monkeypatch):
    timed_as(monkeypatch, 2e-3)
    session.measure_all([replace(case_of(millrace=Provider(double)), bound="matmul")])
    assert rows[0]["share"] == pytest.approx((1 << 40) / 2e-3 / MATMUL_RATE)
    assert rows[0]["ok"] is True and rows[0]["share_at_size"] is None


def test_only_our_rows_have_goals(session, rows):
    session.measure_all([case_of(millrace=Provider(double), other=Provider(double))])
    assert [row["goal"] for row in rows] == [0.5, None]
    assert rows[1]["ok"] is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda x: lambda: (2.001 * x,), "relative error 0.0005"),
        (lambda x: lambda: (torch.full_like(x, math.nan),), "relative error nan"),
        (lambda x: lambda: (2 * x[1:],), "shape [2], not [3]"),
        (lambda x: lambda: (2 * x, x), "2 outputs in place of 1"),
        (lambda x: lambda: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["value", "NaN", "shape", "outputs", "error"],
)
@pytest.mark.parametrize("name", [OURS, f"{OURS} GEMV", "peer"])
def test_there_is_no_speed_without_a_passed_check(session, rows, capsys, wrong, words, name):
    session.measure_all([case_of(**{name: Provider(wrong)})])
    assert rows[0]["status"] == ("unusable" if name == "peer" else "FAILED")
    assert words in rows[0]["note"]
    assert rows[0]["median_us"] is rows[0]["share"] is rows[0]["ok"] is None
    printed = capsys.readouterr().out
    assert words in printed and " us" not in printed


def test_a_peer_may_have_a_check_of_its_own(session, rows):
    other = Provider(lambda x: lambda: (x,), check=lambda x, got, wanted: "")
    session.measure_all([case_of(peer=other)])
    assert rows[0]["status"] == "measured"


def test_what_is_absent_is_skipped_with_its_reason(session, rows):
    session.measure_all([case_of(peer=Absent("not installed"), millrace=Provider(double))])
    assert (rows[0]["status"], rows[0]["note"]) == ("skipped", "not installed")
    assert rows[1]["status"] == "measured"


def test_a_part_out_of_time_ends_between_two_cases(session, rows):
    session.deadline = time.monotonic() - 1
    session.measure_all([case_of(millrace=Provider(double))])
    assert session.cut and rows == []


def test_a_dry_run_judges_no_goal(session, rows):
    session.dry_run = True
    session.measure_all([case_of(millrace=Provider(double))])
    assert rows[0]["ok"] is None and rows[0]["median_us"] > 0


def test_compiling_runs_our_forms_of_every_nth_case_and_records_nothing(session, rows):
    ran = []

    def noted(name):
        def prepare(x):
            return lambda: ran.append(name)

        return Provider(prepare)

    cases = [case_of(millrace=noted(i), peer=noted("peer")) for i in range(5)]
    session.compiles = (1, 2)
    session.measure_all(cases)
    assert ran == [1, 3] and rows == []


def test_what_does_not_compile_is_left_for_the_measurement(session, rows):
    session.compiles = (0, 1)
    session.measure_all([case_of(millrace=Provider(lambda x: lambda: 1 / 0))])
    assert rows == []


def test_small_copies_have_a_ceiling_of_their_own():
    ceilings = Ceilings(4e12, 1e15, {1 << 20: 1e11, 1 << 24: 1e12, 1 << 32: 4e12})
    assert ceilings.copy_at(1 << 24) == pytest.approx(1e12)
    assert ceilings.copy_at(1 << 22) == pytest.approx(math.sqrt(1e11 * 1e12))
    assert ceilings.copy_at(1 << 19) == pytest.approx(1e11 / 2), "as long as a MiB takes"
    assert ceilings.copy_at(1 << 34) == 4e12


def test_the_ceilings_are_the_best_of_the_run():
    rows = [
        {"name": "copy", "work": 100, "rate_per_s": 3.0},
        {"name": "copy", "work": 100, "rate_per_s": 4.0},
        {"name": "copy", "work": 10, "rate_per_s": 1.0},
        {"name": "matmul", "work": 7, "rate_per_s": 9.0},
    ]
    assert from_rows(rows) == Ceilings(4.0, 9.0, {100: 4.0, 10: 1.0})
    with pytest.raises(RuntimeError, match="were not measured"):
        from_rows(rows[:3])


@pytest.fixture
def interpreted(monkeypatch):
    """The table of Triton kernels may be asked for here; no kernel is run."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


BENCHES = (
    bench_activation,
    bench_attention,
    bench_kv_append,
    bench_matmul,
    bench_norm,
)


@pytest.mark.parametrize("bench", BENCHES, ids=lambda bench: bench.__name__.rpartition("_")[2])
def test_every_case_has_a_name_of_its_own_and_work_to_do(interpreted, bench):
    cases = list(bench.cases(CPU, dry_run=False))
    assert len({(case.kernel, case.name) for case in cases}) == len(cases)
    for case in cases:
        assert case.bytes > 0 and OURS in case.providers
        assert case.goal or case.kernel == "persistent matmul"  # its goal is beside cuBLAS
        assert case.bound == "memory" or case.flops > 0


def test_equal_seeds_make_equal_inputs(interpreted):
    """The check runs a kernel and the reference on inputs made twice."""
    for bench in (*BENCHES, bench_sampling):
        case = next(iter(bench.cases(CPU, dry_run=True)))
        first, second = (case.reference(case.make_small(7))() for _ in range(2))
        assert close_to(0.0)(None, first, second) == ""
        other = case.reference(case.make_small(8))()
        assert close_to(0.0)(None, first, other) != ""


@pytest.mark.parametrize(("mode", "rank"), [("plain", 90), ("top-k top-p", 60), ("top-p", 90)])
def test_a_samplers_token_must_be_among_those_kept(mode, rank):
    """Of 100 tokens whose masses halve: rank 60 is behind top-k, rank 90 behind top-p as well."""
    values = next(m for m in bench_sampling.MODES if m.name == mode)
    logits = -torch.arange(100.0).unsqueeze(0) * math.log(2)
    inputs = SamplingInputs(logits, torch.zeros(1), torch.zeros(1), None, values)
    check = torch_sort().check
    assert check(inputs, (torch.tensor([0]),), ()) == ""
    wrong = check(inputs, (torch.tensor([rank]),), ())
    assert (wrong == "") == (mode == "plain")


def test_bytes_are_those_of_keys_values_queries_and_results(interpreted):
    case = next(c for c in bench_attention.cases(CPU, dry_run=False) if c.name == "decode b8 c4096")
    assert case.bytes == 2 * 8 * (4096 * 8 + 32) * 128 * 2
    assert case.flops == 4 * 8 * 4096 * 32 * 128


def test_a_window_hides_what_lies_before_it(interpreted):
    case = next(c for c in bench_attention.cases(CPU, dry_run=False) if "window" in c.name)
    assert case.bytes == 2 * 32 * (4096 * 8 + 16) * 256 * 2
