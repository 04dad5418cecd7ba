"""Brevity rewards from the literature, each named after its paper.

All count sampled tokens: neither characters nor prompt nor prefill. Each pays what its paper adds to a 1 for a right
answer, so that `RewardSum((Correctness(), Weighted(term, weight)))` is the paper's reward; `CosineLength` alone is a
whole reward. Most of them, alone or summed, can rank a wrong answer above a right one: see `right_beats_wrong`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import cos, exp, isfinite, pi
from statistics import fmean, pstdev
from typing import ClassVar

from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.protocols.rewards import Term


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthTerm(Term):
    """A term that pays for brevity: of the whole dialogue, or with `seat_only` of the seat's own turns.

    The whole dialogue is what costs, and what a seat can shorten by needing fewer turns. With `seat_only`, a seat that
    never spoke has length 0.
    """

    seat_only: bool = False

    def lengths(self, group: Sequence[Episode], seat: str) -> list[int]:
        """The number of sampled tokens in each episode."""
        if not self.seat_only:
            return [episode.transcript.token_count for episode in group]
        return [
            sum(step.reply.token_count for step in episode.transcript.steps if step.seat == seat) for episode in group
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class KimiLength(LengthTerm):
    """Kimi k1.5 (arXiv 2501.12599, §2.3.3), the LM of Long⊗Short (arXiv 2505.11827, §4.2). In [−0.5, 0.5].

    λ = 0.5 − (length − min) / (max − min) over the group, right or wrong; a right answer is paid λ, a wrong one
    min(0, λ), and all are paid 0 where all lengths are equal.
    """

    name: ClassVar[str] = "kimi length"

    def pay(self, group: Sequence[Episode], seat: str) -> list[float]:
        """λ, or min(0, λ) for a wrong answer."""
        lengths = self.lengths(group, seat)
        shortest, span = min(lengths), max(lengths) - min(lengths)
        if not span:
            return [0.0] * len(group)
        shares = [0.5 - (length - shortest) / span for length in lengths]
        return [share if episode.right else min(0.0, share) for share, episode in zip(shares, group, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class CosineLength(LengthTerm):
    """Yeo et al. 2025 (arXiv 2502.03373, §4.2): a whole reward, so leave `Correctness` out of the sum.

    From its value at length 0 to its value at `longest` a reward goes along half a cosine wave,
    end + (start − end) (1 + cos(π length / longest)) / 2, falling for right answers and rising for wrong ones, so that
    the model thinks on where it fails. From `longest` on, `exceeded` is paid, right or wrong. The defaults are the
    paper's. Left out: the authors' penalty on repetition, and the 16 tokens that their code adds to a length before
    it compares.
    """

    name: ClassVar[str] = "cosine length"

    longest: int
    right: tuple[float, float] = (2.0, 1.0)
    wrong: tuple[float, float] = (-10.0, 0.0)
    exceeded: float = -10.0

    def __post_init__(self) -> None:
        _require_positive("longest", self.longest)
        if not all(map(isfinite, (*self.right, *self.wrong, self.exceeded))):
            raise InputError("the values of a cosine length reward must be finite numbers")

    def pay(self, group: Sequence[Episode], seat: str) -> list[float]:
        """The point on the curve of right or of wrong answers, or `exceeded`."""
        paid = []
        for length, episode in zip(self.lengths(group, seat), group, strict=True):
            start, end = self.right if episode.right else self.wrong
            on_curve = end + (start - end) * (1 + cos(pi * length / self.longest)) / 2
            paid.append(on_curve if length < self.longest else self.exceeded)
        return paid


@dataclass(frozen=True, slots=True, kw_only=True)
class L1ExactLength(LengthTerm):
    """LCPO-Exact, of L1 (Aggarwal & Welleck 2025, arXiv 2503.04697, eq. 1): −`rate` · |`target` − length|.

    The paper draws a target for each prompt and tells the model; here one target holds for all, and telling the
    model is left to the protocol's instruction.
    """

    name: ClassVar[str] = "l1 exact length"

    target: int
    rate: float = 0.0003

    def __post_init__(self) -> None:
        _require_positive("target", self.target)
        _require_positive("rate", self.rate)

    def pay(self, group: Sequence[Episode], seat: str) -> list[float]:
        """0 at the target, below 0 on either side of it, right or wrong."""
        return [-self.rate * abs(self.target - length) for length in self.lengths(group, seat)]


@dataclass(frozen=True, slots=True, kw_only=True)
class L1MaxLength(LengthTerm):
    """LCPO-Max, of L1 (Aggarwal & Welleck 2025, arXiv 2503.04697, eq. 2): a budget rather than a target.

    A right answer is worth clip(`rate` · (`target` − length) + `offset`, 0, 1) and a wrong one 0, so this pays the
    former less the 1 of `Correctness`, in [−1, 0]. On targets, see `L1ExactLength`.
    """

    name: ClassVar[str] = "l1 max length"

    target: int
    rate: float = 0.0003
    offset: float = 0.5

    def __post_init__(self) -> None:
        _require_positive("target", self.target)
        _require_positive("rate", self.rate)
        if not isfinite(self.offset):
            raise InputError(f"offset must be a finite number; got {self.offset}")

    def pay(self, group: Sequence[Episode], seat: str) -> list[float]:
        """What the length takes from a right answer's 1; 0 for a wrong one."""
        worth = [self.rate * (self.target - length) + self.offset for length in self.lengths(group, seat)]
        return [
            min(1.0, max(0.0, value)) - 1.0 if episode.right else 0.0
            for value, episode in zip(worth, group, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class O1PrunerLength(LengthTerm):
    """O1-Pruner (arXiv 2501.12570, length-harmonizing reward): reference / length − 1. In (−1, ∞), right or wrong.

    `references` gives, by problem id, the mean length of the reference model's samples. The paper's other half,
    λ (accuracy − mean accuracy of the reference), is `Correctness` with weight λ (2 in the paper): its mean is the
    same for the whole group and vanishes in a group's baseline. An empty episode counts as one token.
    """

    name: ClassVar[str] = "o1 pruner length"

    references: Mapping[str, float]

    def __post_init__(self) -> None:
        for problem, reference in self.references.items():
            _require_positive(f"the reference length of problem {problem!r}", reference)

    def pay(self, group: Sequence[Episode], seat: str) -> list[float]:
        """Above 0 where the episode is shorter than the reference."""
        problem = group[0].transcript.problem.id
        if problem not in self.references:
            raise InputError(f"no reference length for problem {problem!r}: sample it with the reference model first")
        return [self.references[problem] / max(1, length) - 1 for length in self.lengths(group, seat)]


@dataclass(frozen=True, slots=True, kw_only=True)
class AroraZanetteLength(LengthTerm):
    """Training Language Models to Reason Efficiently (Arora & Zanette 2025, arXiv 2502.04463, §4). In (−1, 0].

    A right answer is worth 1 − α σ((length − mean) / deviation), mean and standard deviation (the population's)
    over the group's right answers and σ the logistic function; a wrong one 0. So this pays −σ(...) to right answers,
    −0.5 where they are equally long, and its weight in the sum is α, in [0, 1): a right answer stays above a wrong one.
    """

    name: ClassVar[str] = "arora zanette length"

    def pay(self, group: Sequence[Episode], seat: str) -> list[float]:
        """Minus the logistic function of the standardised length; 0 for a wrong answer."""
        lengths = self.lengths(group, seat)
        right = [length for length, episode in zip(lengths, group, strict=True) if episode.right]
        mean, deviation = (fmean(right), pstdev(right) or 1.0) if right else (0.0, 1.0)
        return [
            -1 / (1 + exp((mean - length) / deviation)) if episode.right else 0.0
            for length, episode in zip(lengths, group, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class DapoLength(LengthTerm):
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13). In [−1, 0], right or wrong.

    0 up to `longest` − `cushion` tokens, −1 beyond `longest`, and a straight line in between. The paper has 20,480
    and 4,096, and adds it to a reward of 1 or −1.
    """

    name: ClassVar[str] = "dapo length"

    longest: int
    cushion: int

    def __post_init__(self) -> None:
        if not 0 < self.cushion <= self.longest:
            raise InputError(f"the cushion must lie in 1..{self.longest} (longest); got {self.cushion}")

    def pay(self, group: Sequence[Episode], seat: str) -> list[float]:
        """The punishment for running over."""
        free = self.longest - self.cushion
        return [min(0.0, max(-1.0, (free - length) / self.cushion)) for length in self.lengths(group, seat)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShorterBetterLength(LengthTerm):
    """ShorterBetter (arXiv 2504.21370): −`rate` · |length − optimal|, right or wrong.

    Optimal is the length of the group's shortest right answer, or without one the group's mean length. The paper
    weighs `Correctness` with α, 2 or 1, beside it, and its rate is β.
    """

    name: ClassVar[str] = "shorter better length"

    rate: float = 0.001

    def __post_init__(self) -> None:
        _require_positive("rate", self.rate)

    def pay(self, group: Sequence[Episode], seat: str) -> list[float]:
        """0 at the optimal length, below 0 on either side of it."""
        lengths = self.lengths(group, seat)
        right = [length for length, episode in zip(lengths, group, strict=True) if episode.right]
        optimal = min(right) if right else fmean(lengths)
        return [-self.rate * abs(length - optimal) for length in lengths]


@dataclass(frozen=True, slots=True, kw_only=True)
class DrpoLength(LengthTerm):
    """After DRPO (arXiv 2510.04474): right answers share their pay by brevity, among themselves alone.

    The n right answers of a group are worth n · softmax((1 − length / `longest`) / `temperature`), 1 on average and
    never below 0, and a wrong one 0; this pays the former less the 1 of `Correctness`. The paper (λ is its temperature,
    the maximal response length its `longest`) puts these weights into a discriminative loss; here they weigh the
    reward, so only the order is kept, not its guarantee that no right answer gets a negative advantage.
    """

    name: ClassVar[str] = "drpo length"

    longest: int
    temperature: float

    def __post_init__(self) -> None:
        _require_positive("longest", self.longest)
        _require_positive("temperature", self.temperature)

    def pay(self, group: Sequence[Episode], seat: str) -> list[float]:
        """What a right answer gains or loses against an equal share; 0 for a wrong one."""
        lengths = self.lengths(group, seat)
        right = [length for length, episode in zip(lengths, group, strict=True) if episode.right]
        # Relative to the shortest, so that no exponential overflows.
        weights = [exp((min(right) - length) / self.longest / self.temperature) for length in right]
        mean = fmean(weights) if weights else 1.0
        shares = iter(weights)
        return [next(shares) / mean - 1 if episode.right else 0.0 for episode in group]


def _require_positive(what: str, value: float) -> None:
    if not (isfinite(value) and value > 0):
        raise InputError(f"{what} must be a finite number above 0; got {value}")
