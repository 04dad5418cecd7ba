"""A protocol of one's own, trained: the jury of `new_protocol.py`, whose jurors learn to be right at once.

    python examples/train_new_protocol.py
    turnwise train examples/train_new_protocol.py     # the training alone

The three jurors are one policy in three seats, and learn from what all of them said; the thinker is another, and learns
at the same time; the clerk who counts the votes is a Python function, and does not learn. Nothing in the protocol knows
that it is being trained. Expect the thinker to lose its checks first, and so most of the tokens.
"""

from pathlib import Path

from new_protocol import JURORS, count_votes, jury
from pydantic import PositiveInt
from rich.console import Console

from turnwise.agents.scripted import ScriptedAgent
from turnwise.agents.tiny import LONG, SHORT
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.command import run_configured
from turnwise.protocols.graph import GraphProtocol
from turnwise.protocols.solo import Solo
from turnwise.rl.learner import LearnerSettings
from turnwise.rl.recipe import Recipe
from turnwise.rl.trained_policy import Policy
from turnwise.rl.trainer import TrainingSettings
from turnwise.show import play_shown, show_results, train_shown
from turnwise.train import open_trainer


class JuryRecipe(Recipe):
    """Trains a jury and the thinker that it calls on where it disagrees."""

    train: str = "easy"
    test: str = "easy"
    train_problems: PositiveInt = 2000
    test_problems: PositiveInt = 200
    training: TrainingSettings = TrainingSettings(steps=40, problems=12)
    learner: LearnerSettings = LearnerSettings(learning_rate=1e-4)
    output: Path = Path("runs/train_new_protocol")

    def protocol(self) -> GraphProtocol:
        """The very one that `new_protocol.py` plays."""
        return jury

    def policies(self) -> dict[str, Policy]:
        """Two: one is in three seats."""
        return {"juror": Policy(SHORT, JURORS, self.learner), "thinker": Policy(LONG, ("thinker",), self.learner)}

    def partners(self) -> dict[str, ScriptedAgent]:
        """Who does not learn."""
        return {"clerk": ScriptedAgent(count_votes)}


def main(recipe: JuryRecipe) -> None:
    """Trains, then plays the jury beside what it started from and the thinker alone."""
    console, temperature = Console(), recipe.training.evaluation_temperature
    with open_trainer(recipe) as trainer:
        train_shown(trainer, console)
        test, after, before = trainer.evaluation, trainer.team(temperature), dict(recipe.partners())
        for policy in trainer.policies.values():
            agent = TransformersAgent(TransformersEngine.load(policy.model), temperature=temperature)
            before |= dict.fromkeys(policy.seats, agent)
        alone = Solo("thinker", answer_after="</think>")
        played = {"trained": (jury, after), "before": (jury, before), "thinker alone": (alone, before)}
        runs = {title: play_shown(title, protocol, team, test, console) for title, (protocol, team) in played.items()}
    show_results(runs, test, console, baseline="thinker alone", results=recipe.output / "results.json")


if __name__ == "__main__":
    run_configured(main, JuryRecipe)
