"""What Monte Carlo rollouts cost beside the model, what stopping them early saves, and how far a score can be trusted.

    python benchmarks/cold_start.py [--chains 1000] [--simulated 300]

First, chains of 12 thoughts with 300 words each are rolled out: 8 continuations of each of the 13 prefixes, by an agent
that is a function, through the driver, `RolloutStore` and `MathGrader`. All but the model is then what it is in a real
run. The peak of the process's memory is read after the first tenth of the rollouts and at the end. The time is held
against that of grading alone, on the prefixes of every tenth chain.

Then chains are simulated, whose true success is known. It leaps at two or three thoughts; it wanders, and stays where
it is at half of them; or it rises by a little at each. Stopping early is held against drawing all 128 samples, of the
same draws. The bounds on M are held against M of the true success, which is that of endless rollouts.
"""

import argparse
import asyncio
import random
import resource
import time
from collections.abc import Callable
from contextlib import aclosing
from math import log
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.progress import track
from rich.table import Table

from turnwise.agents.scripted import ScriptedAgent
from turnwise.environments.math_grader import MathGrader
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Turn
from turnwise.rl.cold_start.metric import hoeffding, remains, score_errors, stays_long, thought_scores
from turnwise.rl.cold_start.rollouts import Continuation, Prefixes, RolloutSettings, RolloutStore, draw
from turnwise.rl.cold_start.stopping import open_prefixes
from turnwise.rl.cold_start.thoughts import Chain, Thought

THOUGHTS = 12
SAMPLES = 8
WORDS = (
    "so",
    "let",
    "us",
    "see",
    "what",
    "follows",
    "when",
    "the",
    "first",
    "one",
    "is",
    "added",
    "to",
    "the",
    "second",
)
Success = Callable[[random.Random, int], list[float]]


def chain(number: int) -> Chain:
    rng, thoughts = random.Random(number), list[Thought]()
    for _ in range(THOUGHTS):
        paragraphs = (" ".join(rng.choices(WORDS, k=50)) for _ in range(6))
        thoughts.append(Thought("".join(f"{text}.\n\n" for text in paragraphs), "calculation", 300))
    text = "".join(thought.text for thought in thoughts)
    return Chain(Problem(f"chain {number}", f"How much is it, of {number}?", "408", solution=text), tuple(thoughts))


def reply(turn: Turn, seed: int) -> str:
    right = seed % 100 < 10 + len(turn.messages)
    return f"So 24 × 17 is 340 and 68, and the answer is $\\boxed{{{408 if right else seed % 1000}}}$."


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


async def roll_out(chains: list[Chain], folder: Path, grader: MathGrader) -> tuple[float, float]:
    """Seconds, and the peak of memory after a tenth."""
    most, tenth, done = len(chains) * (THOUGHTS + 1) * SAMPLES, 0.0, 0
    start = time.perf_counter()
    with RolloutStore(folder, {"protocol": "bench"}) as store:
        settings = RolloutSettings(samples=SAMPLES)
        stream = draw(chains, Continuation(), ScriptedAgent(reply), grader, settings, store)
        async with aclosing(stream):
            async for _ in stream:
                done += 1
                if done == most // 10:
                    tenth = peak_megabytes()
        if done != most or store.drawn != most:
            raise RuntimeError(f"{done} continuations were drawn and {store.drawn} kept, not {most}")
    return time.perf_counter() - start, tenth


async def grade_alone(chains: list[Chain], grader: MathGrader) -> float:
    """Seconds for as many texts as there are continuations of these chains."""
    start = time.perf_counter()
    for one in chains:
        for prefix in Prefixes([one], [(0, thoughts) for thoughts in range(THOUGHTS + 1)]):
            for sample in range(SAMPLES):
                await grader.grade(prefix, f"{prefix.solution}The answer is $\\boxed{{{sample}}}$.")
    return time.perf_counter() - start


def show_rollouts(count: int) -> None:
    chains = [chain(number) for number in range(count)]
    before = peak_megabytes()
    with TemporaryDirectory() as folder, MathGrader() as grader:
        seconds, tenth = asyncio.run(roll_out(chains, Path(folder) / "run", grader))
        end = peak_megabytes()
        alone = asyncio.run(grade_alone(chains[::10], grader)) / len(chains[::10]) * len(chains)
    rollouts = count * (THOUGHTS + 1) * SAMPLES
    table = Table(title=f"{count} chains × {THOUGHTS + 1} prefixes × {SAMPLES}: {rollouts} rollouts")
    for column in ("seconds", "a second", "to grading alone", "peak MB: before", "at a tenth", "at the end"):
        table.add_column(column, justify="right")
    memory = (f"{megabytes:.0f}" for megabytes in (before, tenth, end))
    table.add_row(f"{seconds:.1f}", f"{rollouts / seconds:.0f}", f"{seconds / alone:.2f}", *memory)
    Console().print(table)


def leaps(rng: random.Random, thoughts: int) -> list[float]:
    places, shares = rng.sample(range(thoughts), rng.randint(2, 3)), [rng.uniform(0, 0.3)]
    for place in range(thoughts):
        shares.append(min(1, shares[-1] + rng.uniform(0.2, 0.4)) if place in places else shares[-1])
    return shares


