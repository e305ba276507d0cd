"""What is tuned: all rows that launchers ask for, by their keys, with constants that they know."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from millrace.kernels.activation_triton import gated_config
from millrace.kernels.attention_triton import attention_config
from millrace.kernels.configs import FILE
from millrace.kernels.gemv_triton import gemv_config
from millrace.kernels.kv_append_triton import append_config
from millrace.kernels.matmul_persistent_triton import persistent_config
from millrace.kernels.matmul_plan import decode_config
from millrace.kernels.norm_triton import norm_config
from millrace.perf.kernels import bench_activation, bench_head, bench_matmul, bench_norm
from millrace.perf.kernels.case import OURS
from millrace.perf.kernels.studies import APPEND_CASES, ATTENTION_CASES, studies
from millrace.perf.kernels.tune_rows import chosen

CPU = torch.device("cpu")


def asked_for():
    """(module, op) of each call of launch_config in the kernels' sources."""
    return [
        (path.stem, node.args[0].value)
        for path in FILE.parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "launch_config"
    ]


def written_by_rows():
    """The ops that tune_rows writes, of a layer and of a head."""
    axes, times = {"rows": 1, "n": 64, "k": 64}, [(OURS, 5.0), (bench_matmul.VENDOR, 6.0)]
    rows = [
        {"kernel": kernel, "case": "c", "provider": name, "median_us": us, "axes": axes}
        for kernel in ("matmul", bench_head.KERNEL)
        for name, us in times
    ]
    return {op for op, _, _ in chosen(rows, {})}


def test_every_op_that_a_launcher_asks_for_is_written_by_one_of_the_two():
    ops = {op for _, op in asked_for()}
    assert ops == {study.op for study in studies()} | written_by_rows()


def test_no_row_is_studied_twice():
    rows = [(study.op, study.key) for study in studies()]
    assert len(rows) == len(set(rows))


@pytest.fixture
def asked(monkeypatch):
    """(op, key) -> the default's constants, of each row that was asked for."""
    found = {}

    def record(op, key, device, default):
        found[op, key] = set(default.constants)
        return default

    for module, _ in asked_for():
        monkeypatch.setattr(f"millrace.kernels.{module}.launch_config", record)
    return found


def test_launchers_ask_for_the_keys_and_know_the_constants_of_the_studies(asked):
    for head_dim in ATTENTION_CASES:
        attention_config.__wrapped__(CPU, torch.bfloat16, head_dim)
    for head_dim in APPEND_CASES:
        append_config.__wrapped__(head_dim, CPU)
    for hidden in bench_norm.HIDDEN:
        norm_config.__wrapped__(hidden, CPU)
    for ffn in bench_activation.WIDTHS:
        gated_config.__wrapped__(ffn, CPU)
    for n, k in bench_matmul.LAYERS.values():
        for config in (decode_config, gemv_config, persistent_config):
            config(torch.empty(n, k, dtype=bench_matmul.DTYPE, device="meta"))
    for study in studies():
        names = {text.partition("=")[0] for text in study.constants}
        assert names <= asked[study.op, study.key], study


def test_a_dry_run_goes_all_the_way_and_leaves_the_table(tmp_path):
    """The studies, the suite's part for linear layers, and what is made of its times."""
    before = FILE.read_bytes()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "millrace.perf.kernels.tune_all", str(tmp_path), "--dry-run"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    listed = re.findall(r"^(\w+ .+): (\d+) candidates on (\d+) cases$", done.stdout, re.MULTILINE)
    assert [name for name, _, _ in listed] == [f"{study.op} {study.key}" for study in studies()]
    assert all(int(candidates) > 1 and int(cases) for _, candidates, cases in listed)
    measured = re.findall(r"^\{.*\}: [\d.]+ us$", done.stdout, re.MULTILINE)
    assert len(measured) == len({study.op for study in studies()}), done.stdout
    assert json.loads((tmp_path / FILE.name).read_text())["cpu"].keys() == written_by_rows()
    assert FILE.read_bytes() == before
