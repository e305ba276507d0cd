"""Choosing launch configurations: what is tried, and what stays in the file."""

import json
import os
import subprocess
import sys

import pytest
import torch

from millrace.kernels import configs
from millrace.kernels.configs import FILE, LaunchConfig, launch_config
from millrace.perf.kernels.tune import candidates, with_row


def test_every_combination_is_tried():
    tried = list(candidates([4, 8], [2], ["TILE=32,64", "SPLIT=256"]))
    assert len(tried) == 4
    wanted = {"num_warps": 8, "num_stages": 2, "constants": {"TILE": 64, "SPLIT": 256}}
    assert tried[-1] == wanted


def test_without_constants_only_warps_and_stages_vary():
    assert [row["constants"] for row in candidates([4], [1, 2], [])] == [{}, {}]


def test_a_kernel_reads_the_row_that_was_written(tmp_path, monkeypatch):
    row = {"num_warps": 8, "num_stages": 2, "constants": {"TILE": 64}, "measured_us": 3.5}
    text = with_row("{}", "NVIDIA H200", "norm", "bf16 E64", row)
    text = with_row(text, "NVIDIA H200", "norm", "bf16 E128", {**row, "num_warps": 4})
    file = tmp_path / "configs.json"
    file.write_text(with_row(text, "NVIDIA H100", "norm", "bf16 E64", {**row, "num_warps": 2}))
    monkeypatch.setattr(configs.torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    default = LaunchConfig(1, 1, {})
    found = launch_config("norm", "bf16 E64", torch.device("cuda"), default, file)
    assert found == LaunchConfig(8, 2, {"TILE": 64})
    assert len(json.loads(file.read_text())["NVIDIA H200"]["norm"]) == 2


@pytest.mark.parametrize(
    ("case", "code", "words"),
    [("decode b2", 0, "best: {'num_warps': 4"), ("no such case", 1, "no case begins with")],
)
def test_a_dry_run_measures_and_writes_nothing(case, code, words):
    before = FILE.read_bytes()
    arguments = ["--op", "paged_attention", "--key", "bf16 D16", "--part", "attention"]
    arguments += ["--case", case, "--warps", "4", "--stages", "2", "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "millrace.perf.kernels.tune", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stdout
    assert FILE.read_bytes() == before
