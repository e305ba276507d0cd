"""The end-to-end part of the GPU suite, on a CPU: the same path with a tiny shape, and its sums."""

import json

import pytest
import torch
import transformers

from millrace.perf import gpu_e2e
from millrace.perf.gpu_exactness import TOLERANCE, Token, compare
from millrace.perf.random_model import SHAPES, TINY, RandomCheckpoint, parameters_read, shapes_of
from millrace.perf.roofline import decode_work
from millrace.perf.step_trace import Span, idle_of

CEILINGS = {"copy_bytes_per_s": 4.3e12, "matmul_flops_per_s": 0.7e15}
CPU = torch.device("cpu")


def test_dry_run_measures_everything_and_writes_it(tmp_path, capsys):
    options = ["--out", str(tmp_path), "--copy-bytes-per-s", "1e10", "--dry-run"]
    assert gpu_e2e.main([*options, "--matmul-flops-per-s", "1e11"]) == 0
    rows = json.loads((tmp_path / "gpu_e2e.json").read_text())
    done = [(row["name"], row.get("streams")) for row in rows if row["status"] == "done"]
    assert done == [("throughput", 1), ("throughput", 3), ("transformers", 2), ("exactness", None)]
    for row in rows[:2]:
        assert row["tokens_per_s"] > 0
        assert row["step_over_roof"] == pytest.approx(row["step_us"] / row["roof_us"])
    assert all("not installed" in row["error"] for row in rows if row["status"] == "skipped")


def test_a_measurement_that_fails_costs_itself_alone(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such device")

    monkeypatch.setattr(gpu_e2e.gpu_peer, "measure", fail)
    monkeypatch.setattr(gpu_e2e.gpu_exactness, "measure", lambda dry_run: {"equal": 1})
    rows = gpu_e2e.run(tmp_path, CEILINGS, dry_run=True)
    failed = [row for row in rows if row["status"] == gpu_e2e.FAILED]
    assert [(row["name"], row["error"]) for row in failed] == [
        ("transformers", "RuntimeError: no such device")
    ]
    assert rows[-1]["name"] != "model"


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
    for start in (4, 54):
        spans += [
            Span("gemm", start + 2, start + 20),
            Span("attention", start + 21, start + 43),
            Span("Memcpy DtoH (Device -> Pinned)", start + 46, start + 50),
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
    found = [Token(5, 3.0), Token(8, 0.1), Token(9, 9.0)]
    assert compare(expected, found) == {"equal": 0, "excused": 0, "wrong": 0} | verdict
