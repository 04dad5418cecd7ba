"""Which prefixes of a chain need more rollouts: those that can still change which of its thoughts stay long."""

from collections.abc import Sequence
from itertools import accumulate
from math import log2, sqrt

from turnwise.rl.cold_start.metric import NO_GAIN, remains


def final_share(right: int, drawn: int, samples: int, z: float) -> tuple[float, float]:
    """Where the share of right ones will lie once all `samples` are drawn, at `z` standard deviations.

    Wilson's interval with the correction for a finite population, within what those already drawn leave possible.
    """
    if drawn == 0:
        return 0.0, 1.0
    share, spread = right / drawn, z * z * (1 / drawn - 1 / samples)
    centre, half = share + spread / 2, sqrt(share * (1 - share) * spread + spread * spread / 4)
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    return max(low, right / samples), min(high, (right + samples - drawn) / samples)


def open_prefixes(lengths: Sequence[int], counts: Sequence[tuple[int, int]], samples: int, *, z: float) -> set[int]:
    """The prefixes, by their number of thoughts, that need more rollouts; `counts` are (right, drawn) of each, from 0.

    Each thought's M lies between what the ends of the final shares give. A thought's fate is settled where its M
    surely is, or surely is not, more than all before it. Of a thought that is not settled, what can move the
    comparison is open: its own prefix, the one before it while its gain is in doubt, and the same of each earlier
    thought that can raise the record.
    """
    shares = [final_share(right, drawn, samples, z) for right, drawn in counts]
    factors = remains(lengths)
    doubtful = [shares[i][0] <= shares[i - 1][1] and shares[i][1] > shares[i - 1][0] for i in range(1, len(shares))]
    lows, highs = [], []
    for i, factor in enumerate(factors):
        no_gain = shares[i + 1][1] <= shares[i][0]
        lows.append(log2(1 + factor * shares[i + 1][0]) - (NO_GAIN if no_gain or doubtful[i] else 0))
        highs.append(log2(1 + factor * shares[i + 1][1]) - (NO_GAIN if no_gain else 0))
    needed = set[int]()
    records = list(zip(accumulate(lows, max), accumulate(highs, max), strict=True))
    for i in range(1, len(factors)):
        surely, possibly = records[i - 1]
        if lows[i] > possibly or highs[i] <= surely:
            continue
        rivals = [j for j in range(i) if highs[j] > surely]
        for thought in (i, *rivals):
            needed |= {thought + 1, thought} if doubtful[thought] else {thought + 1}
    return {prefix for prefix in needed if counts[prefix][1] < samples}
