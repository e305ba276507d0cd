"""`millrace plan`: what it counts, what it predicts, and that its answers hold together."""

import dataclasses
import json
import math
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from millrace.engine.cli.app import app
from millrace.engine.config import EngineConfig
from millrace.engine.core.build import build_scheduler, limits_of
from millrace.engine.errors import InvalidRequest, NotEnoughMemory, UnsupportedModel
from millrace.engine.runner.sizes import sizes_for
from millrace.perf.capacity.cost import Assumptions, Roofline, fit, load_measured
from millrace.perf.capacity.hardware import gpu_named
from millrace.perf.capacity.latencies import Latencies, Objectives
from millrace.perf.capacity.plan import Asked, make_plan
from millrace.perf.capacity.search import PRECISION, Question
from millrace.perf.capacity.shape import SHAPES, shape_named
from millrace.perf.capacity.virtual import VirtualServer
from millrace.perf.capacity.workload import Workload
from millrace.perf.plot import curve_chart
from millrace.perf.sim.load import Attended, Load
from millrace.perf.sim.traffic import Lengths
from millrace.scheduler.request import Request

VALIDATION = Path(__file__).resolve().parents[2] / "perf" / "results" / "plan-validation.json"

ASKED = Asked(
    model_shape="llama-3.1-8b",
    gpu="h200",
    measured=None,
    rate=None,
    slo_ttft_ms=30.0,
    slo_itl_ms=50.0,
    attain=0.99,
    trace=None,
    prompt_tokens=256,
    output_tokens=6,
    arrival_cv=None,
    shared_prefix=0,
    kv_dtype="auto",
    requests=60,
    assumed=Assumptions(),
)


# ---------------------------------------------------------------- shapes and memory


def test_a_published_shape_has_its_published_size():
    shape = shape_named("Llama-3.1-8B")
    assert shape.elements == pytest.approx(8.03e9, rel=0.001)
    assert 2 * shape.kv_elements_per_token == 128 * 1024
    assert shape_named("smollm2-135m").elements == pytest.approx(134.5e6, rel=0.001)


def test_a_config_file_is_as_good_as_a_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["qwen3-8b"]))
    named = shape_named("qwen3-8b")
    for path in (tmp_path, tmp_path / "config.json"):
        assert dataclasses.replace(shape_named(str(path)), name=named.name) == named


def test_what_is_no_shape_is_refused_by_name(tmp_path):
    with pytest.raises(InvalidRequest, match=r"llama-3\.1-8b") as error:
        shape_named("llama-9")
    assert error.value.field == "model_shape"
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SHAPES["qwen3-8b"] | {"architectures": ["Rwkv"]}))
    with pytest.raises(UnsupportedModel, match="Rwkv"):
        shape_named(str(file))
    with pytest.raises(InvalidRequest, match="h200"):
        gpu_named("h900")


