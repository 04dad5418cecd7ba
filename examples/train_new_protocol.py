"""A protocol of one's own, trained: the jury of `new_protocol.py`, whose jurors learn to be right at once.

    python examples/train_new_protocol.py

The three jurors are one policy in three seats, and learn from what all of them said; the thinker is another, and learns
at the same time; the clerk who counts the votes is a Python function, and does not learn. Nothing in the protocol knows
that it is being trained. Expect the thinker to lose its checks first, and so most of the tokens.
"""

from pathlib import Path

from new_protocol import JURORS, count_votes, jury
from pydantic import BaseModel, ConfigDict, PositiveInt
from rich.console import Console

from turnwise.agents.scripted import ScriptedAgent
from turnwise.agents.tiny import LONG, SHORT
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.command import run_configured
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.math_grader import MathGrader
from turnwise.protocols.solo import Solo
from turnwise.rl.learner import LearnerSettings
from turnwise.rl.trained_policy import Policy
from turnwise.rl.trainer import Trainer, TrainingSettings
from turnwise.show import play_shown, show_results, train_shown


class Config(BaseModel):
    """Trains a jury and the thinker that it calls on where it disagrees."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    problem_set: str = "easy"
    train_problems: PositiveInt = 2000
    test_problems: PositiveInt = 200
    output: Path = Path("runs/train_new_protocol")
    training: TrainingSettings = TrainingSettings(steps=40, problems=12)
    learner: LearnerSettings = LearnerSettings(learning_rate=1e-4)


def main(config: Config) -> None:
    """Trains, then plays the jury beside what it started from and the thinker alone."""
    console, clerk = Console(), {"clerk": ScriptedAgent(count_votes)}
    policies = {"juror": Policy(SHORT, JURORS, config.learner), "thinker": Policy(LONG, ("thinker",), config.learner)}
    with MathGrader() as grader:
        train = arithmetic(grader, problem_set=config.problem_set, count=config.train_problems, split="train")
        test = arithmetic(grader, problem_set=config.problem_set, count=config.test_problems)
        trainer = Trainer(jury, policies, train, test, config.training, config.output, partners=clerk)
        train_shown(trainer, console)

        after = trainer.team(config.training.evaluation_temperature)
        before = dict(clerk)
        for policy in policies.values():
            agent = TransformersAgent(TransformersEngine.load(policy.model), temperature=0.6)
            before |= dict.fromkeys(policy.seats, agent)
        alone = Solo("thinker", answer_after="</think>")
        played = {"trained": (jury, after), "before": (jury, before), "thinker alone": (alone, before)}
        runs = {title: play_shown(title, protocol, team, test, console) for title, (protocol, team) in played.items()}
    show_results(runs, test, console, baseline="thinker alone", results=config.output / "results.json")


if __name__ == "__main__":
    run_configured(main, Config)
