"""The end-to-end parts of the GPU suite, on a CPU: the same path with a tiny shape; its sums."""

import time
from contextlib import nullcontext
from dataclasses import fields

import pytest
import torch
import transformers

from millrace.engine.config import EngineConfig
from millrace.engine.weights.checkpoint import open_checkpoint
from millrace.perf.e2e import (
    deterministic,
    drive,
    exactness,
    models,
    one_start,
    peer,
    serve,
    start,
)
from millrace.perf.e2e.exactness import TOLERANCE, Token, compare
from millrace.perf.e2e.one_start import Started, Watch
from millrace.perf.e2e.row import recorded
from millrace.perf.kernels.session import Ceilings, Session, Skip
from millrace.perf.random_model import SHAPES, TINY, RandomCheckpoint, parameters_read, shapes_of
from millrace.perf.results import FAILED, PartResult
from millrace.perf.roofline import decode_work
from millrace.perf.step_trace import Span, idle_of
from millrace.perf.summary import write_summary

CPU = torch.device("cpu")
LONG_S = 600.0


@pytest.fixture
def rows():
    return []


@pytest.fixture
def session(rows, tmp_path):
    """Of a dry run."""
    ceilings = Ceilings(1e10, 1e11, {})
    deadline = time.monotonic() + LONG_S
    return Session(CPU, True, 0, deadline, rows.append, ceilings, folder=tmp_path)


def test_a_model_is_measured_at_each_concurrency_and_beside_the_peer(session, rows, tmp_path):
    models.run_8b(session)
    ends = [(row["name"], row["case"].partition(", ")[2], row["status"]) for row in rows]
    assert ends == [
        ("vllm", "", "skipped"),
        ("sglang", "", "skipped"),
        ("start", "", "measured"),
        ("decode step", "1 at once", "measured"),
        ("decode step", "3 at once", "measured"),
        ("idle between steps", "4 at once", "skipped"),  # a CPU has no queue
        ("transformers", "2 at once", "measured"),
        ("decode step, xformers", "3 at once", "skipped"),
    ]
    for row in rows[3:5]:
        facts = row["facts"]
        assert facts["tokens_per_s"] > 0 and row["goal"] == models.GOALS[models.BIG]
        assert row["value"] == pytest.approx(facts["step_us"] / facts["roof_us"])
        assert row["ok"] is None, "a dry run reaches no goals"
    assert (tmp_path / f"trace-{models.BIG}.json").stat().st_size > 0


def test_a_part_out_of_time_ends_with_what_it_has(session, rows):
    session.deadline = 0.0
    models.run_1b(session)
    assert [row["name"] for row in rows] == ["start"]
    assert session.cut


