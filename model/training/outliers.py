"""Decides which optimizer steps to skip: NaN or infinite loss or gradient norm, or 10 times the recent median norm.

The decision depends only on earlier gradient norms, which the metrics hold, so a resumed run makes the same decisions.
"""

from collections import deque
from math import isfinite
from statistics import median

MEMORY_STEPS = 128
FEWEST_STEPS = 32  # before that, no norm is an outlier: gradients shrink fast at the beginning
FACTOR = 10.0  # times the median of the last MEMORY_STEPS norms; one spike already moves the z-scores of llm.c


class Outliers:
    """The recent gradient norms, the number of steps skipped so far, and the maximum number to skip."""

    def __init__(self, allowed: int, norms: list[float], skipped: int) -> None:
        self.allowed, self.skipped = allowed, skipped
        self._norms = deque(norms, maxlen=MEMORY_STEPS)

    def skip(self, loss: float, norm: float) -> bool:
        """Whether to skip the step with this loss and gradient norm; counts it. Another norm counts for later steps."""
        is_spike = len(self._norms) >= FEWEST_STEPS and norm > FACTOR * median(self._norms)
        is_outlier = is_spike or not (isfinite(loss) and isfinite(norm))
        if not is_outlier:
            self._norms.append(norm)
        is_skipped = is_outlier and self.skipped < self.allowed
        self.skipped += is_skipped
        return is_skipped
