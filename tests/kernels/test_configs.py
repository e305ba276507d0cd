"""The table of launch configurations: rows by device, defaults elsewhere."""

import json

import pytest
import torch

from millrace.kernels.configs import FILE, LaunchConfig, launch_config

DEFAULT = LaunchConfig(4, 3, {"TILE": 64})
ROW = {"num_warps": 8, "num_stages": 2, "constants": {"TILE": 128}, "measured_us": 12.5}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "configs.json"
    path.write_text(json.dumps({"NVIDIA H200": {"attention": {"bf16 D128": ROW}}}))
    return path


def test_a_device_has_its_own_rows(file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    found = launch_config("attention", "bf16 D128", torch.device("cuda"), DEFAULT, file)
    assert found == LaunchConfig(8, 2, {"TILE": 128})


def test_a_row_may_leave_constants_to_the_default(file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    default = LaunchConfig(4, 3, {"TILE": 64, "BLOCK_M": 16})
    found = launch_config("attention", "bf16 D128", torch.device("cuda"), default, file)
    assert found == LaunchConfig(8, 2, {"TILE": 128, "BLOCK_M": 16})


@pytest.mark.parametrize(
    ("name", "op", "key"),
    [
        ("NVIDIA A100", "attention", "bf16 D128"),
        ("NVIDIA H200", "norm", "bf16 D128"),
        ("NVIDIA H200", "attention", "bf16 D64"),
    ],
)
def test_what_the_file_does_not_have_is_the_default(file, monkeypatch, name, op, key):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert launch_config(op, key, torch.device("cuda"), DEFAULT, file) is DEFAULT


def test_a_cpu_has_no_rows(file):
    assert launch_config("attention", "bf16 D128", torch.device("cpu"), DEFAULT, file) is DEFAULT


def test_every_shipped_row_can_be_read():
    for ops in json.loads(FILE.read_text()).values():
        for keys in ops.values():
            for row in keys.values():
                assert row.keys() >= {"num_warps", "num_stages", "constants", "measured_us"}
