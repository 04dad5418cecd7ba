"""Procedural arithmetic: chains of one-digit steps modulo 10, offline, exact, and as deep as one likes.

A chain starts at a digit and adds, subtracts or multiplies by one digit at each step; only the last digit is ever kept
(start 7, ×3, +8, −4 gives 1, 9, 5). One step is a look-up that any small model can make at once, so the number of
steps, which is the level, is the depth of reasoning that a problem asks for: short answers are right on easy levels
only, and long thoughts on all of them.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from turnwise.environments.environment import Environment, Grader
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem

Split = Literal["train", "test"]

# As GSM8K, MATH-500 and AIME stand to each other: mostly within reach of a short answer, spread out, mostly beyond it.
PROBLEM_SETS = {"easy": (1, 2), "mixed": (1, 2, 3, 4, 5, 6), "hard": (5, 6)}
TEST_SHARE = 0.1

_NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo")
_PHRASES = {
    "+": ("adds {b}", "counts {b} up"),
    "-": ("subtracts {b}", "takes {b} away"),
    "×": ("multiplies it by {b}", "multiplies by {b}"),
}
_ORDERS = {"+": "Add {b}", "-": "Subtract {b}", "×": "Multiply by {b}"}
_WORDINGS = (
    "What is {expression}, modulo 10?",
    "Work out {expression}. What is the result modulo 10?",
    "Start with {start}. {orders}. What is that modulo 10?",
    "A dial with the digits 0 to 9 shows {start}. {name} {phrases}, always modulo 10. What does the dial show?",
    "{name} has a counter with one digit, which shows {start}. {name} {phrases}. Which digit does it show, modulo 10?",
    "{name} thinks of {start}, then {phrases}. What is the result modulo 10?",
)


@dataclass(frozen=True, slots=True)
class Chain:
    """A starting digit and the steps taken from it, each an operation ("+", "-" or "×") and a digit from 2 to 9."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def digits(self) -> list[int]:
        """The digit after each step, modulo 10; the last one is the answer."""
        digits, digit = [], self.start
        for operation, operand in self.steps:
            digit = apply(digit, operation, operand) % 10
            digits.append(digit)
        return digits

    @property
    def expression(self) -> str:
        """The chain in one formula, for example `((7×3)+8)-4`."""
        text = str(self.start)
        for index, (operation, operand) in enumerate(self.steps):
            text = f"{text}{operation}{operand}" if index == 0 else f"({text}){operation}{operand}"
        return text


def apply(digit: int, operation: str, operand: int) -> int:
    """The full result of one step, before its last digit is kept; it may be negative."""
    return {"+": digit + operand, "-": digit - operand, "×": digit * operand}[operation]


def parse_chain(problem: Problem) -> Chain:
    """The chain that an arithmetic problem was made from, read back from its `solution`."""
    start, *steps = problem.solution.split()
    return Chain(int(start), tuple((step[0], int(step[1:])) for step in steps))


def split_of(chain: Chain, question: str) -> Split:
    """The split that a problem belongs to, a pure function of the problem, so that the splits can never meet.

    Chains of two or more steps are split by chain, however they are worded. The few chains of one step are the tables
    of arithmetic themselves, of which none can be left out of teaching: there the wording is held out.
    """
    key = question if len(chain.steps) == 1 else f"{chain.start} {chain.steps}"
    fraction = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest()) / 2**32
    return "test" if fraction < TEST_SHARE else "train"


def generate(split: Split, *, levels: Sequence[int] = PROBLEM_SETS["mixed"], seed: int = 0) -> Iterator[Problem]:
    """An endless stream of problems of one split, levels in turn (so that any prefix is balanced), without repeats.

    Raises InputError for a level below 1, and where a level has run out of new problems.
    """
    if not levels or min(levels) < 1:
        raise InputError(f"an arithmetic level is a number of steps, at least 1; got {list(levels)}")
    rng, seen = random.Random(f"{split} {seed}"), set[str]()
    while True:
        for level in levels:
            problem = next((p for p in _attempts(rng, split, level) if p.question not in seen), None)
            if problem is None:
                raise InputError(f"arithmetic level {level} has no more new problems for split {split!r}")
            seen.add(problem.question)
            yield problem


def arithmetic(
    grader: Grader, *, problem_set: str = "mixed", count: int, split: Split = "test", seed: int = 0
) -> Environment:
    """`count` problems of a named set ("easy", "mixed", "hard"). Raises InputError for an unknown set."""
    if problem_set not in PROBLEM_SETS:
        raise InputError(f"no arithmetic problem set {problem_set!r}; there are {', '.join(PROBLEM_SETS)}")
    stream = generate(split, levels=PROBLEM_SETS[problem_set], seed=seed)
    return Environment(f"arithmetic-{problem_set}", [next(stream) for _ in range(count)], grader)


def _attempts(rng: random.Random, split: Split, level: int) -> Iterator[Problem]:
    for _ in range(10_000):
        steps = tuple((rng.choice("+-×"), rng.randint(2, 9)) for _ in range(level))
        chain = Chain(rng.randint(0, 9), steps)
        question = _word(chain, rng)
        if split_of(chain, question) == split:
            digest = hashlib.blake2b(question.encode(), digest_size=6).hexdigest()
            solution = " ".join([str(chain.start), *(f"{operation}{operand}" for operation, operand in steps)])
            yield Problem(
                id=f"arithmetic-{level}-{digest}",
                question=question,
                answer=str(chain.digits[-1]),
                level=level,
                subject="arithmetic",
                solution=solution,
            )


def _word(chain: Chain, rng: random.Random) -> str:
    style = rng.randrange(2)
    phrases = [_PHRASES[operation][style].format(b=operand) for operation, operand in chain.steps]
    return rng.choice(_WORDINGS).format(
        expression=chain.expression,
        start=chain.start,
        name=rng.choice(_NAMES),
        phrases=", ".join(phrases[:-1]) + " and then " + phrases[-1] if len(phrases) > 1 else phrases[0],
        orders=". ".join(_ORDERS[operation].format(b=operand) for operation, operand in chain.steps),
    )
