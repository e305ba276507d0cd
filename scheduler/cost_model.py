"""CostModel: how long a step takes, learned from the steps that were measured.

    seconds = c0 + c1 * prefill tokens + c2 * decodes + c3 * context tokens of the decodes

by recursive least squares with forgetting (Haykin, "Adaptive Filter Theory", chapter 10). Rows are
divided by the measured time, so that it is the relative error that is kept small: short steps count
as much as long ones. In a long time of equal steps old evidence would fade and nothing replace it:
so the uncertainty is bounded.

A time that no step takes (a clock that was set) is not believed at all. One several times longer or
shorter than expected (a pause of the machine, a first compilation) says nothing about the next one
and is left out. If many in a row are, it is the model that is wrong: it is forgotten and learned
anew.

A second number says how far steps stray above the prediction: `budget()` plans with that margin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FORGETTING = 0.998  # evidence is halved in 350 steps
FIRST_S = 0.02  # guess of a step before the first measurement
SCALES = np.array([1.0, 1e-3, 1e-2, 1e-5])  # so that the unknowns are of one size
MAX_UNCERTAINTY = 1e4  # trace of the covariance
UNCERTAIN = np.eye(len(SCALES)) * MAX_UNCERTAINTY / len(SCALES)
UNCERTAIN.flags.writeable = False
SHORTEST_S, LONGEST_S = 1e-4, 60.0  # of a step; else it was not the step that was measured
OUTLIER = 4.0  # times the prediction, or that part of it
MAX_OUTLIERS = 8  # in a row: then it is the model that is wrong
COLD = 8  # measurements: a first guess, to judge others by, and then no evidence any more
MARGIN_STEP = 0.01  # of the margin, towards its quantile
QUANTILE = 0.95  # of steps shall take no longer than the margin says
MIN_CHUNK = 16  # prefill tokens that a step may always have, however tight the target
MAX_BUDGET = 1 << 20  # prefill tokens; more than any step's limit


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What a step computed."""

    prefill_tokens: int
    decodes: int
    context_tokens: int  # KV that the decodes read

    @property
    def row(self) -> npt.NDArray[np.float64]:
        return SCALES * (1.0, self.prefill_tokens, self.decodes, self.context_tokens)


class CostModel:
    """Knows nothing at first, and says FIRST_S; `budget` and `prefill_s` wait for COLD steps."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._costs = np.zeros(len(SCALES))
        self._covariance = UNCERTAIN
        self._margin = 1.0  # measured over predicted, at the quantile
        self._num_measured = 0
        self._outliers = 0

    def predict_s(self, load: StepLoad) -> float:
        """Seconds of such a step."""
        if self._num_measured < len(SCALES):
            return FIRST_S
        return max(0.0, float(self._costs @ load.row))

    def measured(self, load: StepLoad, seconds: float) -> None:
        """Learn from a step. Times that can't be one's are left out, whatever they are."""
        if not SHORTEST_S <= seconds <= LONGEST_S:
            return
        ratio = seconds / max(self.predict_s(load), 1e-9)
        if self._num_measured >= COLD:
            is_outlier = not 1.0 / OUTLIER <= ratio <= OUTLIER
            self._outliers = self._outliers + 1 if is_outlier else 0
            if 0 < self._outliers < MAX_OUTLIERS:
                return
            if is_outlier:
                self._forget()
            else:
                above = ratio > self._margin
                self._margin = max(1.0, self._margin + MARGIN_STEP * (QUANTILE - 1.0 + above))
        self._num_measured += 1
        self._learn(load.row / seconds)
        if self._num_measured == COLD:
            self._covariance = UNCERTAIN

    def _learn(self, row: npt.NDArray[np.float64]) -> None:
        """One update, towards row @ costs = 1."""
        spread = self._covariance @ row
        gain = spread / (FORGETTING + row @ spread)
        self._costs += gain * (1.0 - row @ self._costs)
        covariance = (self._covariance - np.outer(gain, spread)) / FORGETTING
        trace = float(np.trace(covariance))
        self._covariance = covariance * min(1.0, MAX_UNCERTAINTY / trace)

    def budget(self, target_s: float, decodes: int, context_tokens: int) -> int:
        """Prefill tokens that fit a step beside these decodes, if it shall end within the target.

        At least MIN_CHUNK: a target that decodes alone miss must not starve the prompts.
        """
        without = self.predict_s(StepLoad(0, decodes, context_tokens))
        a_token = self.predict_s(StepLoad(1000, decodes, context_tokens)) - without
        left_s = target_s / self._margin - without
        if self._num_measured < COLD or a_token <= 0.0 or left_s <= 0.0:
            return MIN_CHUNK
        return int(min(MAX_BUDGET, max(MIN_CHUNK, 1000 * left_s / a_token)))

    def prompt_s(self, tokens: int) -> float:
        """What so many prefill tokens add to steps that are run anyway; 0 before that is known."""
        if self._num_measured < len(SCALES):
            return 0.0
        return max(0.0, float(self._costs[1] * SCALES[1] * tokens))

    def prefill_s(self, tokens: int) -> float:
        """Seconds to compute a prompt alone, whatever the chunks: a bound from below."""
        return self.predict_s(StepLoad(tokens, 0, 0)) if self._num_measured >= COLD else 0.0