def test_the_cache_gets_what_the_weights_leave():
    plan = make_plan(ASKED, EngineConfig(gpu_memory_fraction=0.9, dtype="bfloat16"))
    limits = plan.question.server.make_scheduler().limits
    left = 0.9 * 141e9 - 2 * shape_named("llama-3.1-8b").elements - 3e9
    assert limits.num_blocks == int(left // (16 * 128 * 1024))
    fp8 = make_plan(dataclasses.replace(ASKED, kv_dtype="fp8"), EngineConfig(dtype="bfloat16"))
    twice = fp8.question.server.make_scheduler().limits.num_blocks
    assert twice == pytest.approx(2 * limits.num_blocks, abs=2)


def test_a_model_that_does_not_fit_is_said_to_need_more():
    with pytest.raises(NotEnoughMemory, match="raise gpu_memory_fraction"):
        make_plan(dataclasses.replace(ASKED, model_shape="llama-3.1-70b"), EngineConfig())


# ---------------------------------------------------------------- costs


def roofline(**assumed: float) -> Roofline:
    shape = shape_named("llama-3.1-8b")
    return Roofline(shape, gpu_named("h100"), 2, 2, Assumptions(**assumed), block_size=16)


def test_a_lone_decode_is_bound_by_the_weights_and_a_long_chunk_by_arithmetic():
    cost = roofline(memory_efficiency=1.0, matmul_efficiency=1.0, step_overhead_s=0.0)
    shape = cost.shape
    read = 2 * (shape.layer_elements + shape.head_elements)
    assert cost(Load(0, 1, 1, 1, 0, 0)) == pytest.approx(read / 3.35e12, rel=0.001)
    chunk = cost(Load(8192, 0, 0, 0, 8192, 8192 * 8193 // 2))
    pairs = shape.attention_flops_per_pair * 8192 * 8193 / 2
    assert chunk == pytest.approx((2 * shape.layer_elements * 8192 + pairs) / 989e12, rel=0.001)


def test_each_kind_of_load_costs_more_of_it():
    cost, load = roofline(), Load(512, 64, 65, 64_000, 512, 131_328)
    for name in ("context_tokens", "prefill_tokens", "prefill_pairs"):
        more = dataclasses.replace(load, **{name: 50 * getattr(load, name)})
        assert cost(more) > cost(load), name


WINDOWED = SHAPES["qwen2.5-7b"] | {"sliding_window": 1024, "use_sliding_window": True}
LONG = 30_000  # tokens of context


def windowed_cost(tmp_path: Path, first_windowed: int) -> Roofline:
    """Of 28 layers, those from `first_windowed` on have a window."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(WINDOWED | {"max_window_layers": first_windowed}))
    return Roofline(shape_named(str(file)), gpu_named("h100"), 2, 2, Assumptions(), 16)


def decodes_s(cost: Roofline, context: int) -> float:
    """A step of 64 decodes."""
    seen = Attended(1024, 64 * min(context, 1024), 0, 0)
    return cost(Load(0, 64, 64, 64 * context, 0, 0, (seen,)))


def test_a_layer_with_a_window_reads_no_more_than_that(tmp_path):
    none, half, all_of_them = (windowed_cost(tmp_path, first) for first in (28, 14, 0))
    assert decodes_s(all_of_them, LONG) == decodes_s(all_of_them, 1024)
    assert decodes_s(none, 1024) == pytest.approx(decodes_s(all_of_them, 1024))
    saved = decodes_s(none, LONG) - decodes_s(all_of_them, LONG)
    assert saved > 0.01
    assert decodes_s(none, LONG) - decodes_s(half, LONG) == pytest.approx(saved / 2)
    assert (all_of_them.shape.window, half.shape.window, none.shape.window) == (1024, None, None)


def test_what_is_swapped_crosses_the_link_to_the_host():
    cost, load = roofline(memory_efficiency=0.5), Load(0, 1, 1, 1, 0, 0)
    moved_s = cost(dataclasses.replace(load, swapped_blocks=3)) - cost(load)
    assert moved_s == pytest.approx(3 * 16 * 128 * 1024 / (0.5 * 64e9))


def a_load(rng: Random) -> Load:
    prefill = rng.choice([0, 0, rng.randint(1, 500)])
    decodes = rng.randint(0, 64)
    return Load(prefill, decodes, decodes, decodes * rng.randint(1, 900), 0, 0)


def test_a_fit_finds_the_costs_and_leaves_stalls_out():
    rng, costs = Random(0), (5e-3, 2e-5, 1e-4, 3e-8)
    loads = [a_load(rng) for _ in range(400)]
    rows = [(1.0, x.prefill_tokens, x.decodes, x.context_tokens) for x in loads]
    times = [
        float(np.dot(costs, row)) * rng.lognormvariate(0.0, 0.05) * rng.choice([1] * 50 + [9])
        for row in rows
    ]
    found, sigma = fit(loads, times)
    assert found[:3] == pytest.approx(costs[:3], rel=0.1)
    assert sigma == pytest.approx(0.05, rel=0.2)


def test_a_fit_has_no_negative_costs():
    """Decodes seem to save time here; and no prefill was seen, of which nothing can be said."""
    loads = [Load(0, n, n, 0, 0, 0) for n in range(1, 20)]
    found, _ = fit(loads, [0.1 - 0.001 * load.decodes for load in loads])
    assert min(found) == 0.0
    assert found[0] == pytest.approx(0.09, rel=0.1)


# ---------------------------------------------------------------- virtual time


def serve(requests: list[Request], run_ahead: int, max_running: int = 4, **settings: object):
    """Steps of a second, on a small server."""
    config = EngineConfig(max_running=max_running, max_step_tokens=64, **settings)
    limits = limits_of(config, sizes_for(config, torch.device("cpu")), 100, 512)
    server = VirtualServer(lambda: build_scheduler(config, limits), lambda load: 1.0, run_ahead)
    return server.run(requests)


def a_request(index: int, arrived_s: float, prompt: int = 10, output: int = 3) -> Request:
    return Request(index, np.full(prompt, index, np.int32), output, arrived_s=arrived_s)


def test_a_request_alone_takes_a_step_a_token():
    run = serve([a_request(0, 5.0)], run_ahead=0)
    assert run.latencies.first_s.tolist() == [6.0]
    assert run.latencies.last_s.tolist() == [8.0]
    assert run.latencies.is_whole.all()


@pytest.mark.parametrize(("run_ahead", "first_s"), [(0, 7.0), (1, 8.0)])
def test_who_comes_while_a_step_runs_waits_for_those_that_are_launched(run_ahead, first_s):
    """The others run from 5.0 on, a step a second; one comes at 5.5."""
    run = serve([a_request(0, 5.0, output=9), a_request(1, 5.5)], run_ahead)
    assert run.latencies.first_s[1] == first_s


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_everyone_is_served_whole_however_many_come_at_once(run_ahead):
    requests = [a_request(index, 0.001 * index, output=5) for index in range(50)]
    run = serve(requests, run_ahead)
    assert run.latencies.is_whole.all()
    assert run.latencies.drawn.tolist() == [5] * 50
    assert run.p95(run.running) == 4
    assert run.mean(run.running) <= 4


def test_refused_requests_are_counted_and_not_good():
    run = serve([a_request(index, 0.0) for index in range(50)], 0, max_waiting=10)
    assert run.refused > 0
    assert run.latencies.attainment(Objectives(1e9, 1e9)) < 1.0


def test_a_request_is_good_if_both_its_times_are():
    latencies = Latencies([0.0, 0.0, 0.0])
    everyone = np.arange(3)
    latencies.drew(everyone[:2], 1.0)
    latencies.drew(everyone[1:], 2.0)
    latencies.drew(everyone, 5.0)
    latencies.is_whole[:] = True
    assert latencies.mean_itl_s.tolist() == [4.0, 2.0, 3.0]
    assert latencies.ttft_s.tolist() == [1.0, 1.0, 2.0]
    assert latencies.attainment(Objectives(1.0, 3.0)) == pytest.approx(1 / 3)
    assert latencies.attainment(Objectives(2.0, 4.0)) == 1.0
    assert latencies.itl().p50 == 3.0


# ---------------------------------------------------------------- answers


CONFIG = EngineConfig(seed=1, max_context=1024, max_running=64, max_step_tokens=512)


def question(**changes: object) -> Question:
    return make_plan(dataclasses.replace(ASKED, **changes), CONFIG).question


@pytest.fixture(scope="module")
def attainable() -> float:
    return question().attainable_rate()


def test_the_attainable_rate_is_the_last_that_attains(attainable):
    asked = question()
    assert asked.at(attainable).attainment >= 0.99
    assert asked.at(1.3 * attainable).attainment < 0.99


def test_the_same_question_has_the_same_answer():
    assert question().at(20.0) == question().at(20.0)


def test_less_is_attained_where_more_is_asked(attainable):
    assert question(slo_ttft_ms=15.0).at(attainable).attainment < 0.99
    assert question(gpu="a100").at(attainable).attainment < 0.99
    assert question(prompt_tokens=512).at(attainable).attainment < 0.99
    assert question(shared_prefix=192).at(attainable * PRECISION**2).attainment >= 0.99


def test_no_more_is_attainable_than_is_sustained():
    """Sixty requests would all be in time at any rate."""
    asked = question(slo_ttft_ms=1e6, slo_itl_ms=1e6)
    assert asked.attainable_rate() == asked.sustained_rate()


def test_nothing_is_attainable_faster_than_a_step():
    asked = dataclasses.replace(question(slo_itl_ms=0.1), workload=small_workload(100))
    assert asked.attainable_rate() == 0.0


def small_workload(count: int) -> Workload:
    return Workload(Lengths.fixed(8), Lengths.fixed(2), 1.0, count, 100)


def test_rates_share_their_requests():
    """Only the times differ, and only by the rate."""
    workload = Workload(Lengths(3.0, 1.0), Lengths(2.0, 1.0), 2.0, 50, 200, seed=4)
    slow, fast = workload.requests(1.0), workload.requests(4.0)
    for one, other in zip(slow, fast, strict=True):
        assert one.arrived_s == pytest.approx(4.0 * other.arrived_s)
        assert one.prompt.tolist() == other.prompt.tolist()
        assert one.max_tokens == other.max_tokens
        assert one.max_length <= 200


def test_blocks_behind_the_window_go_back(tmp_path):
    """Prompts of seven windows: with room for 20,000 tokens, two run, or six."""
    settings = EngineConfig(kv_cache_memory=20_000 * 128 * 1024, max_step_tokens=512)
    plain = SHAPES["mistral-7b-v0.1"] | {"sliding_window": None}
    windowed = plain | {"sliding_window": 1024}
    answers = []
    for index, config in enumerate((plain, windowed)):
        file = tmp_path / f"{index}.json"
        file.write_text(json.dumps(config))
        asked = dataclasses.replace(
            ASKED, model_shape=str(file), requests=30, prompt_tokens=7168, output_tokens=64
        )
        plan = make_plan(asked, settings)
        assert any("blocks behind it go back" in line for line in plan.basis) is bool(index)
        answers.append(plan.question.at(1e3))
    assert answers[0].running_p95 == 2
    assert answers[1].running_p95 >= 6
    assert answers[1].tokens_per_s > answers[0].tokens_per_s


def test_a_server_that_swaps_pays_for_it_and_is_said_to():
    """Too little KV for those that run: some yield, and a copy is cheaper than computing again."""
    asked = dataclasses.replace(ASKED, requests=30, prompt_tokens=512, output_tokens=200)
    little = {"kv_cache_memory": 4_000 * 128 * 1024, "prefix_caching": False}
    plain = make_plan(asked, EngineConfig(**little)).question.at(1e3)
    plan = make_plan(asked, EngineConfig(**little, swap_memory=10**10))
    swapping = plan.question.at(1e3)
    assert plain.preemptions > 0 and plain.swapped_blocks == 0
    assert swapping.swapped_blocks > 0
    assert any(line.startswith("Swap: 4768 blocks") for line in plan.basis)


# ---------------------------------------------------------------- measured files, the command


def test_the_committed_validation_is_a_measured_file_that_can_be_planned_with():
    measured = load_measured(VALIDATION)
    assert measured.num_steps > 100
    plan = make_plan(dataclasses.replace(ASKED, measured=VALIDATION), EngineConfig())
    assert "SmolLM2" in plan.basis[0]
    assert math.isfinite(plan.question.sustained_rate())


@pytest.mark.parametrize("text", ["", "[]", '{"measured": {}}', '{"measured": {"costs_s": 3}}'])
def test_a_file_that_is_no_measurement_is_refused(tmp_path, text):
    file = tmp_path / "measured.json"
    file.write_text(text)
    with pytest.raises(InvalidRequest, match="measured file"):
        load_measured(file)


def plan_command(*options: str):
    return CliRunner().invoke(app, ["plan", "--requests", "100", *options])


def test_the_command_answers_draws_and_writes(tmp_path):
    plot, answer = tmp_path / "goodput.svg", tmp_path / "answer.json"
    objectives = ("--slo-ttft", "500", "--slo-itl", "30", "--output-tokens", "4")
    files = ("--plot", str(plot), "--json", str(answer))
    done = plan_command(
        "--model-shape", "llama-3.1-8b", "--gpu", "h200", "--rate", "5", *objectives, *files
    )
    assert done.exit_code == 0, done.output
    assert "Attainable:" in done.output
    assert "5 requests/s meets it" in done.output
    assert "not measured" in done.output
    assert plot.read_text().startswith("<svg")
    found = json.loads(answer.read_text())
    assert found["answers"][1]["rate"] == 5.0
    assert len(found["curve"]) > 5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--gpu", "h200"), "model-shape"),
        (("--gpu", "h900", "--model-shape", "llama-3.1-8b"), "h900"),
        (("--gpu", "h200", "--model-shape", "llama-3.1-8b", "--trace", "x"), "azure-code"),
        (("--gpu", "h200", "--model-shape", "llama-3.1-8b", "--kv-dtype", "int3"), "kv_dtype"),
    ],
)
def test_the_command_refuses_by_name(options, named):
    done = plan_command("--slo-ttft", "500", "--slo-itl", "30", *options)
    assert done.exit_code == 2
    assert named in done.output


def test_a_chart_holds_its_points():
    text = curve_chart("T", "x", "y", {"one": [(0.5, 3.0), (7.0, 19.0)]})
    assert text.count("<circle") == 2
    assert ">20<" in text
    assert ">8<" in text
