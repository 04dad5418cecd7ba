"""What a thought of a long chain is worth, and so which thoughts stay long. Long⊗Short (arXiv 2505.11827)."""

from collections.abc import Sequence
from itertools import accumulate
from math import log2

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
    whole = sum(lengths)
    return [
        log2(1 + (whole - said) / whole * (whole - length) / whole * rates[i])
        - (NO_GAIN if rates[i] <= rates[i - 1] else 0)
        for i, (length, said) in enumerate(zip(lengths, accumulate(lengths), strict=True), start=1)
    ]


def stays_long(scores: Sequence[float]) -> list[bool]:
    """Whether each thought stays long: the first does, and each that scores more than all before it (§4.1)."""
    best = accumulate(scores, max, initial=float("-inf"))
    return [score > before for score, before in zip(scores, best, strict=False)]
