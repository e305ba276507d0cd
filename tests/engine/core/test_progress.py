"""Progress of a start: nothing on stdout, and a line a stage where stderr is no terminal."""

import logging

from millrace.engine.core.progress import startup_progress


def test_each_stage_ends_with_one_line(caplog, capsys):
    with caplog.at_level(logging.INFO), startup_progress() as report:
        for done in (1, 2, 3):
            report(f"layer {done - 1}", done, 3)
        report("decode graph of 4", 1, 2)
        report("decode graph of 1", 2, 2)
    assert [record.getMessage() for record in caplog.records] == [
        "layer 2: 3 of 3",
        "decode graph of 1: 2 of 2",
    ]
    assert capsys.readouterr().out == ""
