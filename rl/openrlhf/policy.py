"""A backend of the trainer: policies that learn on OpenRLHF, and are sampled from through its vLLM actors."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from turnwise.rl.advantage import Sample
from turnwise.rl.openrlhf.learner import OpenRLHFLearner
from turnwise.rl.openrlhf.rollout_engine import RolloutEngine
from turnwise.rl.openrlhf.settings import OpenRLHFSettings
from turnwise.rl.trained_policy import Policy, TrainedPolicy


class OpenRLHFPolicy(TrainedPolicy):
    """One policy: a learner's ranks and an engine's actors, all of them processes of a Ray that is running.

    `close` ends them. Its state is written by each rank below the state's folder, which all of them must share.
    """

    engine: RolloutEngine

    def __init__(self, learner: OpenRLHFLearner, engine: RolloutEngine) -> None:
        self.engine = engine
        self._learner = learner
        learner.connect(engine.actors)

    def update(self, samples: Sequence[Sample], *, control_states: Collection[str], seed: int) -> dict[str, float]:
        """Learns from them, on all ranks."""
        return self._learner.update(samples, control_states=control_states, seed=seed)

    async def publish(self) -> None:
        """Sends the weights to the engine's actors, once these have ended what they sample."""
        await self.engine.update(self._learner.broadcast, version=self._learner.version)

    def save_pretrained(self, folder: Path) -> None:
        """Writes a Hugging Face checkpoint, in the precision of the learner."""
        self._learner.save_pretrained(folder)

    def state(self, folder: Path) -> Mapping[str, object]:
        """Written in DeepSpeed's form."""
        self._learner.save(folder)
        return {"version": self._learner.version}

    def load(self, state: Mapping[str, object], folder: Path) -> None:
        """Takes up what `state` wrote."""
        self._learner.load(folder)

    def close(self) -> None:
        """Ends the processes."""
        self.engine.close()
        self._learner.close()


class OpenRLHFBackend(BaseModel):
    """Opens policies on OpenRLHF, each with ranks that train it and `actors` that are sampled from.

    Each actor takes `gpus_per_actor` of a GPU (0: a CPU), and there the memory of the weights and `cache_gigabytes`;
    `context` is by default the model's own, and `max_running` how many turns it samples at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    learner: OpenRLHFSettings = OpenRLHFSettings()
    actors: PositiveInt = 1
    gpus_per_actor: Annotated[float, Field(ge=0, le=1)] = 1.0
    cache_gigabytes: PositiveFloat = 1.0
    context: PositiveInt | None = None
    max_running: PositiveInt = 64

    def __call__(self, policy: Policy, *, updates: int, temperature: float) -> OpenRLHFPolicy:
        """Starts the processes of a policy. Raises InputError as `OpenRLHFLearner` and `RolloutEngine.start` do."""
        learner = OpenRLHFLearner(
            policy.model, policy.learner, updates=updates, temperature=temperature, reference=policy.model,
            openrlhf=self.learner,
        )  # fmt: skip
        try:
            engine = RolloutEngine.start(
                policy.model,
                actors=self.actors,
                gpus_per_actor=self.gpus_per_actor,
                cache_gigabytes=self.cache_gigabytes,
                context=self.context,
                dtype=torch.float32 if self.learner.precision == "fp32" else torch.bfloat16,
                max_running=self.max_running,
            )
        except BaseException:
            learner.close()
            raise
        return OpenRLHFPolicy(learner, engine)
