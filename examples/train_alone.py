"""One model alone learns to be right and brief: the control that several together are held against.

    python examples/train_alone.py

The reward is that of `train_longshort.py` without its format term, the model its long-thought one. Expect its checks to
go, and some 30% of its tokens.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt
from rich.console import Console

from turnwise.agents.tiny import LONG
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.command import run_configured
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.math_grader import MathGrader
from turnwise.protocols.lengths import KimiLength
from turnwise.protocols.rewards import Correctness, RewardSum, Schedule, Weighted
from turnwise.protocols.solo import Solo
from turnwise.rl.learner import LearnerSettings
from turnwise.rl.trained_policy import Policy
from turnwise.rl.trainer import Trainer, TrainingSettings
from turnwise.show import play_shown, show_results, train_shown


class Config(BaseModel):
    """Trains one long-thought model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = str(LONG)
    problem_set: str = "mixed"
    brevity: tuple[tuple[int, float], ...] = ((0, 0.0), (5, 0.25), (15, 0.5))
    max_tokens: PositiveInt = 640
    train_problems: PositiveInt = 6000
    test_problems: PositiveInt = 400
    output: Path = Path("runs/train_alone")
    training: TrainingSettings = TrainingSettings(steps=100)
    learner: LearnerSettings = LearnerSettings(learning_rate=2e-4, schedule="linear")


def main(config: Config) -> None:
    """Trains, then plays the result beside what it started from."""
    console = Console()
    reward = RewardSum((Correctness(), Weighted(KimiLength(), Schedule(config.brevity))), right_beats_wrong=True)
    protocol = Solo("long", max_tokens=config.max_tokens, answer_after="</think>", reward=reward)
    with MathGrader() as grader:
        train = arithmetic(grader, problem_set=config.problem_set, count=config.train_problems, split="train")
        test = arithmetic(grader, problem_set=config.problem_set, count=config.test_problems)
        policies = {"long": Policy(config.model, ("long",), config.learner)}
        trainer = Trainer(protocol, policies, train, test, config.training, config.output)
        train_shown(trainer, console)
        temperature = config.training.evaluation_temperature
        before = {"long": TransformersAgent(TransformersEngine.load(config.model), temperature=temperature)}
        teams = {"trained": trainer.team(temperature), "before": before}
        runs = {title: play_shown(title, protocol, team, test, console) for title, team in teams.items()}
    show_results(runs, test, console, baseline="before", results=config.output / "results.json")


if __name__ == "__main__":
    run_configured(main, Config)
