"""Policies while they are trained: what they are sampled from, and what learns, wherever both are."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError

from turnwise.agents.engine import Engine
from turnwise.agents.transformers_engine import TransformersEngine
from turnwise.rl.advantage import Sample
from turnwise.rl.learner import Learner, LearnerSettings


@dataclass(frozen=True, slots=True)
class Policy:
    """Weights that are trained, the seats that they fill, and how they learn.

    `model` is a checkpoint folder or a hub id. One policy in several seats is trained on what all of them said.
    """

    model: str | Path
    seats: tuple[str, ...]
    learner: LearnerSettings = field(default_factory=LearnerSettings)


class PolicyDiedError(Exception):
    """What was asked of a policy that is no more, since one of its processes died. It is to be opened anew."""


class TrainedPolicy(ABC):
    """The weights of one policy: `engine` samples from them as they were when last published.

    Whatever is asked of it raises PolicyDiedError where it has processes and one of them died.
    """

    engine: Engine
    concurrent = False
    """Whether it is sampled from while it learns, and may be published while replies run."""

    @abstractmethod
    async def update(
        self, samples: Sequence[Sample], *, control_states: Collection[str], seed: int
    ) -> dict[str, float]:
        """Learns from one rollout's samples, as `Learner.update` does; returns figures to be logged."""

    @abstractmethod
    async def publish(self, *, interrupt: bool = False) -> None:
        """Has the engine sample from the weights as they are now, with nothing kept of what it computed before.

        Replies that run end first, or, with `interrupt`, go on with the new weights.
        """

    @abstractmethod
    def save_pretrained(self, folder: Path) -> None:
        """Writes the weights and the tokenizer as a Hugging Face checkpoint. Raises OSError where there is no room."""

    @abstractmethod
    def state(self, folder: Path) -> Mapping[str, object]:
        """All that `load` needs to go on exactly from here, for `torch.save` before the next update.

        What is large may be written below `folder` instead, which is this state's own.
        """

    @abstractmethod
    def load(self, state: Mapping[str, object], folder: Path) -> None:
        """Takes up a state."""

    def waits_for(self) -> str:
        """In words, whose answers it is waiting for. Called from another thread."""
        return ""

    def close(self) -> None:  # noqa: B027  # most have none
        """Ends what processes it has started."""


class Backend(Protocol):
    """What opens a policy where it is to be trained: a class of trained policies, or a function."""

    def __call__(self, policy: Policy, *, updates: int, temperature: float) -> TrainedPolicy:
        """A policy that will learn from so many rollouts, sampled at such a temperature."""


class EmbeddedPolicy(TrainedPolicy):
    """Trained in this process, by a `Learner`, on the model that the engine samples from."""

    engine: TransformersEngine

    def __init__(self, policy: Policy, *, updates: int, temperature: float, device: str = "cpu") -> None:
        self.engine = TransformersEngine.load(policy.model, device=device, dtype=torch.float32)
        model = self.engine.model
        self._learner = Learner(
            model,
            policy.learner,
            updates=updates,
            temperature=temperature,
            reference=copy.deepcopy(model) if policy.learner.loss.kl_coefficient else None,
        )

    async def update(
        self, samples: Sequence[Sample], *, control_states: Collection[str], seed: int
    ) -> dict[str, float]:
        """Learns from them in this process, while nothing else runs."""
        return self._learner.update(samples, control_states=control_states, seed=seed)

    async def publish(self, *, interrupt: bool = False) -> None:
        """Has the engine forget what it has cached. Between trainings and rollouts in one process, no reply runs."""
        self.engine.version = self._learner.version

    def save_pretrained(self, folder: Path) -> None:
        """Writes a Hugging Face checkpoint."""
        try:
            self.engine.model.save_pretrained(folder)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(str(error)) from error
        self.engine.tokenizer.save_pretrained(folder)

    def state(self, folder: Path) -> Mapping[str, object]:
        """The learner's; nothing is written."""
        return self._learner.state()

    def load(self, state: Mapping[str, object], folder: Path) -> None:
        """Takes up a learner's state."""
        self._learner.load(state)
