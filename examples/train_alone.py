"""One model alone learns to be right and brief: the control that several together are held against.

    python examples/train_alone.py
    turnwise train examples/train_alone.py     # the training alone: by the recipe below, as it would be with one's own

The reward is that of `train_longshort.py` without its format term, the model its long-thought one. Expect its checks to
go, and some 30% of its tokens.
"""

from pathlib import Path

from pydantic import PositiveInt
from rich.console import Console

from turnwise.agents.tiny import LONG
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.command import run_configured
from turnwise.protocols.lengths import KimiLength
from turnwise.protocols.rewards import Correctness, RewardSum, Schedule, Weighted
from turnwise.protocols.solo import Solo
from turnwise.rl.learner import LearnerSettings
from turnwise.rl.recipe import RISING, Points, Recipe
from turnwise.rl.trained_policy import Policy
from turnwise.show import play_shown, show_results, train_shown
from turnwise.train import open_trainer


class AloneRecipe(Recipe):
    """Trains one long-thought model."""

    model: str = str(LONG)
    brevity: Points = RISING
    max_tokens: PositiveInt = 640
    learner: LearnerSettings = LearnerSettings(learning_rate=2e-4, schedule="linear")
    output: Path = Path("runs/train_alone")

    def protocol(self) -> Solo:
        """It thinks, and answers."""
        reward = RewardSum((Correctness(), Weighted(KimiLength(), Schedule(self.brevity))), right_beats_wrong=True)
        return Solo("long", max_tokens=self.max_tokens, answer_after="</think>", reward=reward)

    def policies(self) -> dict[str, Policy]:
        """The one."""
        return {"long": Policy(self.model, ("long",), self.learner)}


def main(recipe: AloneRecipe) -> None:
    """Trains, then plays the result beside what it started from."""
    console = Console()
    with open_trainer(recipe) as trainer:
        train_shown(trainer, console)
        temperature = recipe.training.evaluation_temperature
        before = {"long": TransformersAgent(TransformersEngine.load(recipe.model), temperature=temperature)}
        teams = {"trained": trainer.team(temperature), "before": before}
        test, protocol = trainer.evaluation, recipe.protocol()
        runs = {title: play_shown(title, protocol, team, test, console) for title, team in teams.items()}
    show_results(runs, test, console, baseline="before", results=recipe.output / "results.json")


if __name__ == "__main__":
    run_configured(main, AloneRecipe)