def wanders(rng: random.Random, thoughts: int) -> list[float]:
    shares = [rng.uniform(0, 0.6)]
    for _ in range(thoughts):
        step = rng.gauss(0.1, 0.2) if rng.random() < 0.5 else 0
        shares.append(min(1, max(0, shares[-1] + step)))
    return shares


def rises(rng: random.Random, thoughts: int) -> list[float]:
    first, last = rng.uniform(0, 0.3), rng.uniform(0.7, 1)
    return [first + (last - first) * place / thoughts for place in range(thoughts + 1)]


def simulated(rng: random.Random, kind: Success) -> tuple[list[int], list[float]]:
    """The lengths of 8 to 16 thoughts, and the true success of each prefix."""
    lengths = [rng.randint(50, 1500) for _ in range(rng.randint(8, 16))]
    return lengths, kind(rng, len(lengths))


def scores_of(lengths: list[int], counts: list[tuple[int, int]]) -> list[float]:
    before, *shares = [right / drawn for right, drawn in counts]
    return thought_scores(lengths, shares, before)


def stopped(lengths: list[int], outcomes: list[list[bool]], batch: int, z: float) -> list[tuple[int, int]]:
    """(right, drawn) of each prefix once none is open."""
    drawn = [batch] * len(outcomes)
    while True:
        counts = [(sum(ends[:most]), most) for ends, most in zip(outcomes, drawn, strict=True)]
        needed = open_prefixes(lengths, counts, len(outcomes[0]), z=z)
        if not needed:
            return counts
        for prefix in needed:
            drawn[prefix] += batch


def show_stopping(count: int, samples: int = 128, batch: int = 8) -> None:
    table = Table(title=f"Stopping early, beside all {samples} samples; {count} chains of each kind, {batch} at a time")
    for column in ("success", "z", "same thoughts", "same chains", "share of rollouts"):
        table.add_column(column, justify="left" if column == "success" else "right")
    for kind in track((leaps, wanders, rises), transient=True):
        rng, chains = random.Random(0), list[tuple[list[int], list[list[bool]]]]()
        for _ in range(count):
            lengths, success = simulated(rng, kind)
            chains.append((lengths, [[rng.random() < share for _ in range(samples)] for share in success]))
        for z in (0.67, 1.15, 1.64, 1.96):
            same, drawn = list[list[bool]](), 0
            for lengths, outcomes in chains:
                counts = stopped(lengths, outcomes, batch, z)
                everything = [(sum(ends), samples) for ends in outcomes]
                pair = (stays_long(scores_of(lengths, counted)) for counted in (counts, everything))
                same.append([early == full for early, full in zip(*pair, strict=True)])
                drawn += sum(taken for _, taken in counts)
            thoughts = [agrees for chain in same for agrees in chain]
            whole = samples * sum(len(outcomes) for _, outcomes in chains)
            table.add_row(
                kind.__name__, f"{z}", f"{sum(thoughts) / len(thoughts):.1%}",
                f"{sum(map(all, same)) / len(same):.1%}", f"{drawn / whole:.1%}",
            )  # fmt: skip
        table.add_section()
    Console().print(table)


def show_bounds(count: int) -> None:
    table = Table(title=f"Where a bound of 95% on M holds, and how wide it is on average; {count} chains of each kind")
    for column in ("success", "samples", "ours: chains", "thoughts", "wide", "eq. 5: chains", "thoughts", "wide"):
        table.add_column(column, justify="left" if column == "success" else "right")
    for kind in (leaps, wanders, rises):
        for samples in (5, 8, 32, 128):
            rng = random.Random(0)
            held: dict[str, list[list[bool]]] = {"ours": [], "eq. 5": []}
            widths: dict[str, list[float]] = {"ours": [], "eq. 5": []}
            for _ in range(count):
                lengths, success = simulated(rng, kind)
                counts = [(sum(rng.random() < share for _ in range(samples)), samples) for share in success]
                true = thought_scores(lengths, success[1:], success[0])
                off = [abs(found - truth) for found, truth in zip(scores_of(lengths, counts), true, strict=True)]
                bounds = {
                    "ours": score_errors(lengths, counts),
                    "eq. 5": [factor * hoeffding(samples) / log(2) for factor in remains(lengths)],
                }
                for name, bound in bounds.items():
                    held[name].append([far <= most for far, most in zip(off, bound, strict=True)])
                    widths[name] += bound
            row = [kind.__name__, str(samples)]
            for name, chains in held.items():
                thoughts = [holds for chain in chains for holds in chain]
                row += [
                    f"{sum(map(all, chains)) / count:.1%}",
                    f"{sum(thoughts) / len(thoughts):.1%}",
                    f"{sum(widths[name]) / len(widths[name]):.2f}",
                ]
            table.add_row(*row)
        table.add_section()
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=1000)
    parser.add_argument("--simulated", type=int, default=300)
    arguments = parser.parse_args()
    show_rollouts(arguments.chains)
    show_stopping(arguments.simulated)
    show_bounds(arguments.simulated)


if __name__ == "__main__":
    main()
