"""Latencies: when each request came, drew its tokens, and whether that met the objectives.

Filled by a virtual server (virtual.py) and by a real one (validate.py) alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WARM_UP_SHARE = 0.1  # of the requests: the first ones meet an empty server


@dataclass(frozen=True, slots=True)
class Objectives:
    """A request is good if its first token comes within `ttft_s`, and those after it at intervals
    of `itl_s` on average (what others call TPOT)."""

    ttft_s: float
    itl_s: float


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Seconds; NaN where nothing was measured."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: np.ndarray) -> Quantiles:
        if not len(values):
            return cls(np.nan, np.nan, np.nan)
        return cls(*(float(value) for value in np.percentile(values, (50, 95, 99))))


class Latencies:
    """Requests are numbered from 0."""

    def __init__(self, arrived_s: Sequence[float]) -> None:
        count = len(arrived_s)
        self.arrived_s = np.asarray(arrived_s)
        self.first_s = np.full(count, np.nan)  # NaN: no token yet
        self.last_s = np.full(count, np.nan)
        self.drawn = np.zeros(count, np.int64)
        self.is_whole = np.zeros(count, np.bool_)  # ended with all its tokens
        self._gaps: list[np.ndarray] = []

    def drew(self, ids: np.ndarray, now_s: float) -> None:
        """One token more for each of these, at the same time."""
        again = ids[self.drawn[ids] > 0]
        if len(again) < len(ids):
            first = ids[self.drawn[ids] == 0]
            self.first_s[first] = now_s
        self._gaps.append(now_s - self.last_s[again])
        self.last_s[ids] = now_s
        self.drawn[ids] += 1

    @property
    def measured(self) -> np.ndarray:
        """Which requests count: all but those of the warm-up, whatever became of them."""
        return np.arange(len(self.arrived_s)) >= int(WARM_UP_SHARE * len(self.arrived_s))

    def attainment(self, objectives: Objectives) -> float:
        """The share of good requests. One that was refused, or ended early, is not good."""
        good = self.is_whole & (self.ttft_s <= objectives.ttft_s)
        good &= self.mean_itl_s <= objectives.itl_s
        return float(good[self.measured].mean())

    @property
    def ttft_s(self) -> np.ndarray:
        """By request; infinite where no token came."""
        taken: np.ndarray = np.nan_to_num(self.first_s - self.arrived_s, nan=np.inf)
        return taken

    @property
    def mean_itl_s(self) -> np.ndarray:
        """By request; 0 where there was one token only."""
        spans = np.nan_to_num(self.last_s - self.first_s)
        means: np.ndarray = spans / np.maximum(self.drawn - 1, 1)
        return means

    def ttft(self) -> Quantiles:
        got = self.measured & (self.drawn > 0)
        return Quantiles.of(self.ttft_s[got])

    def itl(self) -> Quantiles:
        """Of all gaps between tokens, of all requests."""
        return Quantiles.of(np.concatenate([*self._gaps, np.empty(0)]))

    @property
    def tokens_per_s(self) -> float:
        """Of output, from the first arrival to the last token."""
        last_s = np.nanmax(self.last_s, initial=self.arrived_s[0])
        return float(self.drawn.sum() / max(last_s - self.arrived_s[0], 1e-9))
