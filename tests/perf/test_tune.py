"""Choosing launch configurations: what is tried, and what stays in the file."""

import json
import os
import subprocess
import sys

import pytest
import torch

from millrace.kernels import configs
from millrace.kernels.configs import FILE, LaunchConfig, launch_config
from millrace.perf.kernels.studies import Study
from millrace.perf.kernels.tune import candidates, tune, with_row


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


def test_a_dry_run_measures_and_writes_nothing():
    before = FILE.read_bytes()
    arguments = ["--op", "norm", "--key", "E96", "--part", "norm", "--kernel", "rms_norm"]
    arguments += ["--case", "3 x 96", "--warps", "4", "--stages", "2", "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "millrace.perf.kernels.tune", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "best: {'num_warps': 4" in done.stdout
    assert FILE.read_bytes() == before


@pytest.mark.parametrize(
    "changed",
    [{"cases": ("no such case",)}, {"kernel": "no such kernel"}, {"provider": "nobody"}],
    ids=str,
)
def test_a_study_without_cases_says_so_and_has_no_best(capfd, changed):
    cases = {"cases": ("qkv",), **changed}
    study = Study("linear_decode", "key", "matmul", warps=[4], stages=[2], constants=[], **cases)
    assert tune(study, dry_run=True) is None
    assert f"no case begins with {study.cases[0]!r}" in capfd.readouterr().out
