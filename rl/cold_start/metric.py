"""What a thought of a long chain is worth, and so which thoughts stay long. Long⊗Short (arXiv 2505.11827)."""

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import exp, fsum, lgamma, log, log2, sqrt

from turnwise.environments.errors import InputError

NO_GAIN = 0.25


def thought_scores(lengths: Sequence[int], success: Sequence[float], success_before: float) -> list[float]:
    """M(y_i) = log2(1 + T1 T2 P_i) − δ_i of each thought, in [−0.25, 1) (eq. 1).

    `lengths` are the thoughts' tokens. P_i, in `success`, is the share of continuations from the first i thoughts that
    end right, and `success_before` that without any thought. T1 is the share of the chain that remains after thought i,
    so that early thoughts count for more, and T2 the share that the thought itself leaves to the others, so that short
    ones do; δ is 0.25 where the thought brought no gain, P_i ≤ P_{i−1}. Raises InputError for anything else.
    """
    if not lengths or len(lengths) != len(success) or min(lengths) < 1:
        raise InputError(
            f"each thought needs a length of at least 1 token and a success rate; got {len(lengths)} lengths "
            f"{list(lengths)} and {len(success)} rates"
        )
    rates = [success_before, *success]
    if not all(0 <= rate <= 1 for rate in rates):
        raise InputError(f"a success rate must lie in [0, 1]; got {rates}")
    return [
        log2(1 + factor * rates[i]) - (NO_GAIN if rates[i] <= rates[i - 1] else 0)
        for i, factor in enumerate(remains(lengths), start=1)
    ]


def remains(lengths: Sequence[int]) -> list[float]:
    """T1 T2 of each thought: the share of the chain that remains after it, times the share that is not in it."""
    whole = sum(lengths)
    return [
        (whole - said) / whole * (whole - length) / whole
        for length, said in zip(lengths, accumulate(lengths), strict=True)
    ]


def stays_long(scores: Sequence[float]) -> list[bool]:
    """Whether each thought stays long: the first does, and each that scores more than all before it (§4.1)."""
    best = accumulate(scores, max, initial=float("-inf"))
    return [score > before for score, before in zip(scores, best, strict=False)]


def at_least(scores: Sequence[float], least: float) -> list[bool]:
    """In place of `stays_long`: the first thought, and each that scores `least` or more."""
    return [place == 0 or score >= least for place, score in enumerate(scores)]


def highest(scores: Sequence[float], count: int) -> list[bool]:
    """In place of `stays_long`: the first thought, and the `count` - 1 others that score most (of equals: earlier)."""
    others = sorted(range(1, len(scores)), key=lambda place: -scores[place])[: max(0, count - 1)]
    return [place == 0 or place in others for place in range(len(scores))]


def random_scores(count: int, seed: str) -> list[float]:
    """In place of M: scores that say nothing, uniform over its range. The paper's ablation."""
    rng = random.Random(seed)
    return [rng.uniform(-NO_GAIN, 1) for _ in range(count)]


def hoeffding(samples: int, confidence: float = 0.95) -> float:
    """How far at most, at this confidence, a share of so many samples is from the true one (eq. 5's ε)."""
    return sqrt(log(2 / (1 - confidence)) / (2 * samples))


def score_errors(lengths: Sequence[int], counts: Sequence[tuple[int, int]], *, confidence: float = 0.95) -> list[float]:
    """How far at most, at this confidence, each M is from what endless rollouts would give.

    `counts` are the (right, drawn) continuations after 0, 1, ... thoughts. The paper's bound (eq. 5) is T1 T2 ε / ln 2
    and leaves δ out; here 0.25 is added wherever P_i and P_{i−1}, each known to ε alone, may stand the other way round,
    since then δ may have misfired. With the paper's 5 or 8 rollouts that is nearly always so.
    """
    ranges = [(right / drawn, hoeffding(drawn, confidence)) for right, drawn in counts]
    found = []
    for i, factor in enumerate(remains(lengths), start=1):
        (share, error), (before, error_before) = ranges[i], ranges[i - 1]
        in_doubt = abs(share - before) <= error + error_before
        found.append(factor * error / log(2) + (NO_GAIN if in_doubt else 0))
    return found


def misfires(counts: Sequence[tuple[int, int]]) -> list[float]:
    """For each thought, how likely it is that δ is wrong: charged for a gain, or not charged for none.

    That P_i and P_{i−1} stand the other way round than their shares, each uniform before anything was drawn.
    """
    found = []
    for (right_before, drawn_before), (right, drawn) in pairwise(counts):
        gained = probability_of_gain(right_before, drawn_before, right, drawn)
        charged = right * drawn_before <= right_before * drawn
        found.append(gained if charged else 1 - gained)
    return found


def probability_of_gain(right_before: int, drawn_before: int, right: int, drawn: int) -> float:
    """That the true share behind (right, drawn) is more than that behind the other two, exactly.

    Each is Beta(right + 1, wrong + 1); the sum is the closed form of the probability that one exceeds the other.
    """
    a, b = right_before + 1, drawn_before - right_before + 1
    c, d = right + 1, drawn - right + 1
    terms = (exp(_log_beta(a + i, b + d) - log(d + i) - _log_beta(1 + i, d) - _log_beta(a, b)) for i in range(c))
    return min(1.0, fsum(terms))  # which rounding may exceed


def _log_beta(a: int, b: int) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)
