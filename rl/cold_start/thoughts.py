"""Long chains of thought: their steps, the thoughts that the steps make up, and what is known of each thought."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from turnwise.environments.problem import Problem
from turnwise.protocols.long_short import TAGS

CountTokens = Callable[[str], int]
"""The length of a text in tokens."""

_BREAK = re.compile(r"(?<=\n)[^\S\n]*\n\s*")
_TAG = re.compile("|".join(re.escape(tag) for pair in TAGS.values() for tags in pair for tag in tags))


def steps_of(chain: str) -> list[str]:
    """The paragraphs of a chain of thought, each with the blank lines behind it: joined, they are the chain.

    A paragraph of nothing but tags (`</think>` on a line of its own) belongs to the one before it, and at the
    beginning to the one after it. So the steps of the first few steps, joined, are those few steps.
    """
    ends = [match.end() for match in _BREAK.finditer(chain)]
    starts = [start for start, end in pairwise([0, *ends, len(chain)]) if without_tags(chain[start:end])]
    return [chain[start:end] for start, end in pairwise([0, *starts[1:], len(chain)]) if start < end]


def without_tags(text: str) -> str:
    """The text as it can stand inside a turn: without the five tags of Long⊗Short, and stripped."""
    # By a space: what stands around a tag must not close up to another one.
    return _TAG.sub(" ", text).strip()


def has_tags(text: str) -> bool:
    """Whether one of the five tags stands in a text."""
    return _TAG.search(text) is not None


@dataclass(frozen=True, slots=True)
class Thought:
    """One logical block of a chain: its text as the model wrote it, its broad kind, and its length in tokens."""

    text: str
    kind: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Chain:
    """A problem whose `solution` is a long chain of thought that answers it rightly, and the thoughts in it."""

    problem: Problem
    thoughts: tuple[Thought, ...]

    @property
    def lengths(self) -> list[int]:
        """The thoughts' tokens."""
        return [thought.tokens for thought in self.thoughts]


@dataclass(frozen=True, slots=True)
class WeighedChain:
    """A chain with what each thought is worth, and whether it stays long.

    `right` of `rollouts` continuations from the first i thoughts ended right, for i = 0 (no thought) to all of them;
    they took `rollout_tokens` tokens each on average. `scores` are M or what was put in its place, one a thought;
    `errors` and `misfires` say how far M can be trusted (`turnwise.rl.cold_start.metric`). The first thought is long.
    """

    chain: Chain
    right: tuple[int, ...]
    rollouts: tuple[int, ...]
    rollout_tokens: tuple[float, ...]
    scores: tuple[float, ...]
    errors: tuple[float, ...]
    misfires: tuple[float, ...]
    long: tuple[bool, ...]

    @property
    def success(self) -> list[float]:
        """The share of continuations that ended right, for i = 0 to all thoughts."""
        return [right / rollouts for right, rollouts in zip(self.right, self.rollouts, strict=True)]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A chain that could not be used: at which stage, and why."""

    id: str
    stage: str
    reason: str


def count_words(text: str) -> int:
    """Words, where there is no tokenizer, as with scripted agents."""
    return len(text.split())
