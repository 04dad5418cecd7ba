"""One policy that learns on OpenRLHF: a group of Ray actors, and what they do with a batch of samples."""

import json
import math
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from transformers import AutoConfig, AutoModelForCausalLM

from turnwise.agents.transformers_engine import checkpoint
from turnwise.environments.errors import InputError
from turnwise.rl.advantage import Sample
from turnwise.rl.learner import LearnerSettings, split
from turnwise.rl.openrlhf.actors import PolicyRank, ReferenceRank, Strategy
from turnwise.rl.openrlhf.arguments import openrlhf_arguments
from turnwise.rl.openrlhf.names import RayActorGroup
from turnwise.rl.openrlhf.reservation import Share, reserve
from turnwise.rl.openrlhf.settings import OpenRLHFSettings
from turnwise.rl.openrlhf.step import Step
from turnwise.rl.trained_policy import PolicyDiedError

ABOUT = "learner.json"


class OpenRLHFLearner:
    """Trains the model of a checkpoint folder as `turnwise.rl.learner.Learner` would, in processes of Ray's.

    `updates` is how many rollouts it may learn from, for the learning-rate schedule; `temperature` the one at which
    they are sampled. `reference` is the folder of the model that a KL term keeps it near to; required where the loss
    has one. Ray must be running. `close`, or the end of a `with`, ends the processes. In a `place` that is given the
    n-th rank takes its part of the n-th bundle.

    It can be asked from several threads, and does one thing at a time: what all ranks do together they must all do in
    one order, and nobody is to see the weights of half an update. `one_at_a_time` is the lock of that, for who asks two
    things together.

    Raises InputError, before any process starts, for models that are not there or do not fit each other, and for more
    ranks than Ray has room for. Where a rank dies, whatever was asked of it raises PolicyDiedError, and all are ended;
    where one has too little memory, InputError.
    """

    def __init__(
        self,
        model: str | Path,
        settings: LearnerSettings,
        *,
        updates: int,
        temperature: float = 1.0,
        reference: str | Path | None = None,
        openrlhf: OpenRLHFSettings | None = None,
        place: PlacementGroup | None = None,
    ) -> None:
        self.settings, self.openrlhf = settings, openrlhf or OpenRLHFSettings()
        self.version = 0
        self.name = str(model)
        if not settings.loss.kl_coefficient:
            reference = None
        elif reference is None:
            raise InputError("a KL term needs a reference model; give one, or set kl_coefficient to 0")
        model, reference = _everywhere(model), None if reference is None else _everywhere(reference)
        self.vocabulary = check_models(model, reference)
        self._waiting: dict[str, list[int]] = {}
        self.one_at_a_time = threading.RLock()
        self._release: Callable[[], None] = lambda: None
        if place is None:
            place, self._release = reserve(Share("rank", self.openrlhf.ranks, self.openrlhf.gpus_per_rank))
        self._place = place
        steps = updates * settings.mini_batches
        arguments = openrlhf_arguments(self.openrlhf, settings, steps=steps, temperature=temperature)
        strategy = Strategy(arguments, settings.loss)
        self._groups: list[RayActorGroup] = []
        self._policy = self._group(PolicyRank, reference is not None)
        started = self._policy.async_init_model_from_pretrained(strategy, model, steps)
        self._reference = None
        if reference is not None:
            self._reference = self._group(ReferenceRank, True)
            started += self._reference.async_init_model_from_pretrained(strategy, reference)
        self._results("init_model_from_pretrained", started)
        if self.openrlhf.colocated:
            self.offload()

    def __enter__(self) -> "OpenRLHFLearner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes. What they have learnt is lost, unless it was saved."""
        if ray.is_initialized():
            for group in self._groups:
                for rank in group._actor_handlers:
                    ray.kill(rank)
            self._release()

    def update(
        self, samples: Sequence[Sample], *, control_states: Collection[str] = (), seed: int = 0
    ) -> dict[str, float]:
        """Learns from one rollout's samples; returns figures to be logged. `seed` is for dropout, if there is any.

        Raises InputError for token ids that the model does not have, and where the gradient is not finite; the weights
        are then as they were before that step.
        """
        largest = max((max(sample.trajectory.sequence.token_ids) for sample in samples), default=0)
        if largest >= self.vocabulary:
            raise InputError(
                f"samples must be of the model that learns, which has {self.vocabulary} tokens; got token {largest}: "
                "load the engine and the learner from one checkpoint"
            )
        steps = [
            Step.of(
                part, self.settings.loss, control_states=control_states, ranks=self.openrlhf.ranks,
                micro_batch_size=self.settings.micro_batch_size,
            )
            for part in split(samples, self.settings.mini_batches)
        ]  # fmt: skip
        with self.one_at_a_time:
            if self._reference is not None:
                for step in steps:
                    for micro, log_probs in zip(step.experience, self._log_probs(self._reference, step), strict=True):
                        micro.base_action_log_probs = log_probs
                # It shares its GPU with a rank, which will need what its logits took.
                self._all(self._reference, "empty_cache")
            # From the second step on, the policy is no longer the one that was sampled.
            for step in steps[1:]:
                for micro, log_probs in zip(step.experience, self._log_probs(self._policy, step), strict=True):
                    micro.action_log_probs = log_probs
            figures = [self._learn(step, (seed + number) % 2**63) for number, step in enumerate(steps)]
            self.version += 1
        return {name: fmean(step[name] for step in figures if name in step) for step in figures for name in step}

    def connect(self, actors: Sequence[ActorHandle]) -> None:
        """Lets the actors of an engine receive what `broadcast` sends; once, and again where one was started anew.

        They must serve the weights in the precision in which they are trained.
        """
        self._all(self._policy, "connect", list(actors))

    def broadcast(self) -> int:
        """Sends the weights to all actors that it is connected with, and returns once they are there; their version."""
        with self.one_at_a_time:
            self._all(self._policy, "broadcast_to_vllm")
            return self.version

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's state dict, on the CPU, in the precision that it is trained in."""
        found: dict[str, torch.Tensor] = self._all(self._policy, "weights")[0]
        return found

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the weights, with the tokenizer, as a Hugging Face checkpoint."""
        self._all(self._policy, "save_weights", str(Path(folder).resolve()))

    def save(self, folder: str | Path) -> None:
        """Writes all that `load` needs to go on exactly from here, a part by each rank: the folder must be theirs, too,
        where they run on other machines.
        """
        path = Path(folder).resolve()
        self._all(self._policy, "save_state", str(path), self.version)
        (path / ABOUT).write_text(json.dumps(self._about()))

    def load(self, folder: str | Path) -> None:
        """Takes up a saved state. Raises InputError for one of another number of ranks, which divide it otherwise."""
        path = Path(folder).resolve()
        if not (path / ABOUT).is_file():
            raise InputError(f"a learner is loaded from a folder that one was saved in; {path} has no {ABOUT}")
        found, expected = json.loads((path / ABOUT).read_text()), self._about()
        if found != expected:
            raise InputError(f"{path} must be the state of a learner with {expected}; it has {found}")
        self.version = self._all(self._policy, "load_state", str(path))[0]

    def offload(self) -> None:
        """Moves what only training needs from the GPUs to main memory, until `reload`."""
        self._all(self._policy, "offload_states")

    def reload(self) -> None:
        """Moves it back."""
        self._all(self._policy, "reload_states")

    def waits_for(self) -> str:
        """In words, which ranks have not answered what."""
        ranks = self.openrlhf.ranks
        return "; ".join(f"rank(s) {late} of {ranks} for {method!r}" for method, late in list(self._waiting.items()))

    def _learn(self, step: Step, seed: int) -> dict[str, float]:
        """One optimiser step, which all ranks take together."""
        if not step.experience:
            return {**step.figures, **self._all(self._policy, "rest")[0]}
        assert len(step.experience) % self.openrlhf.ranks == 0, (
            "a rank with less than others would wait for them forever"
        )
        self._results("append", self._policy.async_run_method_batch("append", experience=step.experience))
        found: list[tuple[dict[str, float], dict[str, float]]] = self._all(self._policy, "learn", seed)
        ranks, of_all = [sums for sums, _ in found], found[0][1]
        if not math.isfinite(of_all["gradient_norm"]):
            raise InputError(
                f"the gradient must be finite; it is not after {self.version} updates: lower the learning rate, or "
                "look for a reward or a log-probability out of bounds, and resume from the last checkpoint"
            )
        return {**summed(ranks), **step.figures, **of_all}

    def _log_probs(self, group: RayActorGroup, step: Step) -> list[torch.Tensor]:
        """Those of the tokens of each micro-batch under a group's model as it is now."""
        if not step.experience:
            return []
        names = ("sequences", "action_mask", "attention_mask")
        inputs = {name: [getattr(micro, name) for micro in step.experience] for name in names}
        found = self._results("forward", group.async_run_method_batch("forward", **inputs))
        return [log_probs for of_rank in found for log_probs in of_rank]

    def _group(self, actor: type, shared: bool) -> RayActorGroup:
        share = self.openrlhf.gpus_per_rank / (2 if shared else 1)
        try:
            group = RayActorGroup(1, self.openrlhf.ranks, ray.remote(actor), pg=self._place, num_gpus_per_actor=share)
        except RayActorError as error:
            self.close()
            raise self._died("__init__", error) from error
        self._groups.append(group)
        return group

    def _all(self, group: RayActorGroup, method: str, *arguments: object) -> list[Any]:
        """What a method gives on all ranks, in order."""
        with self.one_at_a_time:
            return self._results(method, group.async_run_method(method, *arguments))

    def _results(self, method: str, calls: Sequence[ray.ObjectRef]) -> list[Any]:
        """Where one rank fails the others would wait for it: then all are ended."""
        waiting = list(calls)
        try:
            while waiting:
                self._waiting[method] = [rank for rank, call in enumerate(calls) if call in waiting]
                ready, waiting = ray.wait(waiting)
                ray.get(ready)
        except RayActorError as error:
            self.close()
            raise self._died(method, error) from error
        except RayTaskError as error:
            self.close()
            if isinstance(error.cause, torch.OutOfMemoryError):
                reason = str(error.cause).splitlines()[0]
                raise InputError(
                    f"a rank needs room for a micro-batch; one of {self.name} had too little in {method!r} ({reason}): "
                    "ask for a smaller micro_batch_size or context, gradient_checkpointing, a higher zero_stage, or "
                    "more ranks, and run the same command again"
                ) from error
            raise
        except Exception:
            self.close()
            raise
        finally:
            self._waiting.pop(method, None)
        return list(ray.get(list(calls)))

    def _died(self, method: str, error: RayActorError) -> PolicyDiedError:
        reason = str(error).strip().splitlines()[0]
        return PolicyDiedError(f"a rank that trains {self.name} died in {method!r} ({reason})")

    def _about(self) -> dict[str, int | str]:
        settings = self.openrlhf
        return {"ranks": settings.ranks, "zero_stage": settings.zero_stage, "precision": settings.precision}


