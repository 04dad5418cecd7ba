"""A policy that learns: its gradient is exactly that of the loss over its own tokens, however the step is cut."""

import copy
import io
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from math import log

import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.protocols.rewards import Reward
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl import learner as learner_module
from turnwise.rl.advantage import Sample, assign_credit
from turnwise.rl.batch import Batch
from turnwise.rl.learner import Learner, LearnerSettings, control_figures, split
from turnwise.rl.loss import Aggregation, LossSettings, token_weights
from turnwise.rl.trajectory import trajectories

Dialogue = Callable[..., Episode]
MiniModel = Callable[..., PreTrainedModel]

AGGREGATIONS: tuple[Aggregation, ...] = ("sample-mean", "token-mean", "constant", "degrpo", "degrpo-token-mean")
CONTROL = ("route", "choose")


def played(dialogue: Dialogue, problem: str, count: int = 4) -> list[Episode]:
    """The solver chooses a mode, speaks, hears its partner, and may choose again; every other time it forgets."""
    rng, episodes = random.Random(problem), list[Episode]()

    def words() -> tuple[int, ...]:
        return tuple(rng.randrange(8, 28) for _ in range(rng.randint(1, 6)))

    for sample in range(count):
        turns: list[tuple[object, ...]] = [("solver", "route", (rng.randrange(4, 7),), "<think>")]
        for _ in range(rng.randint(1, 3)):
            turns += [("solver", "think", words()), ("short", "answer", words())]
            turns += [("solver", "choose", (rng.randrange(4, 7),), "<ask>")] if rng.random() < 0.5 else []
        turns.append(("solver", "think", words()))
        episodes.append(dialogue(*turns, problem=problem, sample=sample, forgetful=sample % 2 == 1))
    return episodes


def credited(episodes: Sequence[Sequence[Episode]], rewards: Sequence[Sequence[float]]) -> list[Sample]:
    paid = [[{"solver": Reward({"term": reward})} for reward in group] for group in rewards]
    return list(assign_credit(episodes, paid, ("solver",)).samples)


@pytest.fixture(scope="module")
def samples(dialogue: Dialogue) -> list[Sample]:
    """Eight episodes of two problems, in 18 sequences, with advantages of many sizes."""
    episodes = [played(dialogue, "p"), played(dialogue, "q")]
    return credited(episodes, [[1, 0.5, -1, -1], [0.3, 0.9, 0, -2]])


def learner(model: PreTrainedModel, *, temperature: float = 1.0, **settings: object) -> Learner:
    """The keys of a loss stand beside those of the learner."""
    loss = {key: settings.pop(key) for key in list(settings) if key in LossSettings.model_fields}
    chosen = LearnerSettings.model_validate({**settings, "loss": loss})
    return Learner(model, chosen, updates=10, temperature=temperature)


def batch_of(samples: Sequence[Sample]) -> Batch:
    return Batch.of(samples, control_states=CONTROL, dtype=torch.float64)


def gradient(learner: Learner, batch: Batch, old_log_probs: torch.Tensor | None = None) -> torch.Tensor:
    """All of it, in one vector."""
    learner.model.zero_grad()
    learner.gradient(batch, old_log_probs)
    return torch.cat([
        torch.zeros_like(parameter).flatten() if parameter.grad is None else parameter.grad.flatten()
        for parameter in learner.model.parameters()
    ])  # fmt: skip


