"""A compilation after the start is named in the log; a hit in the cache is not."""

import logging
from types import SimpleNamespace

import triton

from millrace.engine.runner.compile_watch import warn_of_compiling


def test_only_what_is_compiled_is_named(caplog):
    with triton.knobs.compilation.scope(), caplog.at_level(logging.WARNING):
        warn_of_compiling()
        listener = triton.knobs.compilation.listener
        listener(src=SimpleNamespace(name="known"), cache_hit=True, metadata={})
        listener(src=SimpleNamespace(name="merge_kernel"), cache_hit=False, metadata={})
    assert "merge_kernel was compiled while serving" in caplog.text
    assert "known" not in caplog.text
