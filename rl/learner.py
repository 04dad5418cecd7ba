"""One policy that learns: a model, its optimiser, and what they do with a batch of samples."""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import Annotated, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from transformers import PreTrainedModel, get_scheduler

from turnwise.environments.errors import InputError
from turnwise.rl.advantage import Sample
from turnwise.rl.batch import Batch, Tokens
from turnwise.rl.loss import (
    LossSettings,
    entropy,
    importance_ratio,
    kl_divergence,
    policy_loss,
    sequence_ratio,
    token_weights,
)


class LearnerSettings(BaseModel):
    """How a policy learns: AdamW, and the loss.

    `warmup` is a number of optimiser steps. `clip` bounds the norm of the gradient. One rollout is split by problems
    into `mini_batches`, each of which is an optimiser step; from the second on the policy is no longer the one that was
    sampled, which is what the clipped ratio is for. `micro_batch_size` (sequences) bounds memory and changes nothing
    else.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: PositiveFloat = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: PositiveFloat = 1.0
    mini_batches: PositiveInt = 1
    micro_batch_size: PositiveInt = 8
    loss: LossSettings = LossSettings()


class Learner:
    """Trains `model` in place. `updates` is how many rollouts it may learn from, for the learning-rate schedule.

    `reference` is the model that a KL term keeps it near to; required where the loss has one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: LearnerSettings,
        *,
        updates: int,
        temperature: float = 1.0,
        reference: PreTrainedModel | None = None,
    ) -> None:
        if settings.loss.kl_coefficient and reference is None:
            raise InputError("a KL term needs a reference model; give one, or set kl_coefficient to 0")
        self.model = model
        self.reference = reference if settings.loss.kl_coefficient else None
        self.settings = settings
        self.temperature = temperature
        self.version = 0
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._scheduler = get_scheduler(
            "constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
            self._optimizer,
            num_warmup_steps=settings.warmup,
            num_training_steps=updates * settings.mini_batches,
        )

    def update(
        self, samples: Sequence[Sample], *, control_states: Collection[str] = (), seed: int = 0
    ) -> dict[str, float]:
        """Learns from one rollout's samples; returns figures to be logged. `seed` is for dropout, if there is any.

        Raises InputError where the gradient is not finite; the weights are then as they were before that step.
        """
        batches = [self._batch(part, control_states) for part in split(samples, self.settings.mini_batches)]
        # From the second step on, the policy is no longer the one that was sampled.
        old = [None, *(self._log_probs(batch) for batch in batches[1:])]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model.train()
            try:
                steps = [self._step(batch, old_log_probs) for batch, old_log_probs in zip(batches, old, strict=False)]
            finally:
                self.model.train(False)
        self.version += 1
        return {name: fmean(step[name] for step in steps if name in step) for step in steps for name in step}

    def state(self) -> dict[str, object]:
        """All that `load` needs to go on exactly from here, not copied: save it before the next update."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "version": self.version,
        }

    def load(self, state: Mapping[str, object]) -> None:
        """Takes up a state."""
        self.model.load_state_dict(state["model"])  # type: ignore[arg-type]
        self._optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
        self._scheduler.load_state_dict(state["scheduler"])
        self.version = cast(int, state["version"])

    def gradient(self, batch: Batch, old_log_probs: Tokens | None = None) -> dict[str, float]:
        """Adds the gradient of a batch's loss to the parameters; returns figures to be logged.

        `old_log_probs` are those of the policy that was sampled; by default it is the one that now learns.
        """
        loss_settings = self.settings.loss
        weights, plain, alpha = token_weights(loss_settings, batch.episodes, batch.control, batch.advantages)
        figures, weighed = defaultdict[str, float](float), 0.0
        # Without an advantage a token has no gradient, unless it is held near a reference or rewarded for entropy.
        regularised = self.reference is not None or loss_settings.entropy_coefficient > 0
        idle = None if regularised else batch.advantages == 0
        for micro in batch.micro_batches(self.settings.micro_batch_size, skip=idle):
            tokens, reference = micro.tokens, None
            logits = micro.logits(self.model, self.temperature)
            log_probs = micro.log_probs(logits)
            old = log_probs.detach() if old_log_probs is None else old_log_probs[tokens]
            if self.reference is not None:
                with torch.no_grad():
                    reference = micro.log_probs(micro.logits(self.reference, self.temperature))
            loss = policy_loss(
                loss_settings, log_probs, old, batch.engine_log_probs[tokens], batch.advantages[tokens],
                batch.sequences[tokens], weights[tokens], plain[tokens], reference_log_probs=reference,
                entropies=entropy(logits) if loss_settings.entropy_coefficient else None,
            )  # fmt: skip
            torch.autograd.backward(loss)
            with torch.no_grad():
                share, ratio = plain[tokens], importance_ratio(log_probs, old)
                if loss_settings.ratio == "sequence":
                    ratio = sequence_ratio(log_probs, old, batch.sequences[tokens])
                clipped = (ratio > 1 + loss_settings.clip_high) | (ratio < 1 - loss_settings.clip_low)
                mismatch = (old - batch.engine_log_probs[tokens]).abs()
                weighed += float(share.sum())
                figures["loss"] += float(loss)
                figures["trained_tokens"] += len(tokens)
                figures["clipped"] += float((share * clipped).sum())
                figures["engine_mismatch"] += float((share * mismatch).sum())
                if reference is not None:
                    figures["kl"] += float((share * kl_divergence(log_probs, reference, "k3")).sum())
        for mean in ("clipped", "engine_mismatch", "kl"):
            if mean in figures and weighed:
                figures[mean] /= weighed
        return {**figures, **control_figures(batch, weights, alpha)}

    def _step(self, batch: Batch, old_log_probs: Tokens | None) -> dict[str, float]:
        figures = self.gradient(batch, old_log_probs)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip))
        if not math.isfinite(norm):
            self._optimizer.zero_grad()
            raise InputError(
                f"the gradient must be finite; its norm is {norm} after {self.version} updates: lower the learning "
                "rate, or look for a reward or a log-probability out of bounds, and resume from the last checkpoint"
            )
        # Where no token was trained, gradients are None, not 0: neither momentum nor weight decay moves the weights.
        self._optimizer.step()
        figures |= {"gradient_norm": norm, "learning_rate": self._scheduler.get_last_lr()[0]}
        self._optimizer.zero_grad()
        self._scheduler.step()
        return figures

    def _batch(self, samples: Sequence[Sample], control_states: Collection[str]) -> Batch:
        parameter = next(self.model.parameters())
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return Batch.of(samples, control_states=control_states, dtype=dtype, device=parameter.device)

    def _log_probs(self, batch: Batch) -> Tokens:
        found = torch.zeros_like(batch.advantages)
        with torch.no_grad():
            for micro in batch.micro_batches(self.settings.micro_batch_size):
                found[micro.tokens] = micro.log_probs(micro.logits(self.model, self.temperature))
        return found


def split(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    """The samples in `parts` of nearly as many problems each, a problem's samples together."""
    problems = list(dict.fromkeys(sample.trajectory.episode.transcript.problem.id for sample in samples))
    part = {problem: index * parts // len(problems) for index, problem in enumerate(problems)}
    pieces: list[list[Sample]] = [[] for _ in range(parts)]
    for sample in samples:
        pieces[part[sample.trajectory.episode.transcript.problem.id]].append(sample)
    return [piece for piece in pieces if piece]


def control_figures(batch: Batch, weights: Tokens, alpha: float) -> dict[str, float]:
    """How much gradient weight rests on control tokens, all told and by mode. Empty for a batch without any.

    `control/share` is their share of Σ |w A| over all tokens. For each mode, `control/weight/<mode>` is the mean weight
    of its control tokens times the number of episodes: with one an episode, α under DeGRPO and the mean of 1 / (T + 1)
    under GRPO (arXiv 2505.13379, eq. 3); `control/gradient/<mode>` is Σ |w A| over them.
    """
    if not batch.modes:
        return {}
    gradient = (weights * batch.advantages).abs()
    episodes, total = int((torch.bincount(batch.episodes) > 0).sum()), float(gradient.sum())
    figures = {"alpha": alpha, "control/share": float(gradient[batch.control].sum()) / total if total else 0.0}
    chosen, strength = weights[batch.control].tolist(), gradient[batch.control].tolist()
    for mode in sorted(set(batch.modes)):
        places = [place for place, other in enumerate(batch.modes) if other == mode]
        figures[f"control/weight/{mode}"] = episodes * fmean(chosen[place] for place in places)
        figures[f"control/gradient/{mode}"] = math.fsum(strength[place] for place in places)
    return figures