def weights(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To a millionth of its length."""
    assert expected.norm() > 1e-4
    assert (found - expected).norm() <= 1e-6 * expected.norm()


# The gradient


def by_hand(
    model: PreTrainedModel, samples: Sequence[Sample], loss: LossSettings, temperature: float = 1.0
) -> torch.Tensor:
    """The gradient of −Σ w A log π: a forward pass of its own for each turn, and the weights from their definitions."""
    turns = [
        (s.trajectory.episode.id, turn.step, worth)
        for s in samples
        for turn, worth in zip(s.trajectory.turns, s.advantages, strict=True)
    ]
    count = len({name for name, _, _ in turns})
    total = torch.zeros((), dtype=torch.float64)
    for name, (_, state, reply, _), advantage in turns:
        lengths = [(other, step.state in CONTROL, len(step.reply.token_ids)) for other, step, _ in turns]
        own = [(control, length) for other, control, length in lengths if other == name]
        alike = sum(length for control, length in own if control == (state in CONTROL))
        if loss.aggregation == "sample-mean":
            weight = 1 / (count * sum(length for _, length in own))
        elif loss.aggregation == "token-mean":
            weight = 1 / sum(length for _, _, length in lengths)
        elif loss.aggregation == "constant":
            weight = 1 / (count * loss.longest)
        elif state in CONTROL:
            weight = loss.alpha / (count * alike)
        elif loss.aggregation == "degrpo":
            weight = 1 / (count * alike)
        else:
            weight = 1 / sum(length for _, control, length in lengths if not control)
        ids = torch.tensor([reply.prompt_token_ids + reply.token_ids])
        logits = model(ids).logits[0, len(reply.prompt_token_ids) - 1 : -1]
        log_probs = (logits / temperature).log_softmax(-1)
        total = total - weight * advantage * log_probs.gather(-1, torch.tensor(reply.token_ids)[:, None]).sum()
    return torch.cat([part.flatten() for part in torch.autograd.grad(total, list(model.parameters()))])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_gradient_is_that_by_hand_for_every_micro_batch_size_and_order(
    mini_model: MiniModel, samples: list[Sample], aggregation: Aggregation
) -> None:
    model, settings = mini_model(), {"aggregation": aggregation, "alpha": 0.1, "longest": 40}
    expected = by_hand(model, samples, LossSettings.model_validate(settings))
    for size in (1, 2, 4, 8, 100):
        assert_same(gradient(learner(model, micro_batch_size=size, **settings), batch_of(samples)), expected)
        shuffled = random.Random(size).sample(samples, len(samples))
        assert_same(gradient(learner(model, micro_batch_size=size, **settings), batch_of(shuffled)), expected)


def test_a_policy_learns_at_the_temperature_at_which_it_was_sampled(
    mini_model: MiniModel, samples: list[Sample]
) -> None:
    model, batch = mini_model(), batch_of(samples)
    found = gradient(learner(model, temperature=0.6), batch)
    assert_same(found, by_hand(model, samples, LossSettings(), temperature=0.6))
    # Its ratio is to what it was at that temperature, too: it is 1, and nothing is clipped.
    old = learner(model, temperature=0.6)._log_probs(batch)
    assert (old - learner(model)._log_probs(batch)).abs().max() > 0.1
    assert_same(gradient(learner(model, temperature=0.6), batch, old), found)


REGULARISED = {"kl_coefficient": 0.2, "entropy_coefficient": 0.1, "importance_cap": 1.1, "dual_clip": 1.5}


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_so_it_is_with_all_other_terms_and_away_from_the_policy_that_was_sampled(
    mini_model: MiniModel, samples: list[Sample], aggregation: Aggregation, ratio: str
) -> None:
    model, reference = mini_model(), mini_model(seed=1)
    settings = {**REGULARISED, "aggregation": aggregation, "ratio": ratio, "balance": 0.3}
    found = []
    for size, order in ((100, samples), (1, samples[::-1]), (2, samples), (4, samples[1:] + samples[:1]), (8, samples)):
        chosen = LearnerSettings(loss=LossSettings.model_validate(settings), micro_batch_size=size)
        batch = batch_of(order)
        old = Learner(mini_model(seed=2), chosen, updates=1, reference=reference)._log_probs(batch)
        found.append(gradient(Learner(model, chosen, updates=1, reference=reference), batch, old))
    for other in found[1:]:
        assert_same(other, found[0])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_gradient_is_that_of_finite_differences_in_the_weights(
    mini_model: MiniModel, samples: list[Sample], aggregation: Aggregation, temperature: float
) -> None:
    model, reference, sampled = mini_model(), mini_model(seed=1), mini_model(seed=0)
    with torch.no_grad():
        for parameter in sampled.parameters():
            parameter.add_(0.01 * torch.sin(torch.arange(parameter.numel(), dtype=torch.float64)).view_as(parameter))
    settings = LearnerSettings(loss=LossSettings(aggregation=aggregation, **REGULARISED))
    batch = batch_of(samples)
    old = Learner(sampled, settings, updates=1, temperature=temperature, reference=reference)._log_probs(batch)
    tried = Learner(model, settings, updates=1, temperature=temperature, reference=reference)
    found = gradient(tried, batch, old)
    direction = torch.cos(torch.arange(len(found), dtype=torch.float64))
    start, losses = weights(model), []
    for step in (1e-5, -1e-5):
        torch.nn.utils.vector_to_parameters(start + step * direction, model.parameters())
        losses.append(tried.gradient(batch, old)["loss"])
    assert abs(found @ direction) > 1e-3
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(float(found @ direction), rel=1e-6)


def test_of_another_seats_tokens_there_is_no_gradient(mini_model: MiniModel, dialogue: Dialogue) -> None:
    """At each position of each sequence, the gradient in the final state, from which the next token's logits come."""
    episodes = [
        dialogue(
            ("solver", "a", (7, 8)), ("short", "b", (9, 10, 11)), ("solver", "a", (12,)), ("short", "b", (13, 14)),
            problem="p", sample=sample,
        )
        for sample in range(2)
    ]  # fmt: skip
    for seat, said in (("solver", {4, 5, 9}), ("short", {6, 7, 8, 10, 11})):
        model, states = mini_model(), list[torch.Tensor]()
        model.model.norm.register_forward_hook(
            lambda module, inputs, output, states=states: (output.retain_grad(), states.append(output))[0]
        )
        drawn = [Sample(t, (1.0 - 3 * n,) * 2) for n, e in enumerate(episodes) for t in trajectories(e, seat)]
        gradient(learner(model), batch_of(drawn))
        (state,) = states
        assert state.grad is not None
        trained = {tuple(place) for place in (state.grad != 0).any(-1).nonzero().tolist()}
        assert trained == {(row, token - 1) for row in range(2) for token in said}


def test_nothing_after_the_last_trained_token_and_no_padding_is_read(mini_model: MiniModel, dialogue: Dialogue) -> None:
    turns = [("solver", "a", (7, 8)), ("short", "b", (9, 10, 11)), ("solver", "a", (12,)), ("solver", "b", (13, 14))]
    short, long = dialogue(*turns[:1]), dialogue(*turns, sample=1)
    model, states = mini_model(), list[torch.Tensor]()
    model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: (output.retain_grad(), states.append(output))[0]
    )
    drawn = [Sample(t, (1.0,) * len(t.turns)) for episode in (short, long) for t in trajectories(episode, "solver")]
    gradient(learner(model), batch_of(drawn))
    assert states[0].grad is not None
    read = (states[0].grad != 0).any(-1).tolist()
    assert read == [[True] * 5 + [False] * 7, [True] * 11 + [False]]


