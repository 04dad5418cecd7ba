"""pass@k, and bootstrap intervals for which problems are drawn again, each with all of its samples."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Sums = NDArray[np.float64]
"""Of each column, its sum over problems; in front of the columns, any further axes."""

Statistic = Callable[..., NDArray[np.float64]]
"""From the sums of each group to a figure, for all further axes at once."""

RESAMPLES = 2000
_TOGETHER = 2**20  # draws in memory at a time


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
    statistic: Statistic, *groups: NDArray[np.float64], seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """A figure of one or several groups of problems, with its 95% interval.

    A group has a row for each problem and a column for each thing that is summed over problems; `statistic` gets the
    sums of each group. Problems of one group are drawn together, so what two teams came to on the same problems goes
    into one group, as further columns: that is the paired bootstrap. Several groups are drawn independently.

    The interval is the expanded percentile one (Hesterberg 2015, arXiv 1411.5279, §5.3): as wide as Student's for so
    many problems, where the plain percentiles are too narrow for few. Resamples that the statistic is not finite for
    (nothing was right, say) are left out.
    """
    if not groups or not all(len(group) for group in groups):
        raise ValueError("a bootstrap needs at least one problem in each group")
    value = float(statistic(*(group.sum(axis=0) for group in groups)))
    drawn = np.concatenate(list(_drawn(statistic, groups, seed, resamples)))
    finite = drawn[np.isfinite(drawn)]
    if not len(finite):
        return Estimate(value, value, value)
    tail = _tail(min(map(len, groups)))
    low, high = np.quantile(finite, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def _drawn(
    statistic: Statistic, groups: tuple[NDArray[np.float64], ...], seed: int, resamples: int
) -> Iterator[NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    together = max(1, _TOGETHER // sum(map(len, groups)))
    with np.errstate(divide="ignore", invalid="ignore"):
        for start in range(0, resamples, together):
            count = min(together, resamples - start)
            yield statistic(*(_times_drawn(rng, len(group), count) @ group for group in groups))


def _times_drawn(rng: np.random.Generator, problems: int, resamples: int) -> NDArray[np.float64]:
    """How often each problem (column) is in each resample (row)."""
    chosen = rng.integers(problems, size=(resamples, problems)) + problems * np.arange(resamples)[:, None]
    return np.bincount(chosen.ravel(), minlength=chosen.size).reshape(chosen.shape).astype(np.float64)


def _tail(problems: int) -> float:
    """What is cut off at either end: 0.025, or less where there are few problems."""
    if problems == 1:
        return 0.0
    z, freedom = NormalDist().inv_cdf(0.975), problems - 1
    # The quantile of Student's distribution (Abramowitz & Stegun 26.7.5), to 1% from 3 degrees of freedom on.
    student = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return NormalDist().cdf(-sqrt(problems / freedom) * student)
