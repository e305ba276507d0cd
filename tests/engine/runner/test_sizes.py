"""What a device has by default, and how settings and defaults go together."""

import pytest
import torch

from millrace.engine.config import EngineConfig
from millrace.engine.errors import InvalidRequest
from millrace.engine.runner.sizes import Sizes, sizes_for, step_sizes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "settings", "sizes"),
    [
        (CPU, {}, Sizes(64, 512, 0)),
        (CUDA, {}, Sizes(256, 8192, 1)),
        (CUDA, {"run_ahead": 0}, Sizes(256, 8192, 0)),
        (CUDA, {"max_running": 7, "max_step_tokens": 77, "run_ahead": 3}, Sizes(7, 77, 3)),
        (CPU, {"max_running": 1000}, Sizes(1000, 1000, 0)),  # every decode fits in a step
        (CUDA, {"max_step_tokens": 100}, Sizes(100, 100, 1)),
        (CPU, {"max_step_tokens": 4096}, Sizes(64, 4096, 0)),
    ],
)
def test_a_default_stays_within_what_is_configured(device, settings, sizes):
    assert sizes_for(EngineConfig(**settings), device) == sizes


def test_two_settings_that_contradict_each_other_are_refused():
    with pytest.raises(InvalidRequest, match=r"at least max_running \(64\), got 63"):
        EngineConfig(max_running=64, max_step_tokens=63)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [8192, 4096, 2048, 1024, 512]),
        ({"max_running": 1500}, [8192, 4096, 2048]),  # a step holds every decode
        ({"max_step_tokens": 8192}, [8192]),  # what is asked for is given, or refused
    ],
)
def test_only_a_default_gives_way_where_memory_is_short(settings, expected):
    config = EngineConfig(**settings)
    assert step_sizes(config, sizes_for(config, CUDA)) == expected