def test_a_seats_gradient_knows_nothing_of_how_likely_others_were(mini_model: MiniModel, samples: list[Sample]) -> None:
    def changed(sample: Sample) -> Sample:
        episode = sample.trajectory.episode
        steps = tuple(
            step._replace(reply=replace(step.reply, log_probabilities=(-9.0,) * len(step.reply.token_ids)))
            if step.seat != "solver" else step
            for step in episode.transcript.steps
        )  # fmt: skip
        assert steps != episode.transcript.steps
        other = replace(episode, transcript=replace(episode.transcript, steps=steps))
        place = trajectories(episode, "solver").index(sample.trajectory)
        return Sample(trajectories(other, "solver")[place], sample.advantages)

    model = mini_model()
    found = [
        gradient(learner(model, importance_cap=1.5), batch_of(some)) for some in (samples, list(map(changed, samples)))
    ]
    assert torch.equal(*found)


# What is left out


def forwards(model: PreTrainedModel) -> list[int]:
    """The number of sequences of each forward pass from now on."""
    counts: list[int] = []
    model.register_forward_pre_hook(
        lambda module, inputs, named: counts.append(len(named["input_ids"])), with_kwargs=True
    )
    return counts


@pytest.fixture(scope="module")
def half_idle(dialogue: Dialogue) -> list[Sample]:
    """Four episodes that are worth something, and four that are worth nothing."""
    return credited([played(dialogue, "p"), played(dialogue, "q")], [[1, 0, -1, -1], [1, 1, 1, 1]])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_sequences_without_an_advantage_cost_no_forward_and_count_all_the_same(
    mini_model: MiniModel, half_idle: list[Sample], aggregation: Aggregation
) -> None:
    model = mini_model()
    expected = by_hand(model, half_idle, LossSettings(aggregation=aggregation))
    counts = forwards(model)
    assert_same(gradient(learner(model, aggregation=aggregation), batch_of(half_idle)), expected)
    worth = [sample for sample in half_idle if any(sample.advantages)]
    assert sum(counts) == len(worth) < len(half_idle)


