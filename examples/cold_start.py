"""The cold start of Long⊗Short: long chains of thought become a first long-thought and a first short-thought model.

    python examples/cold_start.py                       # tiny models on arithmetic; some six minutes on one core
    python examples/cold_start.py --chains r1.jsonl --base Qwen/Qwen2.5-7B-Instruct --opening "" --closing "" \\
        --rollout-tokens 4096 --chunker Qwen/Qwen2.5-72B-Instruct --completer Qwen/Qwen2.5-72B-Instruct \\
        --test math-500 --max-tokens 4096 --sft.learning-rate 1e-5 --device cuda

A file of chains has the columns "problem", "answer" and "response". The output folder gets what each thought is worth
(thoughts.parquet), the sets D_long and D_short, figures, and the two models. Killed, it goes on by the same command.

Departures from the paper, for the tiny models' sake: chains are cut by rules unless `--chunker` names a model; the base
is made to answer at once after each prefix (`--closing`); and, unless `--completer` names a model, a rule writes the
short thoughts of arithmetic.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt
from rich.console import Console

from turnwise.agents.scripted import ScriptedAgent
from turnwise.agents.tiny import LONG, NOVICE
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.analysis.tables import left_out
from turnwise.cli import (
    fine_tune_shown,
    open_environment,
    play_shown,
    run_configured,
    show_results,
    show_thoughts,
    stages_shown,
)  # fmt: skip
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.benchmarks import Columns, load_problems
from turnwise.environments.errors import InputError
from turnwise.environments.math_grader import MathGrader
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.solo import Solo
from turnwise.rl.cold_start.arithmetic import complete_by_rule
from turnwise.rl.cold_start.pipeline import ColdStart, by_chance, by_metric
from turnwise.rl.cold_start.rollouts import Continuation, RolloutSettings
from turnwise.rl.sft import SFTSettings
from turnwise.rl.sft_sets import long_short_rows, write_set


class Config(BaseModel):
    """Long chains of thought become a first long-thought and a first short-thought model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chains: Path | None = None
    teacher: str = str(LONG)
    base: str = str(NOVICE)
    chunker: str | None = None
    completer: str | None = None
    problems: PositiveInt = 500
    test: str = "mixed"
    test_problems: PositiveInt = 200
    opening: str = "<think>"
    closing: str = "</think>"
    rollout_tokens: PositiveInt = 16
    rollouts: RolloutSettings = RolloutSettings(samples=8)
    scores: Literal["metric", "chance"] = "metric"
    sft: SFTSettings = SFTSettings(steps=150, learning_rate=2e-3, weight_decay=0.01)
    max_tokens: PositiveInt = 256
    device: str = "cpu"
    seed: int = 0
    output: Path = Path("runs/cold_start")

    def agent(self, model: str, temperature: float) -> TransformersAgent:
        """A model as an agent; two of one model share its weights."""
        return TransformersAgent(load(model, device=self.device), temperature=temperature)


load = cache(TransformersEngine.load)


def main(config: Config) -> None:
    """Weighs, writes the sets, trains on them, and plays the result beside the base with the same prompts."""
    console, output = Console(), config.output
    base = config.agent(config.base, 1.0)
    template = base.engine.template
    alone = Solo("long", max_tokens=4 * config.max_tokens, prefill=config.opening, answer_after=config.closing)
    if config.chains and not config.completer:
        raise InputError("the rule that writes short thoughts knows arithmetic alone; name a model with --completer")
    with MathGrader() as grader:
        asked = arithmetic(grader, count=config.problems, split="train", seed=config.seed)
        if config.chains:
            columns = Columns(solution="response")
            problems = load_problems(config.chains, columns=columns, limit=config.problems).problems
        else:
            team, models = {"long": config.agent(config.teacher, 0.6)}, {"teacher": config.teacher}
            said = play_shown("chains", alone, team, asked, console, output=output, settings=models)
            problems = tuple(replace(e.transcript.problem, solution=e.transcript.text) for e in said)

        models = {"base": config.base, "chunker": config.chunker or "rules", "completer": config.completer or "rule"}
        chunker = config.agent(config.chunker, 0.1) if config.chunker else None
        rule = ScriptedAgent(complete_by_rule(asked.problems))
        with stages_shown(console) as on_progress:
            stages = ColdStart(output, grader, models=models, seed=config.seed, on_progress=on_progress)
            chains = stages.chunk(problems, chunker=chunker, count_tokens=lambda text: len(template.tokens(text)))
            protocol = Continuation(opening=config.opening, closing=config.closing, max_tokens=config.rollout_tokens)
            score = by_metric if config.scores == "metric" else by_chance
            weighed = stages.weigh(chains, base, protocol, config.rollouts, score=score)
            dialogues = stages.complete(weighed, config.agent(config.completer, 0.1) if config.completer else rule)
        if stages.dropped:
            console.print(left_out(stages.dropped, kept=len(dialogues)))
        show_thoughts({config.rollouts.samples: weighed}, console, folder=output / "figures")

        rows = [row for problem, dialogue in dialogues for row in long_short_rows(problem, dialogue, template)]
        for seat in ("long", "short"):
            data = output / f"D_{seat}.parquet"
            write_set(data, (row for row in rows if row["seat"] == seat))
            fine_tune_shown(
                config.base, data, config.sft, output / seat, console, seed=config.seed, device=config.device
            )

        test = open_environment(config.test, grader, number=config.test_problems, seed=0)
        together = LongShort(long_tokens=config.max_tokens, short_tokens=config.max_tokens)
        trained = {seat: config.agent(str(output / seat / "model"), 0.6) for seat in ("long", "short")}
        untrained = dict.fromkeys(("long", "short"), config.agent(config.base, 0.6))
        played = {
            "trained": (together, trained),
            "base, prompt only": (together, untrained),
            "base, thinking alone": (alone, untrained),
        }
        runs = {title: play_shown(title, protocol, team, test, console) for title, (protocol, team) in played.items()}
    show_results(runs, test, console, baseline="base, thinking alone", results=output / "results.json")


if __name__ == "__main__":
    run_configured(main, Config)
