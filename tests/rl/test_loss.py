"""Losses against numbers worked out by hand, and their gradients against finite differences."""

from itertools import accumulate
from math import exp, log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from pydantic import ValidationError

from turnwise.rl.loss import (
    Aggregation,
    Divergence,
    LossSettings,
    balanced_alpha,
    clipped_objective,
    constant_weights,
    degrpo_weights,
    entropy,
    importance_ratio,
    kl_divergence,
    policy_loss,
    sample_mean_weights,
    sequence_ratio,
    token_mean_weights,
    token_weights,
    truncated_importance_weight,
)

AGGREGATIONS: tuple[Aggregation, ...] = ("sample-mean", "token-mean", "constant", "degrpo", "degrpo-token-mean")


def floats(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)


def flags(letters: str) -> torch.Tensor:
    """x for a control token, . for a word."""
    return torch.tensor([letter == "x" for letter in letters], dtype=torch.bool)


# What is averaged over what


# The fixture of Thinkless: a control token and 3, 9, 2 and 6 words, for rewards of 1, 0.5, −1 and −1.
WORDS = (3, 9, 2, 6)
CENTRED = (1.125, 0.625, -0.875, -0.875)
# α Â / G
APART = (2.8125e-4, 1.5625e-4, -2.1875e-4, -2.1875e-4)


@pytest.mark.parametrize(
    ("aggregation", "objective", "on_control", "on_words"),
    [
        # eq. 1, where a control token weighs what any token does
        ("sample-mean", 0, (0.0703125, 0.015625, -0.07291666667, -0.03125), ()),
        # eq. 4
        ("degrpo", 0, APART, (0.09375, 0.01736111111, -0.109375, -0.03645833333)),
        # What the authors' code computes
        ("degrpo-token-mean", 0.1, APART, (0.05625, 0.03125, -0.04375, -0.04375)),
        # What it calls vanilla
        ("token-mean", 0.0833333333, (0.046875, 0.02604166667, -0.03645833333, -0.03645833333), ()),
        # Dr. GRPO, of at most 10 tokens
        ("constant", 0.05, (0.028125, 0.015625, -0.021875, -0.021875), ()),
    ],
)
def test_objective_and_gradient_of_the_papers_fixture(
    aggregation: Aggregation, objective: float, on_control: tuple[float, ...], on_words: tuple[float, ...]
) -> None:
    episodes = numbers(*(episode for episode, words in enumerate(WORDS) for _ in range(words + 1)))
    control = flags("".join("x" + "." * words for words in WORDS))
    advantages = floats(*CENTRED)[episodes]
    settings = LossSettings(aggregation=aggregation, alpha=1e-3, longest=10)
    weights, plain, _ = token_weights(settings, episodes, control, advantages)
    log_probs = torch.linspace(-2, -1, len(episodes), dtype=torch.float64, requires_grad=True)
    old = log_probs.detach()
    loss = policy_loss(settings, log_probs, old, old, advantages, episodes, weights, plain)
    loss.backward()
    assert -loss.item() == pytest.approx(objective, abs=1e-10)
    assert log_probs.grad is not None
    first = [0, *accumulate(words + 1 for words in WORDS)]
    gradient = [-part for part in log_probs.grad.tolist()]
    assert [gradient[start] for start in first[:-1]] == pytest.approx(on_control, rel=1e-9)
    for start, words, expected in zip(first, WORDS, on_words or on_control, strict=False):
        assert gradient[start + 1 : start + 1 + words] == pytest.approx([expected] * words, rel=1e-8)


def test_sample_mean_weighs_each_episode_alike_and_numbers_without_tokens_not_at_all() -> None:
    assert sample_mean_weights(numbers(0, 2, 0, 0)).tolist() == pytest.approx([1 / 6, 1 / 2, 1 / 6, 1 / 6])


def test_token_mean_weighs_each_token_alike() -> None:
    assert token_mean_weights(numbers(0, 2, 0, 0)).tolist() == [0.25] * 4
    assert token_mean_weights(numbers()).tolist() == []


