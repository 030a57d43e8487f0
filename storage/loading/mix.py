"""A mix of datasets by weight. Of the first n windows, for any n, each dataset has its share, within one window."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm
from typing import Annotated

import numpy as np
from pydantic import Field

from storage.datasets.manifest import Digest
from storage.keys import NAME

LINE = re.compile(rf"({NAME.pattern}):([0-9]+\.?[0-9]*|\.[0-9]+)")
LONGEST_PERIOD = 100_000  # windows; its schedule takes 0.1 s for 2 datasets, 1.3 s for 100


@dataclass(frozen=True)
class Share:
    """A version of a dataset in a mix, and the number of its windows in each period."""

    manifest: Digest
    weight: Annotated[int, Field(gt=0, le=LONGEST_PERIOD)]


def parse_mix(lines: Sequence[str]) -> dict[str, int]:
    """The weights of `train.mix`, reduced to the smallest whole numbers and sorted by dataset. Raises ValueError."""
    weights: dict[str, Fraction] = {}
    for line in lines:
        if not (match := LINE.fullmatch(line)) or not Fraction(match[2]):
            raise ValueError(f"train.mix: {line!r} is not NAME:WEIGHT with a decimal above 0, such as 'web:0.8'.")
        if match[1] == "mix":
            raise ValueError("train.mix: no dataset may be named 'mix', as the mean val loss is. Use another name.")
        if match[1] in weights:
            raise ValueError(f"train.mix: dataset {match[1]!r} is named twice. Add up its weights.")
        weights[match[1]] = Fraction(match[2])
    denominator = lcm(*(weight.denominator for weight in weights.values()))
    counts = {dataset: int(weight * denominator) for dataset, weight in sorted(weights.items())}
    divisor = gcd(*counts.values())
    if sum(counts.values()) > LONGEST_PERIOD * divisor:
        problem = f"these weights are exact only after more than {LONGEST_PERIOD:,} windows"
        raise ValueError(f"train.mix: {problem}. Give them fewer digits, such as 0.33 instead of 0.333333.")
    return {dataset: count // divisor for dataset, count in counts.items()}


def weighted_mean(values: Mapping[str, float], mix: Mapping[str, Share]) -> float:
    """The mean of one value for each dataset, by the weights of the mix."""
    return float(np.average([*values.values()], weights=[mix[dataset].weight for dataset in values]))


def describe(mix: Mapping[str, Share]) -> str:
    """The mix for people: code 20 %, web 80 %."""
    period = sum(share.weight for share in mix.values())
    return ", ".join(f"{dataset} {100 * share.weight / period:.4g} %" for dataset, share in mix.items())


class MixedOrder:
    """The dataset of each window of an endless stream: a pure function of the weights."""

    def __init__(self, mix: Mapping[str, Share]) -> None:
        self._datasets = list(mix)
        self._weights = np.array([share.weight for share in mix.values()], np.int64)
        self._dataset_of = _schedule(self._weights.tolist())  # of one period

    def counts(self, windows: int) -> np.ndarray:
        """How many of the first `windows` windows are from each dataset."""
        periods, rest = divmod(windows, len(self._dataset_of))
        return periods * self._weights + np.bincount(self._dataset_of[:rest], minlength=len(self._datasets))

    def parts(self, first: int, count: int) -> Iterator[tuple[str, int, np.ndarray]]:
        """The datasets of `count` windows from `first` on: each with its own first window and its places among them."""
        dataset_of = self._dataset_of[np.arange(first, first + count) % len(self._dataset_of)]
        starts = self.counts(first).tolist()
        for number in np.unique(dataset_of).tolist():
            yield self._datasets[number], starts[number], np.flatnonzero(dataset_of == number)


def _schedule(weights: Sequence[int]) -> np.ndarray:
    """The dataset of each window of a period: earliest deadline first.

    Window k of a dataset with share w has a place from floor(k / w) on, before ceil((k + 1) / w). All fit, for any
    weights: R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980).
    """
    period = sum(weights)
    counts, scheduled = [0] * len(weights), []
    for place in range(period):
        _, earliest = min(
            (-(-(counts[dataset] + 1) * period // weight), dataset)
            for dataset, weight in enumerate(weights)
            if counts[dataset] * period // weight <= place
        )
        counts[earliest] += 1
        scheduled.append(earliest)
    return np.array(scheduled, np.int64)
