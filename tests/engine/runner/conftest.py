"""The worlds of tests/engine/core, for tests of the runner alone."""

import importlib.util
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "core" / "conftest.py"


@pytest.fixture(scope="session")
def world_module():
    spec = importlib.util.spec_from_file_location("core_worlds", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_runner_world(tiny_llama, world_module):
    """A factory of worlds on the tiny Llama."""
    return lambda **settings: world_module.World(tiny_llama.path, **settings)
