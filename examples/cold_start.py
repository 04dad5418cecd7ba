r"""The cold start of Long⊗Short: long chains of thought become a first long-thought and a first short-thought model.

    python examples/cold_start.py                       # tiny models on arithmetic; some five minutes on one core
    python examples/cold_start.py --chains r1.jsonl --base Qwen/Qwen2.5-7B-Instruct --opening "" --closing "" \
        --instruction "Put the final answer in \boxed{}." --rollout-tokens 4096 --completer Qwen/Qwen2.5-7B-Instruct \
        --sft.steps 40 --sft.batch-size 32 --sft.micro-batch-size 1 --sft.learning-rate 1e-5 \
        --test math-500 --max-tokens 4096 --device cuda

A file of chains has the columns "problem", "answer" and "response". The output folder gets what each thought is worth
(thoughts.parquet), the sets D_long and D_short, figures, and the two models. Killed, it goes on by the same command.
With `--backend openrlhf` the models learn on OpenRLHF, as `--openrlhf.ranks 8 --openrlhf.zero-stage 3` would have it.

Departures from the paper, for the tiny models' sake: chains are cut by rules unless `--chunker` names a model; the base
is made to answer at once after each prefix (`--closing`); and, unless `--completer` names a model, a rule writes the
short thoughts of arithmetic. One model in several of these places is loaded once.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt
from rich.console import Console

from turnwise import show
from turnwise.agents.scripted import ScriptedAgent
from turnwise.agents.tiny import LONG, NOVICE
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.analysis.tables import left_out
from turnwise.analysis.thoughts import savings
from turnwise.command import run_configured
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.errors import InputError
from turnwise.environments.math_grader import MathGrader
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.solo import Solo
from turnwise.rl.cold_start.arithmetic import complete_by_rule
from turnwise.rl.cold_start.pipeline import ColdStart, by_chance, by_metric
from turnwise.rl.cold_start.rollouts import Continuation, RolloutSettings
from turnwise.rl.openrlhf.settings import OpenRLHFSettings
from turnwise.rl.sft import SFTSettings
from turnwise.rl.sft_sets import long_short_rows, write_set

load = cache(TransformersEngine.load)


class Config(BaseModel):
    """Long chains of thought become a first long-thought and a first short-thought model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chains: Path | None = None
    problems: PositiveInt = 500
    teacher: str = str(LONG)
    chunker: str | None = None
    base: str = str(NOVICE)
    instruction: str = ""
    opening: str = "<think>"
    closing: str = "</think>"
    rollout_tokens: PositiveInt = 16
    rollouts: RolloutSettings = RolloutSettings(samples=8)
    scores: Literal["metric", "chance"] = "metric"
    completer: str | None = None
    sft: SFTSettings = SFTSettings(steps=150, learning_rate=2e-3, weight_decay=0.01)
    backend: Literal["embedded", "openrlhf"] = "embedded"
    openrlhf: OpenRLHFSettings = OpenRLHFSettings()
    test: str = "mixed"
    test_problems: PositiveInt = 200
    max_tokens: PositiveInt = 256
    device: str = "cpu"
    seed: int = 0
    output: Path = Path("runs/cold_start")

    def agent(self, model: str, temperature: float) -> TransformersAgent:
        """A model as an agent; two of one model share its weights."""
        return TransformersAgent(load(model, device=self.device), temperature=temperature)


def main(config: Config) -> None:
    """Weighs, writes the sets, trains on them, and plays the result beside the base with the same prompts."""
    console, output, seed = Console(), config.output, config.seed
    if config.chains and not config.completer:
        raise InputError("the rule that writes short thoughts knows arithmetic alone; name a model with --completer")
    base, template = config.agent(config.base, 1.0), load(config.base, device=config.device).template
    alone = Solo("long", max_tokens=4 * config.max_tokens, prefill=config.opening, answer_after=config.closing)
    with MathGrader() as grader:
        asked = arithmetic(grader, count=config.problems, split="train", seed=seed)
        if config.chains:
            problems = show.read_problems(config.chains, number=config.problems, solution="response")
        else:
            team, models = {"long": config.agent(config.teacher, 0.6)}, {"teacher": config.teacher}
            said = show.play_shown("chains", alone, team, asked, console, output=output, settings=models)
            problems = tuple(replace(e.transcript.problem, solution=e.transcript.text) for e in said)

        models = {"chunker": config.chunker or "", "base": config.base, "completer": config.completer or ""}
        chunker = config.agent(config.chunker, 0.1) if config.chunker else None
        rule = ScriptedAgent(complete_by_rule(asked.problems))
        protocol = Continuation(
            instruction=config.instruction, opening=config.opening, closing=config.closing,
            max_tokens=config.rollout_tokens,
        )  # fmt: skip
        with show.stages_shown(console) as on_progress:
            stages = ColdStart(output, grader, models=models, seed=seed, on_progress=on_progress)
            chains = stages.chunk(problems, chunker=chunker, count_tokens=lambda text: len(template.tokens(text)))
            score = by_metric if config.scores == "metric" else by_chance(seed)
            weighed = stages.weigh(chains, base, protocol, config.rollouts, score=score)
            dialogues = stages.complete(weighed, config.agent(config.completer, 0.1) if config.completer else rule)
        if stages.dropped or stages.failed:
            console.print(left_out(stages.dropped, kept=len(dialogues)), f"{stages.failed} continuations failed")
        if not dialogues:
            raise InputError(f"no chain is left to learn from; {output / 'dropped.jsonl'} says why")
        if config.rollouts.stop_early:
            console.print(savings(weighed, config.rollouts.samples))
        show.show_thoughts({config.rollouts.samples: weighed}, console, folder=output / "figures")

        rows = [row for problem, dialogue in dialogues for row in long_short_rows(problem, dialogue, template)]
        trained = {}
        for seat in ("long", "short"):
            data, folder = output / f"D_{seat}.parquet", output / seat
            write_set(data, (row for row in rows if row["seat"] == seat))
            model = show.fine_tune_shown(
                config.base, data, config.sft, folder, console, seed=seed, device=config.device,
                openrlhf=config.openrlhf if config.backend == "openrlhf" else None,
            )  # fmt: skip
            trained[seat] = config.agent(str(model), 0.6)

        test = show.open_environment(config.test, grader, number=config.test_problems, seed=0)
        together = LongShort(long_tokens=config.max_tokens, short_tokens=config.max_tokens)
        untrained = dict.fromkeys(("long", "short"), config.agent(config.base, 0.6))
        played = {
            "trained": (together, trained),
            "base, prompt only": (together, untrained),
            "base, thinking alone": (alone, untrained),
        }
        runs = {
            title: show.play_shown(title, played_by, team, test, console, output=output, settings={"base": config.base})
            for title, (played_by, team) in played.items()
        }
    show.show_results(runs, test, console, baseline="base, thinking alone", results=output / "results.json")


if __name__ == "__main__":
    run_configured(main, Config)
