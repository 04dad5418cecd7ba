"""The cold start of Long⊗Short from one end to the other, as a recipe: chains become models."""

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
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.errors import InputError
from turnwise.environments.math_grader import MathGrader
from turnwise.protocols.solo import Solo
from turnwise.rl.cold_start.arithmetic import complete_by_rule
from turnwise.rl.cold_start.pipeline import ColdStart, by_chance, by_metric
from turnwise.rl.cold_start.rollouts import Continuation, RolloutSettings
from turnwise.rl.openrlhf.settings import OpenRLHFSettings
from turnwise.rl.sft import SFTSettings
from turnwise.rl.sft_sets import long_short_rows, write_set

load = cache(TransformersEngine.load)


class ColdStartRecipe(BaseModel):
    """Long chains of thought become a first long-thought and a first short-thought model.

    - `chains` is a file with the columns "problem", "answer" and "response"; without one, the `teacher` writes chains
      about `problems` problems of arithmetic.
    - `chunker` (a model, else rules) cuts them; `base` continues each prefix, behind `instruction` and `opening`, and
      made to answer by `closing`; `completer` (a model, else a rule that knows arithmetic) writes short thoughts.
    - `scores` says which thoughts stay long, by the paper's metric or by chance.
    - `backend`: both models are fine-tuned in this process, or through OpenRLHF as `openrlhf` says.
    - `max_tokens` is the budget of a turn.
    """

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
    max_tokens: PositiveInt = 256
    device: str = "cpu"
    seed: int = 0
    output: Path = Path("runs/cold_start")

    def alone(self) -> Solo:
        """One who only thinks."""
        return Solo("long", max_tokens=4 * self.max_tokens, prefill=self.opening, answer_after=self.closing)

    def agent(self, model: str, temperature: float) -> TransformersAgent:
        """A model as an agent; two of one model share its weights."""
        return TransformersAgent(load(model, device=self.device), temperature=temperature)


def cold_start(recipe: ColdStartRecipe, console: Console) -> dict[str, Path]:
    """Weighs the thoughts, writes the sets, and trains on them: the folder of each seat's model.

    Stopped, it goes on by the same call. Raises InputError where no chain is left to learn from.
    """
    output, seed = recipe.output, recipe.seed
    if recipe.chains and not recipe.completer:
        raise InputError("the rule that writes short thoughts knows arithmetic alone; name a model with --completer")
    base, template = recipe.agent(recipe.base, 1.0), load(recipe.base, device=recipe.device).template
    with MathGrader() as grader:
        asked = arithmetic(grader, count=recipe.problems, split="train", seed=seed)
        if recipe.chains:
            problems = show.read_problems(recipe.chains, number=recipe.problems, solution="response")
        else:
            team, models = {"long": recipe.agent(recipe.teacher, 0.6)}, {"teacher": recipe.teacher}
            said = show.play_shown("chains", recipe.alone(), team, asked, console, output=output, settings=models)
            problems = tuple(replace(e.transcript.problem, solution=e.transcript.text) for e in said)

        models = {"chunker": recipe.chunker or "", "base": recipe.base, "completer": recipe.completer or ""}
        chunker = recipe.agent(recipe.chunker, 0.1) if recipe.chunker else None
        rule = ScriptedAgent(complete_by_rule(asked.problems))
        protocol = Continuation(
            instruction=recipe.instruction, opening=recipe.opening, closing=recipe.closing,
            max_tokens=recipe.rollout_tokens,
        )  # fmt: skip
        with show.stages_shown(console) as on_progress:
            stages = ColdStart(output, grader, models=models, seed=seed, on_progress=on_progress)
            chains = stages.chunk(problems, chunker=chunker, count_tokens=lambda text: len(template.tokens(text)))
            score = by_metric if recipe.scores == "metric" else by_chance(seed)
            weighed = stages.weigh(chains, base, protocol, recipe.rollouts, score=score)
            dialogues = stages.complete(weighed, recipe.agent(recipe.completer, 0.1) if recipe.completer else rule)
        if stages.dropped or stages.failed:
            console.print(left_out(stages.dropped, kept=len(dialogues)), f"{stages.failed} continuations failed")
        if not dialogues:
            raise InputError(f"no chain is left to learn from; {output / 'dropped.jsonl'} says why")
        if recipe.rollouts.stop_early:
            console.print(savings(weighed, recipe.rollouts.samples))
        show.show_thoughts({recipe.rollouts.samples: weighed}, console, folder=output / "figures")

        rows = [row for problem, dialogue in dialogues for row in long_short_rows(problem, dialogue, template)]
        trained = {}
        for seat in ("long", "short"):
            data, folder = output / f"D_{seat}.parquet", output / seat
            write_set(data, (row for row in rows if row["seat"] == seat))
            model = show.fine_tune_shown(
                recipe.base, data, recipe.sft, folder, console, seed=seed, device=recipe.device,
                openrlhf=recipe.openrlhf if recipe.backend == "openrlhf" else None,
            )  # fmt: skip
            trained[seat] = model
    return trained