def test_a_measurement_that_fails_costs_itself_alone(session, rows, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such device\nand a long story")

    monkeypatch.setattr(models, "measure_streams", fail)
    monkeypatch.setattr(peer, "_measure", lambda *_: {"tokens_per_s": 2.0})
    models.run_1b(session)
    failed = [row for row in rows if row["status"] == FAILED]
    assert [row["note"] for row in failed] == ["RuntimeError: no such device"] * 2
    assert rows[-2]["value"] == 2.0


def test_a_package_that_is_missing_is_a_skipped_row(session, rows):
    with recorded(session, "peer", "case"):
        import nowhere_to_be_found  # noqa: F401
    with recorded(session, "peer", "case"):
        raise Skip("not today")
    assert [(row["status"], row["note"]) for row in rows] == [
        ("skipped", "needs nowhere_to_be_found"),
        ("skipped", "not today"),
    ]


@pytest.mark.parametrize(("value", "ok"), [(1.18, True), (1.19, False)])
def test_a_goal_is_reached_at_most_at_its_bound(session, rows, tmp_path, value, ok):
    session.dry_run = False
    with recorded(session, "decode step", "a | b") as row:
        row.metric, row.value, row.goal = "x the roof", value, 1.18
        row.facts = {"step_us": 12345.6}
    assert rows[0]["ok"] is ok
    result = PartResult(tmp_path, "e2e-8b", {"device": "NVIDIA H200"})
    result.record(rows[0])
    result.finish("done")
    write_summary(tmp_path, ["e2e-8b"])
    reached = "yes" if ok else "**no**"
    expected = f"| {value} x the roof | 1.18 | {reached} | step_us 12,346 |"
    assert expected in (tmp_path / "summary.md").read_text()


def test_a_request_that_fails_is_no_measurement(monkeypatch):
    core = drive.random_core(drive.DRY, TINY)

    def fail(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(core._runner._step.model, "forward", fail)
    with pytest.raises(RuntimeError, match=r"request 0: .*broken"):
        drive.drive(core, drive.DRY, TINY["vocab_size"], streams=1, output_tokens=2)


def test_greedy_tokens_are_compared_without_asking_the_device_for_logprobs(session, rows):
    exactness.run(session)
    assert [row["status"] for row in rows] == ["measured", "skipped"]
    assert rows[0]["facts"] == {
        **{"equal": 15, "excused": 0, "wrong": 0, "prompts": 3},
        "tolerance": TOLERANCE,
    }


def test_a_wrong_token_is_a_failed_row(session, rows, monkeypatch):
    measured = {"equal": 9, "excused": 1, "wrong": 1}
    monkeypatch.setattr(exactness, "measure", lambda task, device: measured)
    exactness.run(session)
    assert (rows[0]["status"], rows[0]["value"]) == (FAILED, 1)


def test_determinism_is_priced_where_the_engine_has_it(session, rows):
    if deterministic.SETTING not in {field.name for field in fields(EngineConfig)}:
        with pytest.raises(Skip, match="no setting 'deterministic'"):
            deterministic.run(session)
        return
    deterministic.run(session)
    assert [(row["name"], row["status"]) for row in rows] == [
        ("alone and in a crowd", "measured"),
        ("cost of determinism", "measured"),
    ]
    assert rows[0]["value"] == 0


def test_a_difference_in_one_bit_of_a_logprob_is_found():
    core = drive.random_core(drive.DRY, TINY)
    assert deterministic.different_tokens(core, drive.DRY, TINY["vocab_size"]) == 0
    logits = core._runner._step.model.logits
    core._runner._step.model.logits = lambda hidden: logits(hidden) * (1 + 1e-5 * len(hidden))
    assert deterministic.different_tokens(core, drive.DRY, TINY["vocab_size"]) > 0


def test_a_server_of_random_weights_is_started_and_answers(session, rows):
    serve.run(session)
    assert [(row["name"], row["status"], row["note"]) for row in rows] == [
        ("served", "measured", "")
    ]


def test_another_attention_is_measured_in_an_engine_of_its_own(session, rows):
    with recorded(session, "decode step", "reference") as row:
        models.measure_backend(row, session, models.SMALL, 3, "reference")
    assert rows[0]["status"] == "measured" and rows[0]["value"] > 0


# ---------------------------------------------------------------- starts


def test_a_start_is_timed_in_a_process_of_its_own(session):
    began = time.monotonic()
    started = start.start_once(session, models.BIG, None)
    assert list(started.phases) == ["imports", "device", "weights", "rest", "first_tokens"]
    assert 0 < sum(started.phases.values()) < time.monotonic() - began
    assert started.compiled == 0


def test_a_start_that_takes_too_long_is_ended(session):
    session.deadline = 0.0
    with pytest.raises(RuntimeError, match="not started within the 1 s that were left"):
        start.start_once(session, models.BIG, None)


@pytest.fixture
def here(monkeypatch):
    """Starts in this process."""

    def start_here(session, shape, folder):
        path, settings = folder and str(folder), dict(drive.DRY.settings)
        return one_start.start(one_start.Order(shape, path, settings, True, time.monotonic()))

    monkeypatch.setattr(start, "start_once", start_here)


@pytest.mark.usefixtures("here")
def test_starts_are_measured_with_weights_drawn_and_read(session, rows):
    start.run(session)
    assert [(row["name"], row["case"], row["status"]) for row in rows] == [
        ("start, warm", "Llama-3.1-8B, weights drawn on the device", "measured"),
        ("start, warm", "Llama-3.2-1B, weights from files", "measured"),
        ("start, calculated", "Llama-3.1-8B, weights from files", "measured"),
    ]
    drawn, read, calculated = rows
    assert {row["goal"] for row in rows} == {20.0}
    rate = read["facts"]["weights_gb_per_s"]
    weights_s = drawn["facts"]["weights_gb_per_s"] * drawn["facts"]["weights_s"] / rate
    expected = drawn["value"] - drawn["facts"]["weights_s"] + weights_s
    assert calculated["value"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("compiled", "status", "value"), [((3, 0), "measured", 2.0), ((3, 1), FAILED, None)]
)
def test_only_a_start_that_compiles_nothing_counts(
    session, rows, monkeypatch, compiled, status, value
):
    starts = [Started({"weights": 1.0 + i}, count, 10) for i, count in enumerate(compiled)]
    monkeypatch.setattr(start, "start_once", lambda *_: starts.pop(0))
    start.measure(session, models.BIG, "weights", nullcontext())
    assert (rows[0]["status"], rows[0]["value"]) == (status, value)


def test_the_phases_of_a_start_are_told_apart(monkeypatch):
    now = iter(range(1, 100))
    monkeypatch.setattr(one_start.time, "monotonic", lambda: float(next(now)))
    watch = Watch(0.0)
    watch.ended("imports")
    for layer in range(3):
        watch.progress(f"layer {layer}", layer + 1, 3)
    for done in range(1, 11):  # five graphs, captured twice
        watch.progress("decode graphs", done, 10)
    watch.ended("rest")
    names = ("imports", "weights", "first_graph", "trial_graphs", "cache", "graphs", "rest")
    phases = watch.phases()
    assert tuple(phases) == names
    assert phases == dict.fromkeys(names, 1.0) | {"weights": 3.0}


def test_sharded_weights_are_read_as_they_were_drawn(tmp_path):
    start.save_sharded(TINY, CPU, torch.float32, tmp_path, shard_bytes=100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    drawn, read = RandomCheckpoint(TINY, CPU, torch.float32), open_checkpoint(tmp_path)
    assert set(read.names()) == set(drawn.names())
    assert all(torch.equal(read.load(name), drawn.load(name)) for name in drawn.names())


# ---------------------------------------------------------------- sums


@pytest.mark.parametrize("config", [TINY, TINY | {"tie_word_embeddings": True}], ids=["", "tied"])
def test_a_random_checkpoint_has_the_tensors_of_transformers(config):
    with torch.device("meta"):
        fields = {name: value for name, value in config.items() if name != "architectures"}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert shapes_of(config) == expected


def test_a_random_tensor_is_the_same_each_time_and_another_for_each_name():
    checkpoint = RandomCheckpoint(TINY, CPU, torch.float32)
    q, k = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    assert torch.equal(checkpoint.load(q), checkpoint.load(q))
    assert not torch.equal(checkpoint.load(q)[:32], checkpoint.load(k)[:32])
    assert checkpoint.load("model.norm.weight").eq(1).all()


@pytest.mark.parametrize(
    ("name", "rows", "gigabytes", "milliseconds"),
    [
        ("Llama-3.1-8B", 1, 15.14, 3.52),
        ("Llama-3.1-8B", 64, 23.60, 5.49),
        ("Llama-3.2-1B", 1, 2.51, 0.58),
        ("Llama-3.2-1B", 64, 4.62, 1.07),
    ],
)
def test_roofline_at_1024_tokens_of_context(name, rows, gigabytes, milliseconds):
    work = decode_work(SHAPES[name], rows, context=1024 * rows)
    assert work.bytes / 1e9 == pytest.approx(gigabytes, abs=0.03)
    assert 1e3 * work.roof_s(4.3e12, 0.7e15) == pytest.approx(milliseconds, abs=0.01)


def test_a_large_batch_is_bound_by_its_products():
    work = decode_work(SHAPES["Llama-3.1-8B"], 1024, context=1024)
    assert work.roof_s(4.3e12, 0.7e15) == work.operations / 0.7e15


def test_the_head_counts_and_an_embedding_beside_it_does_not():
    tied = TINY | {"tie_word_embeddings": True}
    assert parameters_read(TINY) == parameters_read(tied)


# ---------------------------------------------------------------- traces and tokens


def test_idle_time_is_told_apart():
    """Two whole steps of 50 us; each waits 3 + 2 us at its boundary, and 1 us inside."""
    spans = [Span("Memcpy DtoH (Device -> Pinned)", 0, 4)]
    for begin in (4, 54):
        spans += [
            Span("gemm", begin + 2, begin + 20),
            Span("attention", begin + 21, begin + 43),
            Span("Memcpy DtoH (Device -> Pinned)", begin + 46, begin + 50),
        ]
    idle = idle_of(reversed(spans))
    assert (idle.steps, idle.step_us) == (2, 50)
    assert idle.between_steps == pytest.approx(0.1)
    assert idle.within_steps == pytest.approx(0.02)


def test_work_that_overlaps_is_no_gap():
    copy = "Memcpy DtoH"
    spans = [
        Span(copy, 0, 1),
        Span("a", 1, 9),
        Span("b", 3, 5),
        Span("c", 9, 10),
        Span(copy, 10, 11),
    ]
    assert (idle_of(spans).between_steps, idle_of(spans).within_steps) == (0, 0)


def test_a_trace_without_a_whole_step_is_refused():
    with pytest.raises(ValueError, match="found 1"):
        idle_of([Span("Memcpy DtoH", 0, 1), Span("gemm", 1, 2)])


@pytest.mark.parametrize(
    ("gap", "verdict"),
    [(TOLERANCE * 0.99, {"equal": 1, "excused": 1}), (TOLERANCE, {"equal": 1, "wrong": 1})],
)
def test_a_difference_is_excused_only_where_bf16_cannot_tell(gap, verdict):
    expected = [Token(5, 3.0), Token(6, gap), Token(7, 3.0)]
    found = [5, 8, 9]
    assert compare(expected, found) == {"equal": 0, "excused": 0, "wrong": 0} | verdict
