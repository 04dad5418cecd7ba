"""Supervised fine-tuning: what is trained, and that a stopped run ends as one that never stopped."""

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from turnwise.environments.errors import InputError
from turnwise.rl.sft import SFTSettings, backward, summed_loss, train
from turnwise.rl.trajectory import TokenSequence

SETTINGS = SFTSettings(steps=12, batch_size=4, learning_rate=1e-2, warmup=0.25, save_every=5)


def tiny(seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
            )
        )  # fmt: skip


def stream() -> Iterator[TokenSequence]:
    for number in range(1000):
        length = 4 + number % 7
        ids = tuple((number * 5 + 3 * place) % 24 for place in range(length))
        yield TokenSequence(ids, ((2, length),))


def test_loss_is_summed_over_trained_tokens_and_ignores_padding() -> None:
    model = tiny()
    batch = [
        TokenSequence((1, 2, 3, 4, 5), ((2, 3), (4, 5))),
        TokenSequence((7, 8, 9), ((1, 3),)),
    ]
    expected = []
    with torch.no_grad():
        for sequence in batch:
            log_probabilities = model(input_ids=torch.tensor([sequence.token_ids])).logits[0].log_softmax(-1)
            expected += [
                -log_probabilities[place - 1, token].item()
                for place, (token, trained) in enumerate(zip(sequence.token_ids, sequence.mask, strict=True))
                if trained
            ]
        loss = summed_loss(model, batch).item()
    assert len(expected) == 4
    assert loss == pytest.approx(sum(expected), rel=1e-5)


def test_untrained_tokens_get_no_gradient_as_targets() -> None:
    model = tiny()
    summed_loss(model, [TokenSequence((1, 2, 3), ((1, 2),))]).backward()
    # Only the prediction of token 2 is trained, so the head's gradient comes from the first position alone.
    gradient = model.lm_head.weight.grad
    assert gradient is not None
    assert torch.linalg.matrix_rank(gradient) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_gradient_is_that_of_the_mean_over_all_trained_tokens_for_every_micro_batch_size(size: int) -> None:
    batch = list(islice(stream(), 8))
    whole, split = tiny().double(), tiny().double()
    loss = summed_loss(whole, batch) / sum(sequence.trained for sequence in batch)
    loss.backward()
    assert backward(split, batch, size) == pytest.approx(loss.item(), rel=1e-6)
    for expected, got in zip(whole.parameters(), split.parameters(), strict=True):
        assert expected.grad is not None
        assert got.grad is not None
        # The loss itself is taken in single precision.
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-7)


def test_training_lowers_the_loss_and_leaves_the_model_in_evaluation_mode() -> None:
    model, losses = tiny(), []
    train(model, stream(), SETTINGS.model_copy(update={"steps": 60}), on_step=lambda step, loss: losses.append(loss))
    assert len(losses) == 60
    assert losses[0] == pytest.approx(math.log(24), rel=0.05)
    assert losses[-1] < 0.7 * losses[0]
    assert not model.training


def test_a_stopped_run_goes_on_and_ends_bit_identical(tmp_path: Path) -> None:
    whole = tiny()
    train(whole, stream(), SETTINGS)
    stopped, checkpoint = tiny(), tmp_path / "run" / "sft.pt"

    def stop_at(step: int, loss: float) -> None:
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stopped, stream(), SETTINGS, checkpoint=checkpoint, on_step=stop_at)
    resumed, steps = tiny(seed=99), []
    train(resumed, stream(), SETTINGS, checkpoint=checkpoint, on_step=lambda step, loss: steps.append(step))
    assert steps == [6, 7, 8, 9, 10, 11, 12]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert not checkpoint.with_name(checkpoint.name + ".draft").exists()
    train(resumed, stream(), SETTINGS, checkpoint=checkpoint, on_step=lambda step, loss: steps.append(step))
    assert steps[-1] == 12
    assert len(steps) == 7


def test_sequences_that_run_out_and_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match="ran out after 2 of 12 steps"):
        train(tiny(), iter(islice(stream(), 8)), SETTINGS)
    for wrong in ({"steps": 0}, {"steps": 5, "warmup": 1.0}, {"steps": 5, "learning_rat": 1e-3}):
        with pytest.raises(ValidationError):
            SFTSettings.model_validate(wrong)
