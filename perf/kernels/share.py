"""A pytest plugin that runs one share of the tests: -p millrace.perf.kernels.share --share 2/8."""

from __future__ import annotations

import pytest

NEIGHBOURS = 5
"""So many tests in a row stay together: they often launch what one of them compiled."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", default="0/1", help="i/n: the i-th of n shares, from 0 on")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share, shares = map(int, config.getoption("--share").split("/"))
    items[:] = [item for i, item in enumerate(items) if i // NEIGHBOURS % shares == share]
