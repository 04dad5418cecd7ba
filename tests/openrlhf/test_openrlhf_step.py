"""What the ranks are given: each trained token once, at its place, with all that belongs to it."""

import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

pytest.importorskip("deepspeed", reason="needs OpenRLHF: make openrlhf")

from turnwise.rl.advantage import Sample
from turnwise.rl.batch import Batch
from turnwise.rl.learner import LearnerSettings
from turnwise.rl.loss import LossSettings, policy_loss, token_weights
from turnwise.rl.openrlhf.actors import Strategy
from turnwise.rl.openrlhf.arguments import openrlhf_arguments
from turnwise.rl.openrlhf.settings import OpenRLHFSettings
from turnwise.rl.openrlhf.step import Step, StepLoss

DEGRPO = LossSettings(aggregation="degrpo", alpha=0.5, kl_coefficient=0.1)


def step(samples: list[Sample], settings: LossSettings = DEGRPO, *, ranks: int = 1, size: int = 3) -> Step:
    return Step.of(samples, settings, control_states=("route",), ranks=ranks, micro_batch_size=size)


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_all_ranks_get_as_much_and_each_token_is_trained_once(turns: list[Sample], ranks: int, size: int) -> None:
    experience = step(turns, ranks=ranks, size=size).experience
    assert len(experience) % ranks == 0
    assert len(experience) < -(-len(turns) // size) + ranks
    found, expected = Counter[tuple[object, ...]](), Counter[tuple[object, ...]]()
    for micro in experience:
        for row, place in micro.action_mask.nonzero().tolist():
            before = tuple(micro.sequences[row, : place + 2].tolist())
            carried = (micro.advantages, micro.rollout_log_probs, micro.values, micro.returns)
            found[before, *(round(float(field[row, place]), 6) for field in carried)] += 1
    batch = Batch.of(turns, control_states=("route",))
    weights, plain, _ = token_weights(DEGRPO, batch.episodes, batch.control, batch.advantages)
    fields = (batch.advantages, batch.engine_log_probs, weights, plain)
    for token, (number, column) in enumerate(zip(batch.sequences.tolist(), batch.columns.tolist(), strict=True)):
        before = batch.token_ids[number][: column + 1]
        expected[before, *(round(float(field[token]), 6) for field in fields)] += 1
    assert found == expected


def test_without_an_advantage_there_is_nothing_to_learn_but_from_a_reference(turns: list[Sample]) -> None:
    nothing = [replace(sample, advantages=(0.0,) * len(sample.advantages)) for sample in turns]
    assert step(nothing, LossSettings(), ranks=2).experience == []
    assert len(step(nothing, DEGRPO, ranks=2).experience) == 6
    assert len(step([*nothing[:3], *turns[3:]], LossSettings(), size=1).experience) == len(turns) - 3


def test_logits_do_not_outlast_the_loss_that_they_were_kept_for(turns: list[Sample]) -> None:
    settings = LossSettings(entropy_coefficient=0.01)
    micro = step(turns, settings).experience[0]
    loss, found = StepLoss(settings), torch.zeros_like(micro.rollout_log_probs)
    loss.experience, loss.logits = micro, torch.zeros(*micro.sequences.shape, 3)
    value, *_ = loss(
        found, None, micro.advantages, action_mask=micro.action_mask, rollout_log_probs=micro.rollout_log_probs
    )
    assert value.isfinite()
    assert not loss.logits.numel()


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_losses_of_all_micro_batches_are_that_of_the_step(turns: list[Sample], ranks: int) -> None:
    """Gradients in the log-probabilities, too. DeepSpeed divides by the number of ranks."""
    batch = Batch.of(turns)
    weights, plain, _ = token_weights(DEGRPO, batch.episodes, batch.control, batch.advantages)

    def said(tokens: torch.Tensor, kind: float) -> torch.Tensor:
        return -(tokens.double() * kind).sin().abs()

    log_probs = said(batch.columns, 1).requires_grad_()
    expected = policy_loss(
        DEGRPO, log_probs, said(batch.columns, 2), batch.engine_log_probs, batch.advantages, batch.sequences, weights,
        plain, reference_log_probs=said(batch.columns, 3),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(expected, log_probs)

    loss, total, strength = StepLoss(DEGRPO), 0.0, 0.0
    for micro in step(turns, ranks=ranks).experience:
        columns = torch.arange(1, micro.sequences.shape[1]).expand_as(micro.action_mask)
        micro.base_action_log_probs = said(columns, 3)
        found = said(columns, 1).requires_grad_()
        loss.experience = micro
        value, *_ = loss(
            found, said(columns, 2), micro.advantages, action_mask=micro.action_mask,
            rollout_log_probs=micro.rollout_log_probs, dp_size=ranks,
        )  # fmt: skip
        (part,) = torch.autograd.grad(value, found)
        assert not part[micro.action_mask == 0].any()
        total, strength = total + value.item() / ranks, strength + float(part.square().sum()) / ranks**2
    assert total == pytest.approx(expected.item(), rel=1e-6)
    assert strength == pytest.approx(float(gradient.square().sum()), rel=1e-6)
    assert loss.sums["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert loss.sums["trained_tokens"] == len(batch.columns)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """This process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in rank.items():
            patch.setenv(name, value)
        yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:`torch.distributed.* is deprecated:FutureWarning")
@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_of_micro_batches_are_added_up_in_single_precision(one_rank: None, stage: int) -> None:
    """In half precision 256 + 0.5 is 256."""
    settings, learner = OpenRLHFSettings(gpus_per_rank=0, zero_stage=stage), LearnerSettings()
    arguments = openrlhf_arguments(settings, learner, steps=1, temperature=1.0)
    arguments.local_rank = -1
    strategy = Strategy(arguments, learner.loss)
    strategy.setup_distributed()
    adam = {"lr": 1.0, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    optimiser = {"optim": "adam", "adam": adam, "lr_scheduler": "constant", "scheduler_steps": 1}
    engine, _, _ = strategy.prepare((torch.nn.Linear(1, 1, bias=False).bfloat16(), optimiser))
    gradients = [256.0] + [0.5] * 100
    for number, gradient in enumerate(gradients):
        engine.set_gradient_accumulation_boundary(number == 100)
        engine.backward(engine(torch.full((1, 1), gradient, dtype=torch.bfloat16)).sum())
    engine.step()
    assert float(engine.get_global_grad_norm()) == 306