def test_where_there_is_a_bonus_for_entropy_or_a_reference_nothing_is_left_out(
    mini_model: MiniModel, half_idle: list[Sample]
) -> None:
    for settings in ({"entropy_coefficient": 0.1}, {"kl_coefficient": 0.1}):
        model = mini_model()
        counts = forwards(model)
        chosen = LearnerSettings(loss=LossSettings.model_validate(settings))
        Learner(model, chosen, updates=1, reference=mini_model(seed=1)).gradient(batch_of(half_idle))
        assert sum(counts) == len(half_idle)


def test_where_nothing_is_worth_anything_the_weights_stay_as_they_are(
    mini_model: MiniModel, samples: list[Sample]
) -> None:
    """Momentum and weight decay would move them."""
    taught = learner(mini_model(), learning_rate=0.01, weight_decay=0.5)
    idle = [replace(sample, advantages=(0.0,) * len(sample.advantages)) for sample in samples]
    for before in ([], [samples]):
        for some in before:
            taught.update(some)
        start = weights(taught.model)
        figures = taught.update(idle, control_states=CONTROL)
        assert torch.equal(weights(taught.model), start)
        assert figures["gradient_norm"] == 0
        assert figures["control/share"] == 0
    assert taught.update([]) == {}
    assert torch.equal(weights(taught.model), start)
    assert taught.version == 4


