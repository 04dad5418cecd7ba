"""Two models learn to be right and brief together, as in Long⊗Short: multi-turn RL in alternating rounds.

    python examples/train_longshort.py
    python examples/train_longshort.py --training.rounds "long+short long+short long+short" --output runs/at-once
    python examples/train_longshort.py --brevity "[[0, 0.0]]" --output runs/no-brevity

Each round trains one of the two with the other frozen. Prints what every round came to, as r1⊗r0 (the long model after
its first round, the short one before its own), and how the rounds of one get on with those of the other. Expect the
thoughts to lose their checks and then most of their words. Departs from the paper: models of 0.7 M parameters, groups
of 8 instead of 2, advantages centred for each seat and not divided by their deviation, no KL term, brevity weighs half
as much, and a right answer is always paid more than a wrong one.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt
from rich.console import Console

from turnwise.agents.tiny import LONG, SHORT
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.analysis.control import for_same_tokens
from turnwise.command import run_configured
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.math_grader import MathGrader
from turnwise.protocols.lengths import AroraZanetteLength, KimiLength
from turnwise.protocols.long_short import TAGS, LongShort
from turnwise.protocols.rewards import Correctness, Format, RewardSum, Schedule, Weighted
from turnwise.protocols.solo import Solo
from turnwise.rl.learner import LearnerSettings
from turnwise.rl.opponent_pool import cells_played, opponent_pool
from turnwise.rl.summary import summarise
from turnwise.rl.trained_policy import Policy
from turnwise.rl.trainer import Trainer, TrainingSettings
from turnwise.show import play_shown, show_pool, show_results, train_shown

LENGTHS = {"kimi": KimiLength(), "arora-zanette": AroraZanetteLength()}


class Config(BaseModel):
    """Trains a long-thought and a short-thought model together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    long: str = str(LONG)
    short: str = str(SHORT)
    problem_set: str = "mixed"
    brevity: tuple[tuple[int, float], ...] = ((0, 0.0), (5, 0.25), (15, 0.5))
    length: Literal["kimi", "arora-zanette"] = "kimi"
    max_tokens: PositiveInt = 160
    train_problems: PositiveInt = 6000
    test_problems: PositiveInt = 400
    output: Path = Path("runs/train_longshort")
    training: TrainingSettings = TrainingSettings(rounds="long long short long short long", steps=30)
    learner: LearnerSettings = LearnerSettings(learning_rate=2e-4, schedule="linear")


def main(config: Config) -> None:
    """Trains, then plays the result beside what it started from and each model alone."""
    console = Console()
    brevity = Weighted(LENGTHS[config.length], Schedule(config.brevity))
    reward = RewardSum((Correctness(), Format(TAGS), brevity), right_beats_wrong=True)
    protocol = LongShort(long_tokens=config.max_tokens, short_tokens=config.max_tokens, reward=reward)
    with MathGrader() as grader:
        train = arithmetic(grader, problem_set=config.problem_set, count=config.train_problems, split="train")
        test = arithmetic(grader, problem_set=config.problem_set, count=config.test_problems)
        models = {"long": config.long, "short": config.short}
        policies = {name: Policy(model, (name,), config.learner) for name, model in models.items()}
        trainer = Trainer(protocol, policies, train, test, config.training, config.output)
        train_shown(trainer, console)

        temperature = config.training.evaluation_temperature
        before = {
            name: TransformersAgent(TransformersEngine.load(model), temperature=temperature)
            for name, model in models.items()
        }
        played = {
            "trained": (protocol, trainer.team(temperature), 1),
            "before": (protocol, before, 1),
            "long alone": (Solo("long", max_tokens=1024, answer_after="</think>"), before, 1),
            "short alone": (Solo("short", max_tokens=config.max_tokens, stops=("</answer>",)), before, 8),
        }
        runs = {
            title: play_shown(title, played_by, team, test, console, samples=samples)
            for title, (played_by, team, samples) in played.items()
        }
        pool = opponent_pool(trainer, "long", "short")
    controls = for_same_tokens(runs, "trained", thorough="long alone", brief="short alone")
    rounds = cells_played(trainer.rounds, "long", "short")
    show_pool(pool, rounds, ("long", "short"), summarise(runs["long alone"]), console, folder=config.output)
    show_results(runs, test, console, baseline="long alone", controls=controls, results=config.output / "results.json")


if __name__ == "__main__":
    run_configured(main, Config)
