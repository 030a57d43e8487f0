"""Which steps are so far off that their update does harm: a loss or gradient that is no number, or far too large.

The judgement is a function of the gradient norms before it, which the metrics hold, so a resumed run judges alike.
"""

from collections import deque
from math import isfinite
from statistics import median

MEMORY_STEPS = 128
FEWEST_STEPS = 32  # before these nothing is far off: gradients shrink fast at the beginning
FAR = 10.0  # times the median norm of the last MEMORY_STEPS; llm.c judges by z-scores, which one spike already moves


class Outliers:
    """The recent gradient norms, and how many steps were left out so far."""

    def __init__(self, norms: list[float], skipped: int) -> None:
        self._norms = deque((norm for norm in norms if isfinite(norm)), maxlen=MEMORY_STEPS)
        self.skipped = skipped

    def judge(self, loss: float, norm: float) -> bool:
        """Whether a step of this loss and gradient norm is an outlier; its norm counts from now on if it is not."""
        far = len(self._norms) >= FEWEST_STEPS and norm > FAR * median(self._norms)
        if not (isfinite(loss) and isfinite(norm)) or far:
            return True
        self._norms.append(norm)
        return False
