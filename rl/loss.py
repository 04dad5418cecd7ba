"""Policy-gradient losses, as pure functions of the trained tokens of an optimiser step.

Everything is flat: one entry a trained token, all sequences one after the other, others' tokens and prompts left out.
`episodes` gives for each token the number of its episode and `sequences` that of its sequence (0, 1, ...).

A loss is a weighted sum of per-token terms, and the weights alone say what is averaged over what. They are computed
once for the whole optimiser step, so a gradient is the same however the step is cut into micro-batches.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

Tokens = Float[torch.Tensor, " tokens"]
Flags = Bool[torch.Tensor, " tokens"]
Numbers = Int[torch.Tensor, " tokens"]
Scalar = Float[torch.Tensor, ""]

Aggregation = Literal["sample-mean", "token-mean", "constant", "degrpo", "degrpo-token-mean"]
Divergence = Literal["k1", "k2", "k3"]


class LossSettings(BaseModel):
    """Which loss. The defaults are GRPO as Thinkless writes it (arXiv 2505.13379, eq. 1), without a KL term.

    - `aggregation`: "sample-mean" gives each episode the same weight (eq. 1); "token-mean" each token (DAPO, and what
      Thinkless' code calls vanilla); "constant" divides by `longest` tokens an episode (Dr. GRPO); "degrpo" takes the
      control tokens out of the mean, with weight `alpha` (eq. 4); "degrpo-token-mean" is what the authors' code does.
    - `balance`, if given, sets `alpha` anew in each step, so that the control tokens have that share of all gradient
      weight (`balanced_alpha`).
    - `ratio`: of each "token", or of the whole "sequence" (GSPO).
    - `clip_low`, `clip_high`: the ratio is clipped to [1 − clip_low, 1 + clip_high]; DAPO's clip-higher has 0.2, 0.28.
    - `dual_clip`: a bound above 1 on the ratio where the advantage is negative (arXiv 1912.09729, eq. 5).
    - `importance_cap`: corrects for an engine whose log-probabilities differ from the trainer's, by the truncated
      weight min(trainer / engine, cap).
    - `kl_coefficient`, `kl`: β and the estimator of the divergence from the reference model, clamped to [−10, 10].
      As a loss, "k1" has no expected gradient: it is there to be measured with, or to compare.
    - `entropy_coefficient`: a bonus for entropy, with the same weights as the KL term.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    aggregation: Aggregation = "sample-mean"
    alpha: PositiveFloat = 1e-3
    balance: Annotated[float, Field(gt=0, lt=1)] | None = None
    longest: PositiveInt = 1024
    ratio: Literal["token", "sequence"] = "token"
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    clip_high: PositiveFloat = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    importance_cap: PositiveFloat | None = None
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.0
    kl: Divergence = "k3"
    entropy_coefficient: Annotated[float, Field(ge=0)] = 0.0


def sample_mean_weights(episodes: Numbers) -> Tokens:
    """1 / (N T_i): the mean over N episodes of the mean over an episode's T_i tokens.

    GRPO (arXiv 2402.03300, eq. 3; arXiv 2505.13379, eq. 1, whose T_i + 1 counts the control token apart).
    """
    lengths = torch.bincount(episodes)
    return 1 / (lengths[episodes].double() * (lengths > 0).sum())


def token_mean_weights(episodes: Numbers) -> Tokens:
    """1 / Σ T_i: the mean over all tokens of the step. DAPO (arXiv 2503.14476, eq. 8)."""
    return torch.full(episodes.shape, 1 / max(1, len(episodes)), dtype=torch.float64, device=episodes.device)


def constant_weights(episodes: Numbers, longest: int) -> Tokens:
    """1 / (N L): a sum over tokens, divided by a constant L and the N episodes. Dr. GRPO (arXiv 2503.20783, §3.2)."""
    count = (torch.bincount(episodes) > 0).sum()
    return torch.full(episodes.shape, 1.0, dtype=torch.float64, device=episodes.device) / (longest * count)


def degrpo_weights(episodes: Numbers, control: Flags, *, token_mean: bool = False) -> tuple[Tokens, Tokens]:
    """The weights of control tokens, to be multiplied by α, and those of response tokens; 0 where a token is not one.

    DeGRPO (arXiv 2505.13379, eq. 4): J = 1/N Σ_i (α L_{i,control} + 1/T_i Σ_t L_{i,t}), T_i without control tokens.
    With several control tokens in an episode, α L is their mean, so that an episode still weighs once. With
    `token_mean`, responses are averaged over all tokens of the step instead, as in the authors' code.
    """
    count = (torch.bincount(episodes) > 0).sum()

    def means(chosen: Flags) -> Tokens:
        lengths = torch.bincount(episodes, weights=chosen.double())
        return chosen / (lengths[episodes].clamp(min=1) * count)

    responses = ~control / (~control).sum().clamp(min=1).double() if token_mean else means(~control)
    return means(control), responses


def balanced_alpha(control: Tokens, responses: Tokens, advantages: Tokens, share: float) -> float:
    """The α with which control tokens have `share` of the step's gradient weight, Σ |w A|; 1 where either has none.

    Not in the paper, whose fixed α means another balance at every response length.
    """
    decisions = float((control * advantages).abs().sum())
    words = float((responses * advantages).abs().sum())
    return share / (1 - share) * words / decisions if decisions > 0 and words > 0 else 1.0


def token_weights(
    settings: LossSettings, episodes: Numbers, control: Flags, advantages: Tokens
) -> tuple[Tokens, Tokens, float]:
    """What each token weighs in the policy term, and in the KL and entropy terms, over a whole step; and the α used.

    KL and entropy are averaged as the policy term is, control tokens not set apart.
    """
    if settings.aggregation == "constant":
        plain = constant_weights(episodes, settings.longest)
    elif settings.aggregation in ("token-mean", "degrpo-token-mean"):
        plain = token_mean_weights(episodes)
    else:
        plain = sample_mean_weights(episodes)
    if not settings.aggregation.startswith("degrpo"):
        return plain, plain, 1.0
    decisions, responses = degrpo_weights(episodes, control, token_mean=settings.aggregation == "degrpo-token-mean")
    alpha = settings.alpha
    if settings.balance is not None:
        alpha = balanced_alpha(decisions, responses, advantages, settings.balance)
    return alpha * decisions + responses, plain, alpha


def importance_ratio(log_probs: Tokens, old_log_probs: Tokens) -> Tokens:
    """ρ_t = π(t) / π_old(t), of each token. PPO (arXiv 1707.06347, §3)."""
    return (log_probs - old_log_probs).exp()


def sequence_ratio(log_probs: Tokens, old_log_probs: Tokens, sequences: Numbers) -> Tokens:
    """s_t = sg[s] π(t) / sg[π(t)], s = (Π_t ρ_t)^(1/T) of the token's sequence. GSPO-token (arXiv 2507.18071, eq. 14).

    sg stops the gradient. Where all tokens of a sequence have one advantage, this is GSPO (eq. 5).
    """
    difference = (log_probs - old_log_probs).detach()
    totals = torch.zeros(int(sequences.max()) + 1, dtype=difference.dtype, device=difference.device)
    means = totals.index_add(0, sequences, difference) / torch.bincount(sequences).clamp(min=1)
    return means[sequences].exp() * (log_probs - log_probs.detach()).exp()


def clipped_objective(
    ratio: Tokens, advantages: Tokens, *, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tokens:
    """L_t = min(ρ A, clip(ρ, 1 − clip_low, 1 + clip_high) A), to be maximised. PPO (arXiv 1707.06347, eq. 7).

    With `dual_clip` c, it is at least c A where A < 0 (arXiv 1912.09729, eq. 5).
    """
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is None:
        return objective
    return torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)


def truncated_importance_weight(old_log_probs: Tokens, engine_log_probs: Tokens, cap: float) -> Tokens:
    """min(π_old / π_engine, cap): what a sample of the engine is worth to the trainer. TIS (Yao et al. 2025)."""
    return (old_log_probs - engine_log_probs).exp().clamp(max=cap).detach()


def kl_divergence(log_probs: Tokens, reference_log_probs: Tokens, kind: Divergence) -> Tokens:
    """KL(π ‖ π_ref), estimated at each sampled token and clamped to [−10, 10] (Schulman 2020, "Approximating KL").

    With d = log π − log π_ref: k1 = d, k2 = d² / 2, k3 = exp(−d) + d − 1.
    """
    difference = log_probs - reference_log_probs
    if kind == "k1":
        estimate = difference
    elif kind == "k2":
        estimate = difference.square() / 2
    else:
        # Past 20 the estimate is clamped anyway; unbounded, exp overflows, and the gradient is 0 · inf.
        estimate = (-difference).clamp(max=20).exp() + difference - 1
    return estimate.clamp(-10, 10)


def entropy(logits: Float[torch.Tensor, "tokens vocabulary"]) -> Tokens:
    """−Σ_v π(v) log π(v) (nats) of the distribution that each token was drawn from."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def policy_loss(
    settings: LossSettings,
    log_probs: Tokens,
    old_log_probs: Tokens,
    engine_log_probs: Tokens,
    advantages: Tokens,
    sequences: Numbers,
    weights: Tokens,
    plain_weights: Tokens,
    *,
    reference_log_probs: Tokens | None = None,
    entropies: Tokens | None = None,
) -> Scalar:
    """−Σ w_t L_t + β Σ v_t KL_t − c Σ v_t H_t over some of the step's sequences; the losses of all of them add up.

    w and v are `weights` and `plain_weights`, from `token_weights` for the whole step.
    """
    if settings.ratio == "token":
        ratio = importance_ratio(log_probs, old_log_probs)
    else:
        ratio = sequence_ratio(log_probs, old_log_probs, sequences)
    objective = clipped_objective(
        ratio, advantages, clip_low=settings.clip_low, clip_high=settings.clip_high, dual_clip=settings.dual_clip
    )
    if settings.importance_cap is not None:
        objective = objective * truncated_importance_weight(old_log_probs, engine_log_probs, settings.importance_cap)
    loss = -(weights * objective).sum()
    if reference_log_probs is not None:
        divergence = kl_divergence(log_probs, reference_log_probs, settings.kl)
        loss = loss + settings.kl_coefficient * (plain_weights * divergence).sum()
    if entropies is not None:
        loss = loss - settings.entropy_coefficient * (plain_weights * entropies).sum()
    return loss