# Steps


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The log-probabilities and the old ones of each loss that is taken."""
    taken: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = learner_module.policy_loss

    def spy(
        settings: LossSettings, log_probs: torch.Tensor, old: torch.Tensor, *rest: object, **more: object
    ) -> object:
        taken.append((log_probs.detach().clone(), old.clone()))
        return original(settings, log_probs, old, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(learner_module, "policy_loss", spy)
    return taken


def test_mini_batches_are_steps_with_the_ratio_to_the_policy_that_was_sampled(
    mini_model: MiniModel, samples: list[Sample], steps: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    taught = learner(mini_model(), mini_batches=2, micro_batch_size=100, learning_rate=0.01)
    figures = taught.update(samples, control_states=CONTROL)
    (first, first_old), (second, second_old) = steps
    assert torch.equal(first, first_old)
    sampled = learner(mini_model())
    parts = [batch_of(part) for part in split(samples, 2)]
    torch.testing.assert_close(first_old, sampled._log_probs(parts[0]))
    torch.testing.assert_close(second_old, sampled._log_probs(parts[1]))
    assert (second - second_old).abs().min() > 1e-6
    assert (second - second_old).abs().max() > 0.1
    assert taught.version == 1
    # Figures are the mean of both steps', and the engine's mismatch is with the policy that was sampled.
    clipped = ((second - second_old).exp() - 1).abs() > 0.2
    share = token_weights(LossSettings(), parts[1].episodes, parts[1].control, parts[1].advantages)[1]
    assert 0 < figures["clipped"] == pytest.approx((share * clipped).sum().item() / 2)
    mismatches = [
        (token_weights(LossSettings(), part.episodes, part.control, part.advantages)[1] * (old + 0.5).abs())
        .sum()
        .item()
        for part, old in zip(parts, (first_old, second_old), strict=True)
    ]
    assert figures["engine_mismatch"] == pytest.approx(sum(mismatches) / 2)


def test_problems_are_split_whole(dialogue: Dialogue) -> None:
    drawn = [
        Sample(trajectories(dialogue(("solver", "a", (7,)), problem=problem, sample=sample), "solver")[0], (1.0,))
        for sample in range(2) for problem in "pqrst"
    ]  # fmt: skip

    def problems(parts: int) -> list[str]:
        return ["".join(s.trajectory.episode.transcript.problem.id for s in part) for part in split(drawn, parts)]

    assert problems(1) == ["pqrstpqrst"]
    assert problems(2) == ["pqrpqr", "stst"]
    assert problems(5) == ["pp", "qq", "rr", "ss", "tt"]
    assert problems(9) == ["pp", "qq", "rr", "ss", "tt"]
    assert sorted(chain(*split(drawn, 3)), key=drawn.index) == drawn
    assert split([], 2) == []


def test_the_gradient_is_clipped_before_the_step_and_told_as_it_was(
    mini_model: MiniModel, samples: list[Sample]
) -> None:
    taught = learner(mini_model(), clip=1e-3, betas=(0.9, 0.99))
    norm = gradient(taught, batch_of(samples)).norm().item()
    taught.model.zero_grad()
    assert taught.update(samples)["gradient_norm"] == pytest.approx(norm)
    moments = [state["exp_avg"].flatten() for state in taught.state()["optimizer"]["state"].values()]  # type: ignore[index]
    assert norm > 1e-2
    assert torch.cat(moments).norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_weights_decay_apart_from_the_gradient(mini_model: MiniModel, samples: list[Sample]) -> None:
    start = weights(mini_model())
    plain, decayed = (learner(mini_model(), learning_rate=0.01, weight_decay=decay) for decay in (0.0, 0.5))
    for taught in (plain, decayed):
        taught.update(samples)
    torch.testing.assert_close(weights(decayed.model) - weights(plain.model), -0.01 * 0.5 * start)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, 1, 0.8535533906, 0.5, 0.1464466094]),
    ],
)
def test_learning_rates_rise_and_fall_over_the_steps_of_all_updates(
    mini_model: MiniModel, samples: list[Sample], schedule: str, rates: list[float]
) -> None:
    settings = LearnerSettings.model_validate(
        {"schedule": schedule, "warmup": 2, "learning_rate": 0.01, "mini_batches": 2}
    )
    taught = Learner(mini_model(), settings, updates=3)
    found = [taught.update(samples)["learning_rate"] for _ in range(3)]
    pairs = [(rates[place] + rates[place + 1]) / 2 for place in (0, 2, 4)]
    assert found == pytest.approx([0.01 * rate for rate in pairs])


def test_learning_makes_what_was_worth_more_likelier(mini_model: MiniModel, samples: list[Sample]) -> None:
    taught = learner(mini_model(), learning_rate=3e-3)
    batch = batch_of(samples)
    before = taught._log_probs(batch)
    for _ in range(5):
        taught.update(samples)
    gained = taught._log_probs(batch) - before
    assert gained[batch.advantages > 0].mean() > 0.1
    assert gained[batch.advantages < 0].mean() < -0.1


def test_dropout_follows_the_seed_alone_and_is_off_between_updates(
    mini_model: MiniModel, samples: list[Sample]
) -> None:
    found = []
    for seed in (5, 5, 6):
        taught = learner(mini_model(dropout=0.5), learning_rate=0.01)
        torch.manual_seed(len(found))
        state = torch.get_rng_state()
        taught.update(samples, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        assert not taught.model.training
        found.append(weights(taught.model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("advantage", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing(
    mini_model: MiniModel, samples: list[Sample], advantage: float
) -> None:
    taught, other = (learner(mini_model(), learning_rate=0.01, schedule="linear") for _ in range(2))
    taught.update(samples)
    other.update(samples)
    start = weights(taught.model)
    wrong = replace(samples[3], advantages=(advantage,) * len(samples[3].advantages))
    with pytest.raises(InputError, match="gradient must be finite; its norm is nan after 1 updates"):
        taught.update([*samples[:3], wrong, *samples[4:]])
    assert torch.equal(weights(taught.model), start)
    assert taught.version == 1
    assert taught.update(samples) == other.update(samples)
    assert torch.equal(weights(taught.model), weights(other.model))


def test_a_state_that_was_saved_goes_on_bit_for_bit(mini_model: MiniModel, samples: list[Sample]) -> None:
    settings = {"learning_rate": 0.01, "schedule": "cosine", "warmup": 2, "mini_batches": 2}
    whole, file = learner(mini_model(), **settings), io.BytesIO()
    for _ in range(3):
        whole.update(samples)
    torch.save(whole.state(), file)
    resumed = learner(mini_model(seed=9), **settings)
    file.seek(0)
    resumed.load(torch.load(file, weights_only=True))
    assert resumed.version == 3
    assert torch.equal(weights(resumed.model), weights(whole.model))
    for _ in range(2):
        assert whole.update(samples) == resumed.update(samples)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert resumed.version == 5


# A reference


def test_a_kl_term_without_a_reference_is_refused(mini_model: MiniModel) -> None:
    with pytest.raises(InputError, match="a KL term needs a reference model"):
        learner(mini_model(), kl_coefficient=0.1)


def test_a_reference_that_no_term_asks_for_costs_nothing(mini_model: MiniModel, samples: list[Sample]) -> None:
    reference = mini_model(seed=1)
    counts = forwards(reference)
    figures = Learner(mini_model(), LearnerSettings(), updates=1, reference=reference).gradient(batch_of(samples))
    assert counts == []
    assert "kl" not in figures


def test_a_reference_draws_the_policy_to_it_and_stays(mini_model: MiniModel, samples: list[Sample]) -> None:
    reference = mini_model(seed=1)
    model, start = copy.deepcopy(reference), weights(reference)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    settings = LearnerSettings(learning_rate=3e-3, loss=LossSettings(kl_coefficient=1.0, kl="k2"))
    taught = Learner(model, settings, updates=30, reference=reference)
    idle = [replace(sample, advantages=(0.0,) * len(sample.advantages)) for sample in samples]
    divergences = [taught.update(idle)["kl"] for _ in range(30)]
    batch = batch_of(samples)
    difference = learner(reference)._log_probs(batch) - learner(mini_model(seed=1))._log_probs(batch)
    assert torch.equal(weights(reference), start)
    assert not difference.any()
    assert 0 < divergences[-1] < 0.2 * divergences[0]


def test_the_divergence_is_told_by_hand(mini_model: MiniModel, samples: list[Sample]) -> None:
    model, reference = mini_model(), mini_model(seed=1)
    settings = LearnerSettings(loss=LossSettings(kl_coefficient=0.1, kl="k1"), micro_batch_size=3)
    batch = batch_of(samples)
    figures = Learner(model, settings, updates=1, reference=reference).gradient(batch)
    difference = learner(model)._log_probs(batch) - learner(reference)._log_probs(batch)
    estimates = (-difference).exp() + difference - 1
    share = token_weights(LossSettings(), batch.episodes, batch.control, batch.advantages)[1]
    assert figures["kl"] == pytest.approx((share * estimates.clamp(max=10)).sum().item())
    assert "kl" not in learner(model).gradient(batch)


# Figures


def test_the_engines_mismatch_is_told(mini_model: MiniModel, samples: list[Sample]) -> None:
    taught, batch = learner(mini_model(), micro_batch_size=3), batch_of(samples)
    exact = replace(batch, engine_log_probs=taught._log_probs(batch))
    figures = taught.gradient(exact)
    assert figures["engine_mismatch"] == pytest.approx(0, abs=1e-12)
    assert figures["clipped"] == 0
    assert figures["trained_tokens"] == len(batch.columns)
    shift = 0.25 * torch.where(torch.arange(len(batch.columns)) % 2 == 0, 1.0, -1.0)
    other = replace(batch, engine_log_probs=exact.engine_log_probs + shift)
    assert taught.gradient(other)["engine_mismatch"] == pytest.approx(0.25)


def test_means_are_over_the_tokens_that_were_not_left_out(mini_model: MiniModel, half_idle: list[Sample]) -> None:
    """Whatever the weights add up to, which is less than 1 with a constant."""
    for aggregation in AGGREGATIONS:
        taught, batch = learner(mini_model(), aggregation=aggregation), batch_of(half_idle)
        shifted = replace(batch, engine_log_probs=taught._log_probs(batch) - 0.25)
        figures = taught.gradient(shifted)
        assert figures["engine_mismatch"] == pytest.approx(0.25)
        trained = sum(s.trajectory.sequence.trained for s in half_idle if any(s.advantages))
        assert figures["trained_tokens"] == trained < len(batch.columns)


@pytest.mark.parametrize(("ratio", "clipped"), [("token", 1.0), ("sequence", 0.4)])
def test_the_share_that_is_out_of_bounds_is_told_by_the_ratio_of_the_loss(
    mini_model: MiniModel, dialogue: Dialogue, ratio: str, clipped: float
) -> None:
    """Two tokens are twice as likely as they were; three others have ratios of 3, 1.5 and 1/4.5, whose mean is 1."""
    first, second = dialogue(("solver", "a", (7, 8, 9))), dialogue(("solver", "a", (7, 8)), sample=1)
    drawn = [Sample(trajectories(episode, "solver")[0], (1.0,)) for episode in (first, second)]
    taught, batch = learner(mini_model(), aggregation="token-mean", ratio=ratio), batch_of(drawn)
    ratios = torch.tensor([2, 2, 3, 1.5, 1 / 4.5], dtype=torch.float64)
    assert batch.sequences.tolist() == [0, 0, 1, 1, 1]
    figures = taught.gradient(batch, taught._log_probs(batch) - ratios.log())
    assert figures["clipped"] == pytest.approx(clipped)


def test_the_importance_weight_corrects_for_the_engine(mini_model: MiniModel, samples: list[Sample]) -> None:
    """Where the trainer finds each token 1.5 times, or 4 times, as likely as the engine did."""
    model = mini_model()
    batch = batch_of(samples)
    plain = gradient(learner(model), batch)
    for times, weight in ((1.5, 1.5), (4.0, 2.0), (0.25, 0.25)):
        shifted = replace(batch, engine_log_probs=learner(model)._log_probs(batch) - log(times))
        assert_same(gradient(learner(model, importance_cap=2.0), shifted), weight * plain)


# The fixture of Thinkless, with two modes: 3, 9, 2 and 6 words behind the control token.
@pytest.fixture
def thinkless(dialogue: Dialogue) -> list[Sample]:
    chosen = (("<short>", 3, True), ("<think>", 9, True), ("<short>", 2, False), ("<think>", 6, False))
    group = [
        dialogue(
            ("solver", "route", (7,), tag), ("solver", tag[1:-1], tuple(range(8, 8 + words))), sample=n, right=right
        )
        for n, (tag, words, right) in enumerate(chosen)
    ]  # fmt: skip
    return list(assign_credit([group], [Thinkless().rewards(group)], ("solver",)).samples)


@pytest.mark.parametrize(
    ("aggregation", "loss", "weights", "strengths", "share"),
    [
        # Each mode's mean of 1/(T + 1): of 1/4 and 1/3, and of 1/10 and 1/7
        ("sample-mean", 0, (0.2916666667, 0.1214285714), (0.1432291667, 0.046875), 0.1901041667 / 0.875),
        ("degrpo", 0, (0.001, 0.001), (5e-4, 3.75e-4), 0.001 / 1.001),
        ("degrpo-token-mean", -0.1, (0.001, 0.001), (5e-4, 3.75e-4), 8.75e-4 / (8.75e-4 + 0.8)),
        ("token-mean", -0.0833333333, (1 / 6, 1 / 6), (2 / 24, 1.5 / 24), 3.5 / 19.5),
    ],
)
def test_the_weight_of_control_tokens_is_told_by_mode(
    mini_model: MiniModel, thinkless: list[Sample], aggregation: Aggregation, loss: float,
    weights: tuple[float, float], strengths: tuple[float, float], share: float,
) -> None:  # fmt: skip
    batch = Batch.of(thinkless, control_states=Thinkless().control_states, dtype=torch.float64)
    figures = learner(mini_model(), aggregation=aggregation).gradient(batch)
    assert figures["loss"] == pytest.approx(loss, abs=1e-10)
    assert (figures["control/weight/<short>"], figures["control/weight/<think>"]) == pytest.approx(weights)
    assert (figures["control/gradient/<short>"], figures["control/gradient/<think>"]) == pytest.approx(strengths)
    assert figures["control/share"] == pytest.approx(share)
    assert figures["alpha"] == (0.001 if aggregation.startswith("degrpo") else 1.0)


@pytest.mark.parametrize("balance", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("aggregation", ["degrpo", "degrpo-token-mean"])
def test_balance_reaches_the_share_that_is_asked_for(
    mini_model: MiniModel, samples: list[Sample], thinkless: list[Sample], aggregation: Aggregation, balance: float
) -> None:
    taught = learner(mini_model(), aggregation=aggregation, balance=balance)
    for some in (samples, thinkless):
        figures = taught.update(some, control_states=CONTROL)
        assert figures["control/share"] == pytest.approx(balance, rel=1e-9)
    # Σ |w A| is 0.875 on control tokens at α = 1, and on words 0.875 or, by the token, 0.8.
    words = 0.875 if aggregation == "degrpo" else 0.8
    assert figures["alpha"] == pytest.approx(balance / (1 - balance) * words / 0.875)


def test_three_modes_chosen_anywhere_and_several_times(dialogue: Dialogue) -> None:
    """Under DeGRPO the tokens of an episode's choices share α: α/2, α/2 and α/3 thrice. Two choices were left open."""
    first = dialogue(
        ("solver", "route", (7,), "<think>"), ("solver", "think", (8, 9)), ("short", "answer", (5, 5)),
        ("solver", "choose", (6,), "<ask>"), ("solver", "think", (4,)),
    )  # fmt: skip
    second = dialogue(
        ("solver", "route", (7, 4)), ("short", "answer", (5,)), ("solver", "choose", (6,), "<short>"), sample=1
    )
    drawn = credited([[first, second]], [[1, 0]])
    batch = batch_of(drawn)
    assert batch.modes == ("other", "other", "<short>", "<think>", "<ask>")
    settings = LossSettings(aggregation="degrpo", alpha=0.06)
    found, _, alpha = token_weights(settings, batch.episodes, batch.control, batch.advantages)
    assert alpha == 0.06
    assert found.tolist() == pytest.approx([0.01, 0.01, 0.01, 0.015, 1 / 6, 1 / 6, 0.015, 1 / 6])
    figures = control_figures(batch, found, alpha)
    expected: Mapping[str, float] = {
        "alpha": 0.06, "control/share": 0.06 / 0.56,
        "control/weight/other": 0.02, "control/weight/<short>": 0.02,
        "control/weight/<think>": 0.03, "control/weight/<ask>": 0.03,
        "control/gradient/other": 0.01, "control/gradient/<short>": 0.005,
        "control/gradient/<think>": 0.0075, "control/gradient/<ask>": 0.0075,
    }  # fmt: skip
    assert figures == pytest.approx(expected)


def test_a_batch_without_control_tokens_has_no_figures_of_them(mini_model: MiniModel, samples: list[Sample]) -> None:
    batch = Batch.of(samples, dtype=torch.float64)
    figures = learner(mini_model(), aggregation="degrpo").gradient(batch)
    assert set(figures) == {"loss", "trained_tokens", "clipped", "engine_mismatch"}


@pytest.mark.parametrize(
    "wrong",
    [{"learning_rate": 0}, {"warmup": -1}, {"clip": 0}, {"mini_batches": 0}, {"schedule": "step"}, {"lr": 1}],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LearnerSettings.model_validate(wrong)