def summed(ranks: Sequence[dict[str, float]]) -> dict[str, float]:
    """The figures of a step, of the sums of all ranks."""
    names = dict.fromkeys(name for rank in ranks for name in rank)
    figures = {name: math.fsum(rank.get(name, 0.0) for rank in ranks) for name in names}
    weight = figures.pop("weighed")
    for mean in ("clipped", "engine_mismatch", "kl"):
        if mean in figures and weight:
            figures[mean] /= weight
    return figures


def _everywhere(model: str | Path) -> str:
    """A checkpoint's name for processes that may run in another folder."""
    found = checkpoint(model)
    return str(found.resolve()) if isinstance(found, Path) else found


def check_models(model: str | Path, reference: str | Path | None) -> int:
    """The size of the vocabulary. The models are built without weights, which takes no time and no memory."""
    shapes = []
    for path in [model, *([reference] if reference is not None else [])]:
        try:
            with torch.device("meta"):
                built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:
            raise InputError(f"{path} must hold a language model: {str(error).splitlines()[0]}") from error
        shapes.append({name: tuple(weight.shape) for name, weight in built.state_dict().items()})
    for name in [*shapes[0], *shapes[-1]]:
        if (mine := shapes[0].get(name)) != (other := shapes[-1].get(name)):
            raise InputError(
                f"a reference model must have the shape of the policy; {name} is {mine} in {model} and {other} in "
                f"{reference}: give the checkpoint that the training starts from"
            )
    return int(built.get_input_embeddings().num_embeddings)
