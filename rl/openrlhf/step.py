"""What the ranks learn from in one optimiser step: micro-batches as OpenRLHF's experience, and turnwise's loss of them.

The weights of the tokens are computed once, for the whole step, and travel with the tokens; so it is the same to the
gradient which rank has which sequence, and in which micro-batch.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from turnwise.rl.advantage import Sample
from turnwise.rl.batch import Batch, MicroBatch
from turnwise.rl.learner import control_figures
from turnwise.rl.loss import (
    LossSettings,
    Tokens,
    entropy,
    importance_ratio,
    kl_divergence,
    policy_loss,
    sequence_ratio,
    token_weights,
)
from turnwise.rl.openrlhf.names import Experience


@dataclass(frozen=True, slots=True)
class Step:
    """The experience of one optimiser step, a micro-batch each, as many for every rank and those of a rank together."""

    experience: list[Experience]
    figures: dict[str, float]

    @classmethod
    def of(
        cls,
        samples: Sequence[Sample],
        settings: LossSettings,
        *,
        control_states: Collection[str],
        ranks: int,
        micro_batch_size: int,
    ) -> "Step":
        """Empty where no token has an advantage, and none is held near a reference or rewarded for entropy."""
        batch = Batch.of(samples, control_states=control_states)
        weights, plain, alpha = token_weights(settings, batch.episodes, batch.control, batch.advantages)
        regularised = settings.kl_coefficient > 0 or settings.entropy_coefficient > 0
        idle = None if regularised else batch.advantages == 0
        experience = [pack(micro, batch, weights, plain) for micro in batch.micro_batches(micro_batch_size, skip=idle)]
        return cls(shared_out(experience, ranks), control_figures(batch, weights, alpha))


def pack(micro: MicroBatch, batch: Batch, weights: Tokens, plain_weights: Tokens) -> Experience:
    """A micro-batch as OpenRLHF wants it: place t of `action_mask` is for the token at t + 1, which is said after t.

    Two of its fields carry what OpenRLHF has no field for, and does not look at: `values` the weights of the policy
    term, `returns` those of the KL and entropy terms.
    """
    count, length = micro.inputs.shape

    def spread(values: torch.Tensor) -> torch.Tensor:
        field = torch.zeros(count, length - 1, dtype=values.dtype)
        field[micro.rows, micro.columns - 1] = values[micro.tokens]
        return field

    return Experience(
        sequences=micro.inputs,
        # Padding stands on the right, where causal attention never lets a trained token see it.
        attention_mask=torch.ones_like(micro.inputs),
        action_mask=spread(torch.ones_like(batch.sequences)),
        advantages=spread(batch.advantages),
        rollout_log_probs=spread(batch.engine_log_probs),
        values=spread(weights),
        returns=spread(plain_weights),
    )


def shared_out(experience: Sequence[Experience], ranks: int) -> list[Experience]:
    """Dealt out to the ranks one by one, so that those of like length are computed at the same time.

    A rank with less than another would wait for it forever: it gets a sequence once more, without any token to train.
    """
    if not experience:
        return []
    missing = -len(experience) % ranks
    dealt = [*experience, *[without_tokens(experience[0])] * missing]
    return [micro for rank in range(ranks) for micro in dealt[rank::ranks]]


def without_tokens(experience: Experience) -> Experience:
    """The first of its sequences, nothing of which is trained."""
    row = {name: value[:1] for name, value in vars(experience).items() if isinstance(value, torch.Tensor)}
    return replace(Experience(**row), action_mask=torch.zeros_like(row["action_mask"]))


class StepLoss(torch.nn.Module):
    """turnwise's loss with the signature and the results of OpenRLHF's, of the micro-batch that `experience` is.

    `sums` are those of `Learner.gradient`'s figures over the trained tokens so far, and of their weights.
    """

    def __init__(self, settings: LossSettings) -> None:
        super().__init__()
        self.settings = settings
        self.experience = Experience()
        self.logits = torch.empty(0)
        self.sums = defaultdict[str, float](float)

    def forward(
        self,
        log_probs: torch.Tensor,
        old_log_probs: torch.Tensor | None,
        advantages: torch.Tensor,
        action_mask: torch.Tensor,
        rollout_log_probs: torch.Tensor,
        dp_size: int = 1,
        batch_num_tokens: torch.Tensor | None = None,
        global_batch_size: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        """The loss alone has a meaning: the policy term, and the KL and entropy terms with it.

        It is `dp_size` times that of `policy_loss`, since DeepSpeed takes the mean of the gradients of that many ranks.
        OpenRLHF's own totals of the batch are not used.
        """
        nothing = torch.zeros((), device=log_probs.device)
        mask, experience = action_mask.bool(), self.experience
        # Let go of here: else they would outlast the backward pass.
        logits, self.logits = self.logits, torch.empty(0)
        if not mask.any():
            # All ranks take part in the sum of the gradients, and in that of each layer.
            return log_probs.sum() * 0, nothing, nothing, None, None
        found = log_probs[mask]
        old = found.detach() if old_log_probs is None else old_log_probs[mask]
        sequences, engine = mask.nonzero()[:, 0], rollout_log_probs[mask]
        weights, plain = experience.values[mask], experience.returns[mask]
        reference = None if experience.base_action_log_probs is None else experience.base_action_log_probs[mask]
        loss = policy_loss(
            self.settings, found, old, engine, advantages[mask], sequences, weights, plain,
            reference_log_probs=reference,
            entropies=entropy(logits[:, :-1][mask]) if self.settings.entropy_coefficient else None,
        )  # fmt: skip
        self._count(loss.detach(), found.detach(), old, engine, sequences, plain, reference)
        return loss * dp_size, nothing, nothing, None, None

    def _count(
        self,
        loss: torch.Tensor,
        log_probs: Tokens,
        old: Tokens,
        engine: Tokens,
        sequences: torch.Tensor,
        share: Tokens,
        reference: Tokens | None,
    ) -> None:
        settings, ratio = self.settings, importance_ratio(log_probs, old)
        if settings.ratio == "sequence":
            ratio = sequence_ratio(log_probs, old, sequences)
        clipped = (ratio > 1 + settings.clip_high) | (ratio < 1 - settings.clip_low)
        self.sums["weighed"] += float(share.sum())
        self.sums["loss"] += float(loss)
        self.sums["trained_tokens"] += len(log_probs)
        self.sums["clipped"] += float((share * clipped).sum())
        self.sums["engine_mismatch"] += float((share * (old - engine).abs()).sum())
        if reference is not None:
            self.sums["kl"] += float((share * kl_divergence(log_probs, reference, "k3")).sum())
