"""One measured operation, and what its numbers are held against."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MICROSECONDS = "us"
WARM_UP = 2  # unmeasured runs: pages of the target are there then, and so is what Python caches

Operation = Callable[[], object]


@dataclass(frozen=True)
class Target:
    """A number that a measurement should reach, and what it came to.

    Attributes
    ----------
    what : str
        What `value` counts, as in "0.93 of the limit".
    value, bound : float
        Measured, and wanted.
    at_least : bool
        Whether more is better.
    """

    what: str
    value: float
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def as_dict(self) -> dict[str, Any]:
        relation = ">=" if self.at_least else "<="
        return {
            "what": self.what,
            "value": round(self.value, 4),
            "relation": relation,
            "bound": self.bound,
            "met": self.met,
        }


@dataclass(frozen=True)
class Row:
    """Many runs of one operation.

    Attributes
    ----------
    topic, name : str
        Together they name the row in comparisons of two result files.
    values : sequence of float
        One a run, in `unit`.
    nbytes : int
        Bytes that one run moves; 0 if speed is not the point.
    limit_us : float or None
        What the machine needed for these bytes in the same minute.
    targets : tuple of Target
        What the row is held against.
    note : str
        A word for the table, such as a ratio nobody asked for.
    point : tuple of (str, float) or None
        Curve that the row is a point of, and where on its horizontal axis.
    """

    topic: str
    name: str
    values: Sequence[float]
    nbytes: int = 0
    unit: str = MICROSECONDS
    limit_us: float | None = None
    targets: tuple[Target, ...] = ()
    note: str = ""
    point: tuple[str, float] | None = None

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @property
    def gb_per_s(self) -> float | None:
        """Speed of the median run; None where the row is not about bytes."""
        if self.nbytes == 0 or self.unit != MICROSECONDS:
            return None
        return self.nbytes / self.median / 1e3

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.values, share))

    def as_dict(self) -> dict[str, Any]:
        speed = self.gb_per_s
        return {
            "topic": self.topic,
            "name": self.name,
            "bytes": self.nbytes,
            "runs": len(self.values),
            "unit": self.unit,
            "median": round(self.median, 3),
            "p25": round(self.quantile(0.25), 3),
            "p75": round(self.quantile(0.75), 3),
            "p99": round(self.quantile(0.99), 3),
            "gb_per_s": None if speed is None else round(speed, 3),
            "limit_us": None if self.limit_us is None else round(self.limit_us, 3),
            "targets": [target.as_dict() for target in self.targets],
            "note": self.note,
            "point": None if self.point is None else {"curve": self.point[0], "at": self.point[1]},
        }


def time_us(operation: Operation, runs: int, warm_up: int = WARM_UP) -> list[float]:
    """Run an operation again and again; gives the microseconds of each run that counts."""
    for _ in range(warm_up):
        operation()
    clock = time.perf_counter_ns
    taken = []
    collecting = gc.isenabled()
    gc.disable()  # a collection belongs to nobody's run
    try:
        for _ in range(runs):
            started = clock()
            operation()
            taken.append((clock() - started) / 1e3)
    finally:
        if collecting:
            gc.enable()
    return taken
