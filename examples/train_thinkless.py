"""One model learns when to think, as Thinkless does: DeGRPO from the tiny router that turnwise ships.

    python examples/train_thinkless.py
    python examples/train_thinkless.py --learner.loss.aggregation sample-mean --output runs/vanilla     # GRPO instead
    python examples/train_thinkless.py --config my.toml --training.seed 1 --output runs/seed-1

Expect it to stop thinking about chains of a few steps, where a short answer is right, and to think about nearly all of
those of five or six. Departs from the paper: the model has 0.7 M parameters; a short answer has room for four steps of
a chain; sampled at temperature 1; advantages are divided by their deviation, or the hard problems, on which more is at
stake, teach the model to think about everything before it can tell them from easy ones (`--training.estimator
mean-centred` shows it); and α is 0.1 instead of 0.001, since training is a hundred steps and not six hundred. γ is
0.2, to which the authors' own rerun came down: at 0.5 a short answer that is right in 9 of 10 cases would do.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt
from rich.console import Console

from turnwise.agents.tiny import ROUTER
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.analysis.control import for_same_tokens
from turnwise.command import run_configured
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.math_grader import MathGrader
from turnwise.protocols.rewards import RewardSum, ThinklessTable
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.learner import LearnerSettings
from turnwise.rl.loss import LossSettings
from turnwise.rl.trained_policy import Policy
from turnwise.rl.trainer import Trainer, TrainingSettings
from turnwise.show import play_shown, show_results, train_shown


class Config(BaseModel):
    """Trains a self-routing model by reinforcement."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = str(ROUTER)
    problem_set: str = "mixed"
    gamma: float = 0.2
    short_tokens: PositiveInt = 20
    think_tokens: PositiveInt = 400
    train_problems: PositiveInt = 6000
    test_problems: PositiveInt = 400
    output: Path = Path("runs/train_thinkless")
    training: TrainingSettings = TrainingSettings(steps=120, problems=16, estimator="grpo")
    learner: LearnerSettings = LearnerSettings(
        learning_rate=2e-4, schedule="linear", loss=LossSettings(aggregation="degrpo", alpha=0.1)
    )


def main(config: Config) -> None:
    """Trains, then plays the result beside what it started from and both modes by force."""
    console, reward = Console(), RewardSum((ThinklessTable(gamma=config.gamma),))
    budgets = {"short_tokens": config.short_tokens, "think_tokens": config.think_tokens}
    protocol = Thinkless(reward=reward, **budgets)
    with MathGrader() as grader:
        train = arithmetic(grader, problem_set=config.problem_set, count=config.train_problems, split="train")
        test = arithmetic(grader, problem_set=config.problem_set, count=config.test_problems)
        policies = {"solver": Policy(config.model, ("solver",), config.learner)}
        trainer = Trainer(protocol, policies, train, test, config.training, config.output)
        train_shown(trainer, console)

        temperature = config.training.evaluation_temperature
        trained = trainer.team(temperature)["solver"]
        before = TransformersAgent(TransformersEngine.load(config.model), temperature=temperature)
        think, short = (Thinkless(mode=mode, **budgets) for mode in ("think", "short"))
        played = {
            "trained": (protocol, trained, 1),
            "before": (protocol, before, 1),
            "always think": (think, before, 1),
            "never think": (short, before, 8),
            "trained, always": (think, trained, 1),
            "trained, never": (short, trained, 1),
        }
        runs = {
            title: play_shown(title, played_by, {"solver": agent}, test, console, samples=samples)
            for title, (played_by, agent, samples) in played.items()
        }
    controls = for_same_tokens(runs, "trained", thorough="always think", brief="never think")
    show_results(
        runs, test, console, baseline="always think", controls=controls, results=config.output / "results.json"
    )


if __name__ == "__main__":
    run_configured(main, Config)
