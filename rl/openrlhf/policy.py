"""A backend of the trainer: policies that learn on OpenRLHF, and are sampled from through its vLLM actors."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

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


@dataclass(frozen=True, slots=True)
class OpenRLHFBackend:
    """Opens policies on OpenRLHF. Ray must be running."""

    settings: OpenRLHFSettings

    def __call__(self, policy: Policy, *, updates: int, temperature: float) -> OpenRLHFPolicy:
        """Starts the processes of a policy. Raises InputError as `OpenRLHFLearner` and `RolloutEngine.start` do."""
        settings = self.settings
        learner = OpenRLHFLearner(
            policy.model, policy.learner, updates=updates, temperature=temperature, reference=policy.model,
            openrlhf=settings,
        )  # fmt: skip
        try:
            engine = RolloutEngine.start(
                policy.model,
                actors=settings.actors,
                gpus_per_actor=settings.gpus_per_actor,
                cache_gigabytes=settings.cache_gigabytes,
                context=settings.context,
                dtype=torch.float32 if settings.precision == "fp32" else torch.bfloat16,
                max_running=settings.max_running,
            )
        except BaseException:
            learner.close()
            raise
        return OpenRLHFPolicy(learner, engine)
