"""Recipes: all that a training run is, as settings of one file. Nothing of OpenRLHF is imported to write one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from turnwise.agents.agent import Agent
from turnwise.agents.tiny import LONG, ROUTER, SHORT
from turnwise.protocols.lengths import AroraZanetteLength, KimiLength
from turnwise.protocols.long_short import TAGS, LongShort
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.protocols.rewards import Correctness, Format, RewardSum, Schedule, ThinklessTable, Weighted
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.learner import LearnerSettings
from turnwise.rl.loss import LossSettings
from turnwise.rl.openrlhf.estimate import Assumptions
from turnwise.rl.openrlhf.placement import Machine
from turnwise.rl.openrlhf.settings import OpenRLHFSettings
from turnwise.rl.trained_policy import Policy
from turnwise.rl.trainer import TrainingSettings

Points = tuple[tuple[int, float], ...]
"""A number that changes with the training step: each (step, value) holds until the next."""

RISING: Points = ((0, 0.0), (5, 0.25), (15, 0.5))
LENGTHS = {"kimi": KimiLength(), "arora-zanette": AroraZanetteLength()}


class Recipe(BaseModel, ABC):
    """What is trained, on which problems, by what settings, and where.

    - `train` and `test` name the problems to learn from and those to evaluate on: an arithmetic set (of which each has
      its own part), a benchmark, or a JSONL, JSON or Parquet file; `train_problems` and `test_problems` are how many of
      them at most.
    - `backend`: "embedded" trains in this process, on `device`; "openrlhf" on OpenRLHF, as `openrlhf` says.
    - `ray_address` is that of a Ray cluster to train on, by default RAY_ADDRESS's; without either, Ray is started on
      this machine. The embedded backend needs none.
    - `machine`, `assumptions` and `prompt_tokens` (of the longest prompt, instructions and all) are for `turnwise plan`
      alone.
    - `output` is the folder of the run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: str = "mixed"
    test: str = "mixed"
    train_problems: PositiveInt = 6000
    test_problems: PositiveInt = 400
    training: TrainingSettings = TrainingSettings()
    backend: Literal["embedded", "openrlhf"] = "embedded"
    device: str = "cpu"
    openrlhf: OpenRLHFSettings = OpenRLHFSettings()
    ray_address: str | None = None
    machine: Machine = Machine()
    assumptions: Assumptions = Assumptions()
    prompt_tokens: PositiveInt = 512
    output: Path

    @abstractmethod
    def protocol(self) -> ReasoningProtocol:
        """Who says what when, and is paid for what."""

    @abstractmethod
    def policies(self) -> Mapping[str, Policy]:
        """What is trained, by name."""

    def partners(self) -> Mapping[str, Agent]:
        """Who fills the seats that no policy fills."""
        return {}


class LongShortRecipe(Recipe):
    """Trains a long-thought and a short-thought model together, as in Long⊗Short (arXiv 2505.11827).

    Both are paid correctness + format + µ · `length`, where µ is `brevity` by step (eq. 9); with `right_beats_wrong` a
    right answer never below a wrong one. Both learn as `learner` says; the short model as `short_learner`, if given.
    """

    long: str = str(LONG)
    short: str = str(SHORT)
    max_turns: PositiveInt = 6
    long_tokens: PositiveInt = 160
    short_tokens: PositiveInt = 120
    brevity: Points = RISING
    length: Literal["kimi", "arora-zanette"] = "kimi"
    right_beats_wrong: bool = True
    learner: LearnerSettings = LearnerSettings(learning_rate=2e-4, schedule="linear")
    short_learner: LearnerSettings | None = None
    training: TrainingSettings = TrainingSettings(rounds="long long short long short long", steps=30)
    output: Path = Path("runs/train_longshort")

    def protocol(self) -> LongShort:
        """The two take turns until the short one answers."""
        brevity = Weighted(LENGTHS[self.length], Schedule(self.brevity))
        reward = RewardSum((Correctness(), Format(TAGS), brevity), right_beats_wrong=self.right_beats_wrong)
        return LongShort(
            max_turns=self.max_turns, long_tokens=self.long_tokens, short_tokens=self.short_tokens, reward=reward
        )

    def policies(self) -> dict[str, Policy]:
        """One for each seat."""
        return {
            "long": Policy(self.long, ("long",), self.learner),
            "short": Policy(self.short, ("short",), self.short_learner or self.learner),
        }


class ThinklessRecipe(Recipe):
    """Trains a self-routing model, as Thinkless does (arXiv 2505.13379). `gamma` is what thinking costs, γ."""

    model: str = str(ROUTER)
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.2
    short_tokens: PositiveInt = 20
    think_tokens: PositiveInt = 400
    learner: LearnerSettings = LearnerSettings(
        learning_rate=2e-4, schedule="linear", loss=LossSettings(aggregation="degrpo", alpha=0.1)
    )
    training: TrainingSettings = TrainingSettings(steps=120, problems=16, estimator="grpo")
    output: Path = Path("runs/train_thinkless")

    def protocol(self) -> Thinkless:
        """Its first token says whether it thinks."""
        reward = RewardSum((ThinklessTable(gamma=self.gamma),))
        return Thinkless(short_tokens=self.short_tokens, think_tokens=self.think_tokens, reward=reward)

    def policies(self) -> dict[str, Policy]:
        """The one."""
        return {"solver": Policy(self.model, ("solver",), self.learner)}
