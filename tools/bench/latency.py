"""Percentiles of measured times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llm_datadist.tools.bench.case import Case

PERCENTILES = (50.0, 90.0, 99.0, 99.9)


@dataclass(frozen=True)
class Latency:
    """Times of one case.

    Attributes
    ----------
    case : Case
        What was moved.
    sorted_us : sequence of float
        Microseconds of each run, from the shortest to the longest.
    """

    case: Case
    sorted_us: Sequence[float]

    @property
    def gb_per_s(self) -> float:
        """Speed of the median run."""
        median = self.percentile(50.0)
        assert median is not None
        return self.case.nbytes / median / 1e3

    def percentile(self, percent: float) -> float | None:
        """Give the time that so many percent of the runs did not exceed; None if the runs are too few to tell.

        One run in 1000 is slower than the percentile 99.9, so it takes 1000 runs to see it.
        """
        runs = len(self.sorted_us)
        # Rounded, since 99.9 and its like are no binary fractions.
        rank = math.ceil(round(runs * percent / 100, 6))
        seen = round(runs * (100 - percent) / 100, 6) >= 1 or percent <= 50
        return self.sorted_us[max(rank, 1) - 1] if seen else None
