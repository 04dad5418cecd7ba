"""pass@k, and bootstrap intervals for which problems are drawn again, each with all of its samples."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import comb, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from turnwise.rl.summary import wilson

Sums = NDArray[np.float64]
"""Of each column, its sum over problems; in front of the columns, any further axes."""

Statistic = Callable[[Sums], NDArray[np.float64]]
"""From the sums to a figure, for all further axes at once."""

RESAMPLES = 2000
_TOGETHER = 2**20  # numbers of double precision in memory at a time


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure, and the ends of its 95% interval."""

    value: float
    low: float
    high: float


def pass_at(k: int, samples: int, right: int) -> float:
    """The chance that of `k` out of `samples` samples, drawn without replacement, at least one is right.

    1 − C(n − c, k) / C(n, k) for n samples of which c are right: the unbiased estimate of pass@k (Chen et al. 2021,
    arXiv 2107.03374, eq. 1), exact where they compute it as a product of floats.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(f"pass@k needs 1 ≤ k ≤ samples and 0 ≤ right ≤ samples; got {k}, {samples} and {right}")
    return 1 - comb(samples - right, k) / comb(samples, k)


def bootstrap(
    statistic: Statistic, table: NDArray[np.float64], *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """A figure of some problems, with its 95% interval.

    The table has a row for each problem and a column for each thing that is summed over problems; `statistic` gets the
    sums. What two teams came to on the same problems goes into one table: that is the paired bootstrap.

    The interval is the expanded percentile one (Hesterberg 2015, arXiv 1411.5279, §5.3): as wide as Student's for so
    many problems, where the plain percentiles are too narrow for few. Resamples that the statistic is not finite for
    (nothing was right, say) are left out.
    """
    if not len(table):
        raise ValueError("a bootstrap needs at least one problem")
    with np.errstate(divide="ignore", invalid="ignore"):
        value, drawn = float(statistic(table.sum(axis=0))), statistic(_drawn(table, seed, resamples))
    finite = drawn[np.isfinite(drawn)]
    if not len(finite):
        return Estimate(value, value, value)
    tail = _tail(len(table))
    low, high = np.quantile(finite, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def change(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> Estimate:
    """The mean difference of two shares in [0, 1] over problems, with its paired 95% interval.

    Where it is the same on each problem, drawing them again tells nothing: then the interval is what it may come to
    with any other difference on as many problems as, by Wilson, may have one.
    """
    apart = ours - theirs
    if (apart == apart[0]).all():
        same, others = float(apart[0]), wilson(0, len(apart))[1]
        return Estimate(same, same - others * (1 + same), same + others * (1 - same))
    return bootstrap(lambda sums: sums[..., 0] / sums[..., 1], np.column_stack([apart, np.ones(len(apart))]))


def _drawn(table: NDArray[np.float64], seed: int, resamples: int) -> Sums:
    """The sums of each resample."""
    times = _times_drawn(len(table), seed, resamples)
    together = max(1, _TOGETHER // len(table))
    parts = [times[start : start + together] @ table for start in range(0, resamples, together)]
    return np.concatenate(parts)


@lru_cache(maxsize=2)  # figures of the same problems follow each other
def _times_drawn(problems: int, seed: int, resamples: int) -> NDArray[np.uint16]:
    """How often each problem (column) is in each resample (row)."""
    rng, parts = np.random.default_rng(seed), []
    together = max(1, _TOGETHER // problems)
    for start in range(0, resamples, together):
        rows = np.arange(min(together, resamples - start))[:, None]
        cells = rng.integers(problems, size=(len(rows), problems)) + problems * rows
        times = np.bincount(cells.ravel(), minlength=cells.size).reshape(cells.shape)
        parts.append(times.astype(np.uint16))
    return np.concatenate(parts)


def _tail(problems: int) -> float:
    """What is cut off at either end: 0.025, or less where there are few problems."""
    if problems == 1:
        return 0.0
    z, freedom = NormalDist().inv_cdf(0.975), problems - 1
    # The quantile of Student's distribution (Abramowitz & Stegun 26.7.5), to 1% from 3 degrees of freedom on.
    student = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return NormalDist().cdf(-sqrt(problems / freedom) * student)
