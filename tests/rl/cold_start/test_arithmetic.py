"""The short thoughts of arithmetic chains, by rule."""

import random
import re
from itertools import islice

import pytest

from turnwise.environments.arithmetic import generate, parse_chain
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Message, Turn
from turnwise.rl.arithmetic_lessons import think_through
from turnwise.rl.cold_start.arithmetic import complete_by_rule
from turnwise.rl.cold_start.chunking import chunk_by_rules
from turnwise.rl.cold_start.completion import check_contents, completion_request
from turnwise.rl.cold_start.thoughts import Chain, Thought, WeighedChain, steps_of


def written(problem: Problem, thoughts: list[tuple[str, str, bool]]) -> dict[int, str]:
    """What the rule writes of a chain whose thoughts are given as (text, kind, stays long)."""
    count = len(thoughts)
    chain = Chain(problem, tuple(Thought(text, kind, 1) for text, kind, _ in thoughts))
    ones = (1,) * (count + 1)
    long = tuple(stays for _, _, stays in thoughts)
    request = completion_request(
        WeighedChain(chain, ones, ones, ones, (0.0,) * count, (0.0,) * count, (0.0,) * count, long)
    )
    turn = Turn("helper", "ask", (Message("user", request.statement),), (), 4096)
    return check_contents(request, complete_by_rule([problem])(turn, 0))


def test_the_rule_as_literals() -> None:
    problem = Problem("p", "?", "5", solution="7 ×3 +8 -4")
    restated, final = ("Okay, 7.", "problem understanding", True), ("\\boxed{5}", "final answer", False)
    first = ("Now 7×3=21, so the digit is 1.", "calculation")
    second = ("Now 1+8=9, so the digit is 9.\n\nNow 9-4=5, so the digit is 5.", "calculation")
    check = ("Wait, let me check: 3×7=21, so 1 again.", "verification", False)
    assert written(problem, [restated, (*first, False), check, (*second, True), final]) == {
        2: "7×3=21, so 1.", 3: "good", 5: r"\boxed{5}",
    }  # fmt: skip
    assert written(problem, [restated, (*first, True), check, (*second, False), final]) == {
        3: "good", 4: "1+8=9, so 9.\n\n9-4=5, so 5.", 5: r"\boxed{5}",
    }  # fmt: skip
    assert written(problem, [restated, (*first, False), (*second, False), final]) == {
        2: "7×3=21, so 1.", 3: "1+8=9, so 9.\n\n9-4=5, so 5.", 4: r"\boxed{5}",
    }  # fmt: skip
    assert written(problem, [(f"{restated[0]}\n\n{first[0]}\n\n{second[0]}", "planning", True), final]) == {
        2: r"\boxed{5}"
    }


def test_a_step_that_comes_again_is_not_taken_for_its_first_time() -> None:
    problem = Problem("p", "?", "2", solution="0 ×3 +5 -5 ×3 +2")
    thoughts = [
        ("Okay, 0.", "problem understanding", True),
        ("Now 0×3=0, so the digit is 0.\n\nNow 0+5=5, so the digit is 5.", "calculation", False),
        ("Now 5-5=0, so the digit is 0.", "calculation", False),
        ("Now 0×3=0, so the digit is 0.\n\nNow 0+2=2, so the digit is 2.", "calculation", True),
        ("So the digits are.", "conclusion", False),
    ]
    assert written(problem, thoughts) == {2: "0×3=0, so 0.", 3: "0+5=5, so 5.\n\n5-5=0, so 0.", 5: "good"}


DONE = re.compile(r"\d([-+×]\d)=-?\d+, so (?:the digit is )?(\d)\.")


@pytest.mark.parametrize("level", [1, 2, 3, 6, 12])
def test_long_thoughts_and_those_of_the_rule_take_every_step_once_and_in_order(level: int) -> None:
    rng = random.Random(level)
    for problem in islice(generate("train", levels=(level,), seed=level), 60):
        arithmetic = parse_chain(problem)
        text = think_through(arithmetic, rng)
        steps = steps_of(text)
        blocks = chunk_by_rules(steps)
        texts = ["".join(steps[block.start - 1 : block.end]) for block in blocks]
        long = [True, *(rng.random() < 0.4 for _ in blocks[1:-1]), False]
        contents = written(problem, [(t, b.kind, stays) for t, b, stays in zip(texts, blocks, long, strict=True)])
        said = [texts[place] if stays else contents[place + 1] for place, stays in enumerate(long)]
        assert DONE.findall("\n".join(said)) == [
            (f"{operation}{operand}", str(digit))
            for (operation, operand), digit in zip(arithmetic.steps, arithmetic.digits, strict=True)
        ]
        assert said[-1] == f"\\boxed{{{problem.answer}}}"
