"""CPU seconds of a process and of those that it started, from /proc (proc_pid_stat(5))."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

PPID, UTIME, STIME = 1, 11, 12  # fields after the command's name, which may hold anything
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_seconds_of_tree(root: int) -> dict[int, float]:
    """User and system seconds so far of process `root` and all its live descendants, by pid."""
    children: dict[int, list[int]] = defaultdict(list)
    seconds: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        pid = int(entry.name)
        children[int(fields[PPID])].append(pid)
        seconds[pid] = (int(fields[UTIME]) + int(fields[STIME])) / TICKS_PER_S
    found: dict[int, float] = {}
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        if pid in seconds:
            found[pid] = seconds[pid]
            waiting += children[pid]
    return found
