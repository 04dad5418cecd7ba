"""The cold start of Long⊗Short on a laptop: what M is worth against random scores, and what stopping early saves.

    python benchmarks/cold_start_study.py

First `examples/cold_start.py`, three seeds with M and three with random scores: some five minutes a run on one core,
`--workers` at a time. Then the chains of the first run, weighed again by up to 128 continuations of each prefix, and by
as many as sequential stopping takes. A stopped study goes on where it was. Writes docs/results/cold_start.json and
cold_start_*.png.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from study import RESULTS, command, results, run_all, spread, write_json

from turnwise.agents.tiny import NOVICE
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.analysis.thoughts import chain_picture, scores_by_position, success_by_thoughts
from turnwise.environments.math_grader import MathGrader
from turnwise.environments.problem import Problem
from turnwise.rl.cold_start.pipeline import ColdStart
from turnwise.rl.cold_start.rollouts import Continuation, RolloutSettings
from turnwise.rl.cold_start.thoughts import WeighedChain
from turnwise.rl.episode_store import read_episodes
from turnwise.show import stages_shown

SEEDS = (0, 1, 2)
SCORES = {"metric": "SFT with M", "chance": "SFT with random scores"}
CHAINS = 100
SAMPLES = (8, 16, 32, 64, 128)


def main(
    runs: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs/cold_start_study"),
    workers: Annotated[int, typer.Option(help="How many runs at a time, a core each.")] = 2,
) -> None:
    """Runs what has not been run yet, then draws and prints what came of it."""
    console = Console()
    jobs = {f"{scores}-{seed}": flags(scores, seed) for scores in SCORES for seed in SEEDS}
    run_all("cold_start.py", jobs, runs, workers)
    found = outcomes(runs)
    console.print(compared(found))
    full, stopped = weighed_again(runs, console)
    saved = stopping(full[max(SAMPLES)], stopped)
    console.print(
        f"{CHAINS} of the chains, sequential stopping against {max(SAMPLES)} continuations of each prefix: "
        f"{saved['same thoughts']:.1%} of thoughts and {saved['same chains']:.1%} of chains assigned alike, "
        f"for {saved['share drawn']:.1%} of the continuations"
    )
    commands = {SCORES[scores]: command("cold_start.py", flags(scores, 0)) for scores in SCORES}
    made_by = {"made by": "python benchmarks/cold_start_study.py", "seed 0 by": commands}
    write_json("cold_start.json", {**made_by, "runs": found, "stopping": saved})
    success_by_thoughts(full[max(SAMPLES)]).savefig(RESULTS / "cold_start_success.png")
    scores_by_position(full).savefig(RESULTS / "cold_start_scores.png")
    chain_picture(max(full[max(SAMPLES)], key=lambda one: len(one.long))).savefig(RESULTS / "cold_start_chain.png")


def flags(scores: str, seed: int) -> list[str]:
    """How a run differs from the example as it stands."""
    chance = [] if scores == "metric" else ["--scores", scores]
    return [*chance, "--seed", str(seed), "--test-problems", "400"]


def outcomes(runs: Path) -> dict[str, list[dict[str, float]]]:
    """Accuracy and tokens by way of starting, seed by seed; what was not trained is the same in every run."""
    read = {scores: [results(runs / f"{scores}-{seed}")["runs"] for seed in SEEDS] for scores in SCORES}
    found = {SCORES[scores]: [one["trained"] for one in of_seeds] for scores, of_seeds in read.items()}
    before = {name: [figures] for name, figures in read["metric"][0].items() if name != "trained"}
    return {
        name: [{"accuracy": one["accuracy"], "tokens": one["tokens"], "turns": one["turns"]} for one in of_seeds]
        for name, of_seeds in (before | found).items()
    }


def compared(found: Mapping[str, Sequence[Mapping[str, float]]]) -> Table:
    """One row a way of starting: the shape of the paper's Table 6."""
    table = Table(title="Held-out problems: mean (least to most) over the seeds", title_justify="left")
    for heading in ("", "seeds", "right", "tokens", "turns"):
        table.add_column(heading, justify="right" if heading else "left")
    forms = {"accuracy": "{:.1%}", "tokens": "{:.0f}", "turns": "{:.1f}"}
    for name, of_seeds in found.items():
        cells = (spread([one[figure] for one in of_seeds], form) for figure, form in forms.items())
        table.add_row(name, str(len(of_seeds)), *cells)
    return table


def weighed_again(runs: Path, console: Console) -> tuple[dict[int, list[WeighedChain]], list[WeighedChain]]:
    """Chains of the first run, weighed by each of SAMPLES continuations, and by sequential stopping; drawn once."""
    engine = TransformersEngine.load(NOVICE)
    base, protocol = TransformersAgent(engine), Continuation(opening="<think>", closing="</think>", max_tokens=16)
    with MathGrader() as grader, stages_shown(console) as on_progress:
        stages = ColdStart(runs / "many", grader, models={"base": "novice"}, on_progress=on_progress)
        chains = stages.chunk(problems(runs), count_tokens=lambda text: len(engine.template.tokens(text)))
        full = {most: stages.weigh(chains, base, protocol, RolloutSettings(samples=most)) for most in SAMPLES}
        settings = RolloutSettings(samples=max(SAMPLES), stop_early=True)
        return full, stages.weigh(chains, base, protocol, settings)


def problems(runs: Path) -> list[Problem]:
    """Chains of the first run, of all levels alike, as solutions of their problems."""
    found = sorted(read_episodes(runs / "metric-0" / "chains" / "episodes.jsonl"), key=lambda episode: episode.id)
    chosen = found[:: len(found) // CHAINS]
    return [replace(one.transcript.problem, solution=one.transcript.text) for one in chosen]


def stopping(full: Sequence[WeighedChain], stopped: Sequence[WeighedChain]) -> dict[str, float]:
    """How far stopping early assigns thoughts alike, and what share of the continuations it takes."""
    pairs = list(zip(full, stopped, strict=True))
    thoughts = [one == other for whole, part in pairs for one, other in zip(whole.long, part.long, strict=True)]
    return {
        "same thoughts": fmean(thoughts),
        "same chains": fmean(whole.long == part.long for whole, part in pairs),
        "share drawn": sum(sum(part.rollouts) for part in stopped) / sum(sum(whole.rollouts) for whole in full),
    }


if __name__ == "__main__":
    typer.run(main)
