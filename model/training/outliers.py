"""Decides which optimizer steps to skip: NaN or infinite loss, or a gradient norm 10 times the recent median.

The decision depends only on earlier gradient norms, which the metrics hold, so a resumed run decides alike.
"""

from collections import deque
from math import isfinite
from statistics import median

MEMORY_STEPS = 128
FEWEST_STEPS = 32  # no norm is an outlier before: gradients shrink fast at the beginning
FACTOR = 10.0  # times the median of the last MEMORY_STEPS norms; one spike already moves the z-scores of llm.c


class Outliers:
    """The recent gradient norms, and how many steps were skipped so far of how many allowed."""

    def __init__(self, allowed: int, norms: list[float], skipped: int) -> None:
        self.allowed, self.skipped = allowed, skipped
        self._norms = deque((norm for norm in norms if isfinite(norm)), maxlen=MEMORY_STEPS)

    def skip(self, loss: float, norm: float) -> bool:
        """Whether to skip the step of this loss and gradient norm. Counts it."""
        if self.allowed == 0 or not self.judge(loss, norm) or self.skipped >= self.allowed:
            return False
        self.skipped += 1
        return True

    def judge(self, loss: float, norm: float) -> bool:
        """Whether this loss and gradient norm are an outlier. If not, the norm counts for later steps."""
        if not (isfinite(loss) and isfinite(norm)):
            return True
        if len(self._norms) >= FEWEST_STEPS and norm > FACTOR * median(self._norms):
            return True
        self._norms.append(norm)
        return False


def divergence(
    run: str, step: int, loss: float, norm: float, *, skipped: int, windows: range, manifest: str, shards: list[str]
) -> ValueError:
    """The error of a step whose loss or gradient norm is NaN or infinite; names the batch."""
    after = f" after {skipped} skipped steps" if skipped else ""
    more = f" and {len(shards) - 3} more" if len(shards) > 3 else ""
    return ValueError(
        f"step {step:,} of run {run!r} diverged: summed loss {loss}, gradient norm {norm}{after}. Its batch is windows "
        f"{windows[0]:,} to {windows[-1]:,} of manifest {manifest[:12]}, in {', '.join(shards[:3])}{more}. "
        f"gpt2 dataset trace --step {step} shows the documents. Try a smaller train.learning_rate, a longer warm-up "
        f"or train.skip_outlier_steps in a new run."
    )
