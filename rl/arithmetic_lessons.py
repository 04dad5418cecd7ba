"""What the tiny models are taught: arithmetic conversations, played through the very protocols they will meet."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from turnwise.agents.chat import ChatTemplate
from turnwise.environments.arithmetic import PROBLEM_SETS, Chain, apply, generate, parse_chain
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Turn
from turnwise.protocols.graph import GraphProtocol, State, TurnGraph
from turnwise.protocols.long_short import LONG_INSTRUCTION, SHORT_INSTRUCTION, LongShort
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.protocols.rewards import Correctness, RewardSum
from turnwise.protocols.solo import Solo
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.demonstrations import Conversation, demonstrate, tokenised
from turnwise.rl.trajectory import TokenSequence

Speaker = Callable[[Turn, Chain, int, random.Random], tuple[str, int]]
"""Says a turn about a chain of which so many steps are done: the text, and how many are done after it."""

LEVELS = PROBLEM_SETS["mixed"]
# At once only the first level can be learnt to the end, so it is practised most.
SHORT_LEVELS = (1, 1, 1, 1, 2, 2, 3, 4, 5, 6)
CHECKED_SHARE = 0.6
# With a partner, a thought may also be put in few words. That is rare, so that there is something to find.
TERSE_SHARE = 0.2


def thoughts(chain: Chain, first: int, last: int, rng: random.Random) -> str:
    """Steps `first` to `last` of a chain, thought aloud one to a paragraph, many of them checked as real ones are."""
    paragraphs = []
    for index in range(first, last):
        before = chain.digits[index - 1] if index else chain.start
        operation, operand = chain.steps[index]
        full, digit = apply(before, operation, operand), chain.digits[index]
        paragraphs.append(f"Now {before}{operation}{operand}={full}, so the digit is {digit}.\n\n")
        if rng.random() < CHECKED_SHARE:
            paragraphs.append(f"Wait, let me check: {_check(before, operation, operand, digit)}.\n\n")
    return "".join(paragraphs)


def terse_thoughts(chain: Chain, first: int, last: int) -> str:
    """Steps `first` to `last` of a chain, thought aloud in as few words as still show how."""
    befores = [chain.start, *chain.digits]
    return "".join(
        f"{before}{operation}{operand}={apply(before, operation, operand)}, so {digit}.\n\n"
        for before, (operation, operand), digit in list(zip(befores, chain.steps, chain.digits, strict=False))[
            first:last
        ]
    )


def marks(chain: Chain, first: int, last: int) -> str:
    """Steps `first` to `last` of a chain as short as they can be written: the operation, and the digit after it."""
    steps = zip(chain.steps[first:last], chain.digits[first:last], strict=True)
    return "".join(f" {operation}{operand}→{digit}" for (operation, operand), digit in steps)


def _check(before: int, operation: str, operand: int, digit: int) -> str:
    if operation == "-":
        return f"{digit}+{operand}={digit + operand}, which ends in {before}, good"
    return f"{operand}{operation}{before}={apply(operand, operation, before)}, so {digit} again"


def think_through(chain: Chain, rng: random.Random) -> str:
    """A long answer: the question restated, every step, the chain once more, and the answer."""
    restated = ", ".join(f"then {operation}{operand}" for operation, operand in chain.steps)
    course = ", ".join(str(digit) for digit in [chain.start, *chain.digits])
    return (
        f"Okay, I need to take {chain.start}, {restated}, modulo 10.\n\n{thoughts(chain, 0, len(chain.steps), rng)}"
        f"So the digits are {course}.\n\n</think>The answer is \\boxed{{{chain.digits[-1]}}}."
    )


def say_alone(turn: Turn, chain: Chain, done: int, rng: random.Random, *, most: int = 2) -> tuple[str, int]:
    """One turn alone: `<think>` and a long answer, `<short>` and `most` steps or fewer, `<answer>` and the digit."""
    everything = len(chain.steps)
    if turn.state == "route":
        return rng.choice(("<short>", "<think>")), done
    if turn.seat == "short":
        return f"<answer> \\boxed{{{chain.digits[-1]}}}</answer>", everything
    if turn.state == "short":
        shown = min(everything, rng.randint(0, most))
        return f"{marks(chain, 0, shown)} \\boxed{{{chain.digits[-1]}}}", everything
    opening = "<think>" if turn.seat == "long" else ""
    return opening + think_through(chain, rng), everything


def say_together(turn: Turn, chain: Chain, done: int, rng: random.Random) -> tuple[str, int]:
    """One turn of Long⊗Short: a step or two in long thoughts; or some in short ones, then the answer or a rethink."""
    everything = len(chain.steps)
    left = everything - done
    if turn.seat == "long":
        now = done + min(left, rng.choice((1, 1, 2)))
        terse = rng.random() < TERSE_SHARE
        thought = terse_thoughts(chain, done, now) if terse else thoughts(chain, done, now, rng)
        return f"<think>{thought}</think>", now
    forced = bool(turn.prefill)
    now = done + (left if forced else min(left, rng.choice((1, 1, 2, 3, 6))))
    opening = "" if forced else "<answer>"
    closing = f" \\boxed{{{chain.digits[-1]}}}</answer>" if now == everything else "</rethink>"
    return opening + marks(chain, done, now) + closing, now


def say_interrupted(turn: Turn, chain: Chain, done: int, rng: random.Random) -> tuple[str, int]:
    """A long answer whose thought is broken off behind any of its paragraphs, or before the first; then the answer."""
    thought, _, answer = think_through(chain, rng).partition("</think>")
    if turn.seat == "solver":
        return answer, len(chain.steps)
    paragraphs = thought.split("\n\n")
    said = rng.randrange(len(paragraphs))
    return "<think>" + "".join(f"{paragraph}\n\n" for paragraph in paragraphs[:said]), done


@dataclass(frozen=True, slots=True)
class Lesson:
    """One kind of conversation: how often it is taught, who says what, which seats learn from it, at which levels."""

    weight: float
    protocol: ReasoningProtocol
    say: Speaker
    seats: tuple[str, ...]
    levels: tuple[int, ...]


ALONE_LONG, ALONE_SHORT = Solo("long"), Solo("short", stops=("</answer>",))
# Told of a partner that has not spoken, as where a gate leaves the dialogue shut.
UNAIDED_LONG = Solo("long", instruction=LONG_INSTRUCTION)
UNAIDED_SHORT = Solo("short", instruction=SHORT_INSTRUCTION, stops=("</answer>",))
INTERRUPTED = GraphProtocol(
    TurnGraph(
        seats={"thinker": "", "solver": ""},
        start="think",
        states={"think": State(seat="thinker", then="answer"), "answer": State(seat="solver", prefill="</think>")},
    ),
    RewardSum((Correctness(),)),
)
ROUTED, BRIEF = Thinkless(), Thinkless(mode="short")
TOGETHER, CUT_SHORT = LongShort(), LongShort(max_turns=2)

LESSONS = {
    # Answers at once are few tokens, of which one is hard: they take many samples.
    "base": (
        Lesson(0.15, ROUTED, say_alone, ("solver",), LEVELS),
        Lesson(0.10, ALONE_LONG, say_alone, ("long",), LEVELS),
        Lesson(0.20, TOGETHER, say_together, ("long", "short"), LEVELS),
        Lesson(0.05, CUT_SHORT, say_together, ("long", "short"), LEVELS),
        Lesson(0.15, ALONE_SHORT, say_alone, ("short",), SHORT_LEVELS),
        Lesson(0.10, UNAIDED_SHORT, say_alone, ("short",), SHORT_LEVELS),
        Lesson(0.25, BRIEF, say_alone, ("solver",), SHORT_LEVELS),
    ),
    "novice": (
        Lesson(0.15, ALONE_LONG, say_alone, ("long",), LEVELS),
        Lesson(0.10, UNAIDED_LONG, say_alone, ("long",), LEVELS),
        Lesson(0.15, ALONE_SHORT, say_alone, ("short",), SHORT_LEVELS),
        Lesson(0.10, UNAIDED_SHORT, say_alone, ("short",), SHORT_LEVELS),
        Lesson(0.50, INTERRUPTED, say_interrupted, ("solver",), LEVELS),
    ),
    "long": (
        Lesson(0.5, ALONE_LONG, say_alone, ("long",), LEVELS),
        Lesson(0.4, TOGETHER, say_together, ("long",), LEVELS),
        Lesson(0.1, CUT_SHORT, say_together, ("long",), LEVELS),
    ),
    "short": (
        Lesson(0.4, ALONE_SHORT, say_alone, ("short",), SHORT_LEVELS),
        Lesson(0.2, UNAIDED_SHORT, say_alone, ("short",), SHORT_LEVELS),
        Lesson(0.3, TOGETHER, say_together, ("short",), LEVELS),
        Lesson(0.1, CUT_SHORT, say_together, ("short",), LEVELS),
    ),
    "router": (
        Lesson(0.6, ROUTED, partial(say_alone, most=3), ("solver",), LEVELS),
        Lesson(0.4, BRIEF, partial(say_alone, most=3), ("solver",), SHORT_LEVELS),
    ),
}


def converse(protocol: ReasoningProtocol, problem: Problem, say: Speaker, rng: random.Random) -> Conversation:
    """A conversation about an arithmetic problem, as `say` would have it."""
    chain, done = parse_chain(problem), 0

    def next_text(turn: Turn) -> str:
        nonlocal done
        text, done = say(turn, chain, done, rng)
        return text

    return demonstrate(protocol, problem, next_text)


def lessons(role: str, template: ChatTemplate, seed: int) -> Iterator[TokenSequence]:
    """An endless stream of training sequences for a role: a key of `LESSONS`."""
    rng = random.Random(f"lessons {role} {seed}")
    taught = LESSONS[role]
    streams = {lesson.levels: _problems(lesson.levels, seed) for lesson in taught}
    while True:
        (lesson,) = rng.choices(taught, weights=[lesson.weight for lesson in taught])
        said = converse(lesson.protocol, next(streams[lesson.levels]), lesson.say, rng)
        yield from tokenised(said, template, lesson.seats)


def _problems(levels: tuple[int, ...], seed: int) -> Iterator[Problem]:
    """Training problems without end. The first level has few, so every round draws them anew."""
    round_ = 0
    while True:
        stream = generate("train", levels=levels, seed=1000 * seed + round_)
        yield from (next(stream) for _ in range(2000))
        round_ += 1
