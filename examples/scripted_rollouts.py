"""Thousands of scripted episodes, no model at all: how a protocol behaves if its agents were so and so good.

    python examples/scripted_rollouts.py

Two scripted agents play Long⊗Short on arithmetic: the long one goes one step further in each thought, rightly with
probability `skill`, and the short one asks for another thought while steps are left. Expect accuracy to fall with the
number of steps, the faster the lower the skill, while tokens grow with it.
"""

import random
import re

from rich.console import Console

from turnwise.agents.scripted import ScriptedAgent
from turnwise.analysis.tables import comparison, levels
from turnwise.command import run
from turnwise.environments.arithmetic import apply, arithmetic, parse_chain
from turnwise.environments.math_grader import MathGrader
from turnwise.environments.transcript import Turn
from turnwise.protocols.long_short import LongShort
from turnwise.show import play_shown


def main(number: int = 1000, seed: int = 0) -> None:
    """Plays `number` problems for each of three skills."""
    console = Console()
    with MathGrader() as grader:
        environment = arithmetic(grader, count=number, seed=seed)
        chains = {problem.question: parse_chain(problem) for problem in environment.problems}

        def think(turn: Turn, skill: float, rng: random.Random) -> str:
            chain, said = chains[question(turn)], digits(turn)
            operation, operand = chain.steps[len(said)]
            right = apply(said[-1] if said else chain.start, operation, operand) % 10
            return (
                f"<think> Step {len(said) + 1} gives {right if rng.random() < skill else rng.randrange(10)}. </think>"
            )

        def answer(turn: Turn, seed: int) -> str:
            said, steps = digits(turn), len(chains[question(turn)].steps)
            finished = len(said) == steps or turn.prefill
            return f"<answer> \\boxed{{{said[-1]}}} </answer>" if finished else "<answer> Go on. </rethink>"

        runs = {}
        for skill in (0.99, 0.9, 0.7):
            long = ScriptedAgent(lambda turn, seed, skill=skill: think(turn, skill, random.Random(seed)))
            team = {"long": long, "short": ScriptedAgent(answer)}
            title = f"skill {skill:.0%}"
            runs[title] = play_shown(title, LongShort(max_turns=14), team, environment, console, seed=seed)
    console.print(comparison(runs, baseline="skill 99%", title=f"{3 * number} scripted episodes"))
    console.print(levels(runs, title="Right, in how many tokens, by level"))


def question(turn: Turn) -> str:
    """The problem that is being solved."""
    return next(message.text for message in turn.messages if message.role == "user")


def digits(turn: Turn) -> list[int]:
    """The digits that the thoughts so far have given, one a step."""
    return [int(digit) for message in turn.messages for digit in re.findall(r"gives (\d)", message.text)]


if __name__ == "__main__":
    run(main)