def test_constant_divides_by_the_longest_and_the_number_of_episodes() -> None:
    assert constant_weights(numbers(0, 2, 0), 5).tolist() == [0.1] * 3


@pytest.mark.parametrize(
    ("episodes", "control", "decisions", "words", "words_by_token"),
    [
        # Three control tokens, of which one stands in the middle of its episode. All are in twelfths.
        ((0, 0, 0, 0, 1, 1), "x..xx.", (3, 0, 0, 3, 6, 0), (0, 3, 3, 0, 0, 6), (0, 4, 4, 0, 0, 4)),
        # An episode that decided nothing, and one that said nothing else; both count among the episodes.
        ((0, 0, 1), "..x", (0, 0, 6), (3, 3, 0), (6, 6, 0)),
        ((0, 1), "xx", (6, 6), (0, 0), (0, 0)),
        ((0, 0), "..", (0, 0), (6, 6), (6, 6)),
    ],
)
def test_degrpo_takes_the_control_tokens_out_of_the_mean(
    episodes: tuple[int, ...],
    control: str,
    decisions: tuple[int, ...],
    words: tuple[int, ...],
    words_by_token: tuple[int, ...],
) -> None:
    chosen, said = degrpo_weights(numbers(*episodes), flags(control))
    assert (chosen * 12).tolist() == pytest.approx(decisions)
    assert (said * 12).tolist() == pytest.approx(words)
    chosen, said = degrpo_weights(numbers(*episodes), flags(control), token_mean=True)
    assert (chosen * 12).tolist() == pytest.approx(decisions)
    assert (said * 12).tolist() == pytest.approx(words_by_token)


@pytest.mark.parametrize(("share", "alpha"), [(0.2, 1.0), (0.5, 4.0), (0.75, 12.0)])
def test_alpha_that_balances_by_hand(share: float, alpha: float) -> None:
    """Σ |w A| is 0.75 on control tokens and 3 on words, whatever the signs."""
    decisions, words = floats(0.5, 0, 0, 0.5, 0), floats(0, 0.25, 0.25, 0, 0.5)
    assert balanced_alpha(decisions, words, floats(1, 4, -2, -0.5, -3), share) == pytest.approx(alpha)


@pytest.mark.parametrize("advantages", [(0.0, 3.0), (3.0, 0.0), (0.0, 0.0)])
def test_where_one_side_has_no_weight_there_is_no_balance(advantages: tuple[float, float]) -> None:
    assert balanced_alpha(floats(1, 0), floats(0, 1), floats(*advantages), 0.25) == 1.0


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.booleans(), st.floats(0.01, 5) | st.floats(-5, -0.01)), min_size=2, max_size=20
    ),
    st.floats(0.01, 0.99),
    st.sampled_from(["degrpo", "degrpo-token-mean"]),
)
def test_balance_gives_control_tokens_exactly_their_share(
    drawn: list[tuple[int, bool, float]], share: float, aggregation: Aggregation
) -> None:
    drawn = [(0, True, 1.0), (0, False, 1.0), *drawn]
    episodes, control, advantages = (
        torch.tensor([token[0] for token in drawn]), torch.tensor([token[1] for token in drawn]),
        floats(*(token[2] for token in drawn)),
    )  # fmt: skip
    settings = LossSettings(aggregation=aggregation, alpha=123.0, balance=share)
    weights, _, alpha = token_weights(settings, episodes, control, advantages)
    gradient = (weights * advantages).abs()
    assert gradient[control].sum().item() == pytest.approx(share * gradient.sum().item(), rel=1e-9)
    assert alpha != 123.0


