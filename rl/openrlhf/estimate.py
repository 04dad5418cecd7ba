"""About how long a run on OpenRLHF will take, and what it will cost. An estimate: it says what it assumes."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

from turnwise.protocols.graph import GraphProtocol
from turnwise.rl.openrlhf.plan import Plan
from turnwise.rl.openrlhf.settings import OpenRLHFSettings
from turnwise.rl.rounds import parse_rounds
from turnwise.rl.trained_policy import Policy
from turnwise.rl.trainer import TrainingSettings

Share = Annotated[float, Field(gt=0, le=1)]


class Assumptions(BaseModel):
    """What an estimate of time and cost rests on, and no config knows.

    `dialogue_share` is the mean length of a dialogue as a share of the most that the protocol lets it be. The
    utilisations are shares of the machine's `teraflops` that are reached while learning, while reading prompts, and
    while sampling, which waits for memory rather than for arithmetic. `gpu_hour_price` is in any currency.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dialogue_share: Share = 0.5
    learning: Share = 0.35
    reading: Share = 0.4
    sampling: Share = 0.03
    gpu_hour_price: PositiveFloat | None = None


@dataclass(frozen=True, slots=True)
class PolicyEstimate:
    """Of one policy and one step in which it learns: tokens said, tokens passed through the learner, and seconds."""

    sampled: float
    read: float
    trained: float
    sampling_seconds: float
    learning_seconds: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of a whole run. `cost` is None where no price was given."""

    policies: Mapping[str, PolicyEstimate]
    step_seconds: float
    steps: int
    hours: float
    gpus: int
    cost: float | None
    assumed: tuple[str, ...]


def estimate(
    plan: Plan,
    policies: Mapping[str, Policy],
    settings: OpenRLHFSettings,
    protocol: GraphProtocol,
    training: TrainingSettings,
    assumptions: Assumptions,
    *,
    prompt_tokens: int = 512,
) -> Estimate:
    """The time of each step, and of all, on the GPUs of a plan, of which ranks and engines each have some.

    A trained token takes 6 N operations (N parameters that are multiplied with; forward 2 N, backward 4 N), and 2 N
    more for each further forward pass: the reference model's, that of gradient checkpointing, and that of the old
    policy from the second mini-batch on. A sampled or read token takes 2 N. Attention comes on top.
    """
    episodes = training.problems * training.samples
    said = assumptions.dialogue_share * protocol.graph.worst_case()[1]
    length, shares = prompt_tokens + said, seat_shares(protocol)
    flops = plan.machine.teraflops * 1e12
    # Colocated, one side sleeps while the other works: each has the bundle's whole share in its turn.
    both = settings.gpus_per_rank + settings.gpus_per_actor
    ranks = settings.ranks * (both if settings.colocated else settings.gpus_per_rank)
    engines = settings.actors * (both if settings.colocated else settings.gpus_per_actor)
    found = dict[str, PolicyEstimate]()
    for name, policy in policies.items():
        token = plan.shapes[name].arithmetic(length)
        sampled = episodes * said * sum(shares[seat] for seat in policy.seats)
        trained = episodes * length * len(policy.seats)
        batches, loss = policy.learner.mini_batches, policy.learner.loss
        passes = 3 + settings.gradient_checkpointing + (loss.kl_coefficient > 0) + (batches - 1) / batches
        learning = trained * passes * token / (flops * assumptions.learning * ranks)
        sampling = token * (
            sampled / (flops * assumptions.sampling * engines)
            + (trained - sampled) / (flops * assumptions.reading * engines)
        )
        found[name] = PolicyEstimate(sampled, trained - sampled, trained, sampling, learning)
    rounds = parse_rounds(training.rounds or "+".join(policies), training.steps, tuple(policies))
    sampling = max(one.sampling_seconds for one in found.values())
    learning = fmean(max(found[name].learning_seconds for name in round.trains) for round in rounds)
    steps, used = rounds[-1].end, len(plan.gpus)
    hours = steps * (sampling + learning) / 3600
    price = assumptions.gpu_hour_price
    return Estimate(
        found, sampling + learning, steps, hours, used, None if price is None else hours * used * price,
        _assumed(plan, assumptions, said, prompt_tokens, episodes),
    )  # fmt: skip


def seat_shares(protocol: GraphProtocol) -> dict[str, float]:
    """Each seat's share of what is sampled, as the mean budgets of its states suggest."""
    means = {
        seat: fmean(state.max_tokens for state in protocol.graph.states.values() if seat in state.seats)
        for seat in protocol.seats
    }
    return {seat: mean / sum(means.values()) for seat, mean in means.items()}


def _assumed(plan: Plan, assumptions: Assumptions, said: float, prompt_tokens: int, episodes: int) -> tuple[str, ...]:
    return (
        f"time: {episodes} dialogues a step, of {said:.0f} sampled tokens on average ({assumptions.dialogue_share:.0%} "
        f"of the most) after a prompt of {prompt_tokens}; every seat reads all of it, and has the share of it that its "
        "turns' budgets have",
        "6 N operations a trained token, 2 N for each further forward pass (reference, checkpointing, old policy), 2 N "
        "a sampled or a read token, and attention over half the length",
        f"utilisation of {plan.machine.teraflops:g} TFLOP/s: {assumptions.learning:.0%} learning, "
        f"{assumptions.reading:.0%} reading prompts, {assumptions.sampling:.0%} sampling",
        "the engines of all policies sample at once, and after them all policies of a round learn at once",
        "not counted: loading, waiting for the longest dialogue, grading, sending weights, sleeping and waking, "
        "evaluation, checkpoints",
    )
