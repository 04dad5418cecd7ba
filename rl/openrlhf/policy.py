"""A backend of the trainer: policies that learn on OpenRLHF, and are sampled from through Ray actors."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.actor import ActorHandle

from turnwise.environments.errors import InputError
from turnwise.rl.advantage import Sample
from turnwise.rl.openrlhf.learner import OpenRLHFLearner, check_models
from turnwise.rl.openrlhf.reservation import Share, reserve
from turnwise.rl.openrlhf.rollout_engine import RolloutEngine, WeightSource
from turnwise.rl.openrlhf.settings import OpenRLHFSettings
from turnwise.rl.trained_policy import Policy, TrainedPolicy


class OpenRLHFPolicy(TrainedPolicy):
    """One policy: a learner's ranks and an engine's actors, all of them processes of a Ray that is running.

    Its state is written by each rank below the state's folder, which all of them must share. Actors that die are
    started anew; where a rank dies, what was asked of it raises PolicyDiedError.
    """

    engine: RolloutEngine

    def __init__(self, learner: OpenRLHFLearner, engine: RolloutEngine) -> None:
        if engine.vocabulary != learner.vocabulary:
            raise InputError(
                f"engine and learner must have one vocabulary; that of {engine.name} has {engine.vocabulary} tokens, "
                f"and {learner.vocabulary} where it learns: give both one checkpoint"
            )
        self.engine = engine
        self._learner = learner
        self.closing = ExitStack()
        """What `close` does."""
        self._colocated = self._asleep = learner.openrlhf.colocated
        self._source: WeightSource = learner if learner.openrlhf.engine == "vllm" else ThroughRay(learner)
        self._source.connect(engine.actors)
        engine.source = self._source
        self.concurrent = learner.openrlhf.engine == "vllm" and not self._colocated

    async def update(
        self, samples: Sequence[Sample], *, control_states: Collection[str], seed: int
    ) -> dict[str, float]:
        """Learns from them, on all ranks, while others can learn and sample."""
        if self._colocated:
            await self.engine.sleep()
            self._asleep = True
            await asyncio.to_thread(self._learner.reload)
        figures = await asyncio.to_thread(self._learner.update, samples, control_states=control_states, seed=seed)
        if self._colocated:
            await asyncio.to_thread(self._learner.offload)
        return figures

    async def publish(self, *, interrupt: bool = False) -> None:
        """Sends the weights to the engine's actors, unless they have them."""
        if self._asleep:
            await self.engine.wake()
            self._asleep = False
        if self.engine.version != self._learner.version:
            await self.engine.update(self._source.broadcast, version=self._learner.version, interrupt=interrupt)
        elif not interrupt or not self.engine.whole:
            # What is cached is of these weights, and nobody is to wait for the end of replies but for the dead.
            await self.engine.forget()

    def save_pretrained(self, folder: Path) -> None:
        """Writes a Hugging Face checkpoint, in the precision of the learner."""
        self._learner.save_pretrained(folder)
        # OpenRLHF's is read by the rules of the model's type, which may not be the tokenizer's.
        self.engine.tokenizer.save_pretrained(folder)

    def state(self, folder: Path) -> Mapping[str, object]:
        """Written in DeepSpeed's form."""
        self._learner.save(folder)
        return {"version": self._learner.version}

    def load(self, state: Mapping[str, object], folder: Path) -> None:
        """Takes up what `state` wrote."""
        self._learner.load(folder)

    def waits_for(self) -> str:
        """In words, which ranks and which actors have not answered yet."""
        return "; ".join(told for told in (self._learner.waits_for(), self.engine.waits_for()) if told)

    def close(self) -> None:
        """Ends the processes."""
        self.closing.close()


class ThroughRay:
    """Brings a learner's weights to actors that are not vLLM's, by Ray's object store."""

    def __init__(self, learner: OpenRLHFLearner) -> None:
        self._learner = learner
        self._actors: list[ActorHandle] = []

    def connect(self, actors: Sequence[ActorHandle]) -> None:
        """Gets to know the actors."""
        self._actors = list(actors)

    def broadcast(self) -> int:
        """Has each of them load the state dict; its version."""
        with self._learner.one_at_a_time:  # else an update could come between
            weights, version = ray.put(self._learner.weights()), self._learner.version
        ray.get([actor.load.remote(weights) for actor in self._actors])
        return version


@dataclass(frozen=True, slots=True)
class OpenRLHFBackend:
    """Opens policies on OpenRLHF. Ray must be running. With `interrupts`, weights may be published during replies."""

    settings: OpenRLHFSettings
    interrupts: bool = False

    def __call__(self, policy: Policy, *, updates: int, temperature: float) -> OpenRLHFPolicy:
        """Starts the processes of a policy. Raises InputError as `OpenRLHFLearner` and `RolloutEngine.start` do."""
        settings, model = self.settings, policy.model
        check_models(model, None)  # before any process starts
        with ExitStack() as on_failure:
            place = None
            if settings.colocated:
                place, release = reserve(
                    Share("rank", settings.ranks, settings.gpus_per_rank),
                    Share("actor", settings.actors, settings.gpus_per_actor),
                )
                on_failure.callback(release)
            engine = RolloutEngine.start(model, settings, interruptible=self.interrupts, place=place)
            on_failure.callback(engine.close)
            if settings.colocated:
                ray.get([actor.sleep.remote() for actor in engine.actors])
            learner = OpenRLHFLearner(
                model, policy.learner, updates=updates, temperature=temperature, reference=model, openrlhf=settings,
                place=place,
            )  # fmt: skip
            on_failure.callback(learner.close)
            opened = OpenRLHFPolicy(learner, engine)
            opened.closing = on_failure.pop_all()
        return opened
