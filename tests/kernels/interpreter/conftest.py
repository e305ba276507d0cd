"""Tests here run Triton kernels in its interpreter, which must be on before triton is imported.

TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreter
"""

import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.interpreter)
            if os.environ.get("TRITON_INTERPRET") != "1":
                item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))