def test_kl_and_entropy_do_not_set_control_tokens_apart() -> None:
    episodes, control, advantages = numbers(0, 0, 1, 1, 1, 1), flags("x.x..."), floats(1, 1, -1, -1, -1, -1)
    for aggregation, expected in (("degrpo", [1 / 4] * 2 + [1 / 8] * 4), ("degrpo-token-mean", [1 / 6] * 6)):
        settings = LossSettings(aggregation=aggregation)
        weights, plain, alpha = token_weights(settings, episodes, control, advantages)
        assert plain.tolist() == pytest.approx(expected)
        assert weights[control].tolist() == pytest.approx([0.0005, 0.0005])
        assert alpha == 0.001
    weights, plain, alpha = token_weights(LossSettings(), episodes, control, advantages)
    assert weights.tolist() == plain.tolist() == pytest.approx([1 / 4] * 2 + [1 / 8] * 4)
    assert alpha == 1.0


# Ratios and bounds


def test_importance_ratio() -> None:
    assert importance_ratio(floats(-1, -2, log(0.3)), floats(-1, -1, log(0.2))).tolist() == pytest.approx(
        [1, exp(-1), 1.5]
    )


def test_sequence_ratio_is_the_geometric_mean_of_the_sequence() -> None:
    # 2 and 8 make 4; the number 1 has no tokens here, as in a micro-batch of the others.
    log_probs = floats(log(2), log(0.25), log(8)) - 3
    ratio = sequence_ratio(log_probs, floats(-3, -3, -3), numbers(0, 2, 0))
    assert ratio.tolist() == pytest.approx([4, 0.25, 4])


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.25, 2.0, 2.5, 2.0),  # below 1 + 0.28
        (1.5, 2.0, 2.56, 0.0),
        (0.5, 2.0, 1.0, 2.0),  # for a good token the lower bound does not hold
        (1.0, -2.0, -2.0, -2.0),
        (0.9, -2.0, -1.8, -2.0),
        (0.5, -2.0, -1.6, 0.0),
        (1.5, -2.0, -3.0, -2.0),  # for a bad token the upper one does not
        (9.0, -2.0, -18.0, -2.0),
        (9.0, 0.0, 0.0, 0.0),
    ],
)
def test_clipped_objective(ratio: float, advantage: float, objective: float, slope: float) -> None:
    ratios = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    found = clipped_objective(ratios, floats(advantage), clip_low=0.2, clip_high=0.28)
    found.sum().backward()
    assert found.item() == pytest.approx(objective)
    assert ratios.grad is not None
    assert ratios.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        (2.5, -2.0, -5.0, -2.0),
        (9.0, -2.0, -6.0, 0.0),  # 3 A at least
        (0.5, -2.0, -1.6, 0.0),
        (9.0, 2.0, 2.4, 0.0),  # a good token knows no such bound
        (0.5, 2.0, 1.0, 2.0),
    ],
)
def test_dual_clip(ratio: float, advantage: float, objective: float, slope: float) -> None:
    ratios = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    found = clipped_objective(ratios, floats(advantage), clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    found.sum().backward()
    assert found.item() == pytest.approx(objective)
    assert ratios.grad is not None
    assert ratios.grad.item() == pytest.approx(slope)


def test_truncated_importance_weight() -> None:
    old = floats(log(0.3), log(0.3), log(0.3)).requires_grad_()
    weight = truncated_importance_weight(old, floats(log(0.1), log(0.2), log(0.6)), 2.0)
    assert weight.tolist() == pytest.approx([2.0, 1.5, 0.5])
    assert not weight.requires_grad


# Divergence and entropy


@pytest.mark.parametrize(
    ("kind", "difference", "estimate", "slope"),
    [
        ("k1", 0.5, 0.5, 1.0),
        ("k1", -0.5, -0.5, 1.0),
        ("k2", 0.5, 0.125, 0.5),
        ("k2", -0.5, 0.125, -0.5),
        ("k3", 0.5, 0.1065306597, 0.3934693403),
        ("k3", -0.5, 0.1487212707, -0.6487212707),
        ("k3", 0.0, 0.0, 0.0),
        # Clamped
        ("k1", -12.0, -10.0, 0.0),
        ("k1", 12.0, 10.0, 0.0),
        ("k2", 5.0, 10.0, 0.0),
        ("k3", -3.0, 10.0, 0.0),
        ("k3", 5.0, 4.0067379470, 0.9932620530),
        ("k3", -1000.0, 10.0, 0.0),  # where exp(−d) overflows, the gradient is still a number
    ],
)
def test_kl_divergence(kind: Divergence, difference: float, estimate: float, slope: float) -> None:
    log_probs = torch.tensor([difference - 2], dtype=torch.float64, requires_grad=True)
    found = kl_divergence(log_probs, floats(-2), kind)
    found.sum().backward()
    assert found.item() == pytest.approx(estimate, rel=1e-9)
    assert log_probs.grad is not None
    assert log_probs.grad.item() == pytest.approx(slope, rel=1e-9)


LOGITS = floats(0.3, -1.2, 0.8, 0.1)
REFERENCE = floats(-0.4, 0.2, 0.5, -0.3).log_softmax(-1)


def expected(kind: Divergence) -> tuple[float, torch.Tensor]:
    """Over all tokens of a vocabulary, the expected estimate, and its expected gradient as a loss."""
    logits = LOGITS.clone().requires_grad_()
    log_probs = logits.log_softmax(-1)
    estimates = kl_divergence(log_probs, REFERENCE, kind)
    probs = log_probs.detach().exp()
    (gradient,) = torch.autograd.grad((probs * estimates).sum(), logits)
    return (probs * estimates).sum().item(), gradient


def test_what_the_estimators_estimate() -> None:
    logits = LOGITS.clone().requires_grad_()
    log_probs = logits.log_softmax(-1)
    true = (log_probs.exp() * (log_probs - REFERENCE)).sum()
    (true_gradient,) = torch.autograd.grad(true, logits)
    (k1, k1_gradient), (k2, k2_gradient), (k3, _) = (expected(kind) for kind in ("k1", "k2", "k3"))
    assert k1 == pytest.approx(true.item())
    assert k3 == pytest.approx(true.item())
    assert k2 != pytest.approx(true.item(), rel=1e-3)
    assert k1_gradient.tolist() == pytest.approx([0] * 4, abs=1e-12)
    assert k2_gradient.tolist() == pytest.approx(true_gradient.tolist())


def test_entropy() -> None:
    found = entropy(torch.tensor([[7.0, 7.0, 7.0, 7.0], [0.0, log(3), -1e9, -1e9], [0.0, -1e9, -1e9, -1e9]]))
    assert found.tolist() == pytest.approx([1.3862943611, 0.5623351446, 0.0], abs=1e-6)


# The loss


def test_policy_loss_by_hand() -> None:
    settings = LossSettings(importance_cap=1.5, kl_coefficient=0.1, kl="k1", entropy_coefficient=0.01)
    log_probs = floats(-1, -2)
    loss = policy_loss(
        settings,
        log_probs,
        old_log_probs=log_probs - floats(log(1.1), log(0.5)),
        engine_log_probs=log_probs - floats(log(1.1), log(0.5)) - floats(log(2), log(0.5)),
        advantages=floats(1, -1),
        sequences=numbers(0, 1),
        weights=floats(0.5, 0.5),
        plain_weights=floats(0.25, 0.75),
        reference_log_probs=log_probs - floats(0.2, -0.4),
        entropies=floats(1, 2),
    )
    objective = 0.5 * 1.5 * 1.1 + 0.5 * 0.5 * -0.8
    divergence, surprise = 0.25 * 0.2 - 0.75 * 0.4, 0.25 * 1 + 0.75 * 2
    assert loss.item() == pytest.approx(-objective + 0.1 * divergence - 0.01 * surprise)
    assert loss.item() == pytest.approx(-0.6675)


# Nine tokens of four sequences in three episodes. No ratio is near a bound, neither a token's nor a sequence's.
SEQUENCES = numbers(0, 0, 1, 1, 1, 2, 2, 3, 3)
EPISODES = numbers(0, 0, 0, 0, 0, 1, 1, 2, 2)
CONTROL = flags("x.x..x.x.")
ADVANTAGES = floats(1.5, 1.5, -0.5, -0.5, -0.5, 0.7, 0.7, -2.0, -2.0)
RATIOS = floats(1.35, 1.4, 1.3, 5.0, 0.6, 0.7, 1.05, 0.6, 0.7)
SAID = numbers(0, 1, 2, 3, 4, 0, 1, 2, 3)
GENERATOR = torch.Generator().manual_seed(3)
ALL_LOGITS = torch.randn(9, 5, dtype=torch.float64, generator=GENERATOR)
LOG_PROBS = ALL_LOGITS.log_softmax(-1).gather(-1, SAID[:, None])[:, 0]
OLD = LOG_PROBS - RATIOS.log()
ENGINE = OLD + floats(0.1, -0.2, 0.3, -0.9, 0.2, 0.0, -0.1, 0.4, -0.3)
REFERENCES = LOG_PROBS - floats(0.3, -0.2, 0.5, 1.0, -0.7, 0.1, 0.4, -0.4, 0.2)


def loss_of(settings: LossSettings, logits: torch.Tensor, chosen: torch.Tensor | None = None) -> torch.Tensor:
    """The loss of some of the tokens above (all of them), with the weights of the whole step."""
    weights, plain, _ = token_weights(settings, EPISODES, CONTROL, ADVANTAGES)
    mine = slice(None) if chosen is None else chosen
    log_probs = logits.log_softmax(-1).gather(-1, SAID[mine, None])[:, 0]
    return policy_loss(
        settings, log_probs, OLD[mine], ENGINE[mine], ADVANTAGES[mine], SEQUENCES[mine], weights[mine], plain[mine],
        reference_log_probs=REFERENCES[mine] if settings.kl_coefficient else None,
        entropies=entropy(logits) if settings.entropy_coefficient else None,
    )  # fmt: skip


CHECKED = [
    *({"aggregation": aggregation, "longest": 7, "alpha": 0.3} for aggregation in AGGREGATIONS),
    {"aggregation": "degrpo", "balance": 0.4},
    *({"aggregation": aggregation, "longest": 7, "ratio": "sequence"} for aggregation in AGGREGATIONS[:3]),
    {"ratio": "sequence", "clip_high": 0.6},
    {"clip_low": 0.35, "clip_high": 0.45},
    {"dual_clip": 3.0},
    {"importance_cap": 1.2},
    *({"kl_coefficient": 0.5, "kl": kind} for kind in ("k1", "k2", "k3")),
    {"entropy_coefficient": 0.5},
    {"aggregation": "degrpo", "alpha": 0.3, "dual_clip": 3.0, "importance_cap": 1.2, "kl_coefficient": 0.5,
     "entropy_coefficient": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("chosen", CHECKED, ids=lambda chosen: " ".join(map(str, chosen.values())))
def test_gradient_is_that_of_finite_differences(chosen: dict[str, object]) -> None:
    settings = LossSettings.model_validate(chosen)
    logits = ALL_LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: loss_of(settings, logits), logits, atol=1e-8, rtol=1e-6)
    (gradient,) = torch.autograd.grad(loss_of(settings, logits), logits)
    assert gradient.abs().sum() > 0.01


def test_every_bound_is_met_by_the_tokens_of_the_check() -> None:
    """Or finite differences would prove little."""
    clipped = ((RATIOS > 1.2) & (ADVANTAGES > 0)) | ((RATIOS < 0.8) & (ADVANTAGES < 0))
    assert clipped.tolist() == [True, True, False, False, True, False, False, True, True]
    assert ((RATIOS > 3) & (ADVANTAGES < 0)).sum() == 1
    assert ((OLD - ENGINE).exp() > 1.2).sum() == 3


@pytest.mark.parametrize("chosen", CHECKED, ids=lambda chosen: " ".join(map(str, chosen.values())))
def test_the_losses_of_micro_batches_add_up(chosen: dict[str, object]) -> None:
    settings = LossSettings.model_validate(chosen)
    parts = [torch.isin(SEQUENCES, numbers(*some)).nonzero().flatten() for some in ((0, 3), (1,), (2,))]
    whole = loss_of(settings, ALL_LOGITS)
    assert sum(loss_of(settings, ALL_LOGITS[part], part) for part in parts).item() == pytest.approx(whole.item())


def test_gradient_of_the_sequence_ratio_is_gspos() -> None:
    """1/N Σ_i A_i ∇s_i, where s_i = exp(1/T_i Σ_t log ρ_t); three episodes of one sequence each, none clipped."""
    sequences, advantages = numbers(0, 0, 1, 1, 1, 2), floats(1.5, 1.5, -0.5, -0.5, -0.5, 2.0)
    old = floats(-1, -2, -3, -1, -2, -1)
    log_probs = (old + floats(0.3, -0.1, 0.5, -0.6, 0.2, 0.1)).requires_grad_()
    settings = LossSettings(ratio="sequence")
    weights, plain, _ = token_weights(settings, sequences, flags("......"), advantages)
    loss = policy_loss(settings, log_probs, old, old, advantages, sequences, weights, plain)
    (found,) = torch.autograd.grad(loss, log_probs)
    ratios = torch.stack([(log_probs - old)[sequences == number].mean().exp() for number in range(3)])
    objective = (ratios * floats(1.5, -0.5, 2.0)).mean()
    (gradient,) = torch.autograd.grad(-objective, log_probs)
    assert loss.item() == pytest.approx(-objective.item())
    assert found.tolist() == pytest.approx(gradient.tolist())
    # exp(0.1), exp(1/30) and exp(0.1), by hand
    assert -loss.item() == pytest.approx((1.5 * 1.1051709181 - 0.5 * 1.0338951358 + 2 * 1.1051709181) / 3)


def test_a_sequence_is_clipped_as_a_whole() -> None:
    """Its tokens' ratios are 3 and 0.75, and so its own is 1.5."""
    log_probs = floats(log(3), log(0.75)).requires_grad_()
    settings = LossSettings(ratio="sequence", clip_high=0.4)
    loss = policy_loss(
        settings, log_probs, floats(0, 0), floats(0, 0), floats(1, 1), numbers(0, 0), floats(0.5, 0.5), floats(0.5, 0.5)
    )
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert loss.item() == pytest.approx(-1.4)
    assert gradient.tolist() == [0, 0]


def test_dr_grpo_pays_a_token_alike_in_episodes_of_any_length() -> None:
    """Where the sample mean pays it less in a longer one."""
    episodes, advantages = numbers(0, 0, 0, 1), floats(1, 1, 1, 1)
    for aggregation, expected in (("constant", [0.05] * 4), ("sample-mean", [1 / 6] * 3 + [1 / 2])):
        settings = LossSettings(aggregation=aggregation, longest=10)
        weights, plain, _ = token_weights(settings, episodes, flags("...."), advantages)
        log_probs = floats(-1, -1, -1, -1).requires_grad_()
        loss = policy_loss(
            settings, log_probs, log_probs.detach(), log_probs.detach(), advantages, episodes, weights, plain
        )
        (gradient,) = torch.autograd.grad(loss, log_probs)
        assert (-gradient).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": 0}, {"balance": 0}, {"balance": 1}, {"longest": 0}, {"clip_low": 0}, {"clip_low": 1.1},
        {"clip_high": 0}, {"dual_clip": 1}, {"importance_cap": 0}, {"kl_coefficient": -0.1},
        {"entropy_coefficient": -0.1}, {"kl": "k4"}, {"aggregation": "mean"}, {"ratio": "episode"}, {"beta": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LossSettings.model_validate(wrong)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(TypeCheckError, match="old_log_probs"):
        importance_ratio(floats(1, 2, 3), floats(1, 2))
    with pytest.raises(TypeCheckError, match="logits"):
        entropy(floats(1, 2, 3))
    with pytest.raises(TypeCheckError, match="episodes"):
        sample_mean_weights(floats(0, 0, 1))
