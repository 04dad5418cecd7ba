"""Supervised fine-tuning: cross-entropy on what a policy should have said, and on nothing else."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from turnwise.environments.errors import InputError
from turnwise.rl.run_folder import write_whole
from turnwise.rl.trajectory import TokenSequence

UNTRAINED = -100


class SFTSettings(BaseModel):
    """How to train. The learning rate rises over the first `warmup` of the steps and falls to a tenth by cosine.

    A step's batch is split by length into micro-batches, which bounds its memory, spares padding, and changes nothing
    else.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: PositiveInt
    batch_size: PositiveInt = 64
    micro_batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 1e-5
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: PositiveFloat = 1.0
    save_every: PositiveInt = 50


def train(
    model: PreTrainedModel,
    sequences: Iterator[TokenSequence],
    settings: SFTSettings,
    *,
    checkpoint: Path | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Trains `model` in place by AdamW, one loss denominator a step: the mean over all trained tokens of the batch.

    So a token weighs the same whether its sequence is long or short. (Batches of like length would not do: their means
    give the tokens of short answers, and the choice to answer shortly, many times the weight.)

    `sequences` must be the same stream each time: with a `checkpoint` file, a run that was killed goes on from the
    last one saved and skips what it had already seen, so that it ends as if it had never stopped. `on_step(step, loss)`
    is called after each step. Raises InputError where the sequences run out before the steps do.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    done = 0
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        done = saved["step"]
    model.train()
    batches = iter(lambda: list(islice(sequences, settings.batch_size)), [])
    for step, batch in enumerate(islice(batches, done, settings.steps), start=done + 1):
        loss = backward(model, batch, settings.micro_batch_size)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        done = step
        on_step(step, loss)
        if checkpoint is not None and (step % settings.save_every == 0 or step == settings.steps):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            state |= {"scheduler": scheduler.state_dict()}
            write_whole(checkpoint, partial(torch.save, state))
    model.train(False)
    if done < settings.steps:
        raise InputError(f"the sequences ran out after {done} of {settings.steps} steps; give more, or ask for fewer")


def backward(model: PreTrainedModel, batch: Sequence[TokenSequence], micro_batch_size: int) -> float:
    """Adds the gradient of a batch's loss to the parameters; returns the loss (nats a trained token).

    The same for every `micro_batch_size`, but for rounding.
    """
    by_length = sorted(batch, key=lambda sequence: len(sequence.token_ids))
    trained, total = sum(sequence.trained for sequence in batch), 0.0
    for start in range(0, len(by_length), micro_batch_size):
        loss = summed_loss(model, by_length[start : start + micro_batch_size]) / trained
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def summed_loss(model: PreTrainedModel, batch: Sequence[TokenSequence]) -> torch.Tensor:
    """Cross-entropy (nats), summed over the trained tokens of a batch of sequences."""
    token_ids = [torch.tensor(sequence.token_ids) for sequence in batch]
    labels = [
        ids.masked_fill(~torch.tensor(sequence.mask), UNTRAINED) for ids, sequence in zip(token_ids, batch, strict=True)
    ]
    inputs = pad_sequence(token_ids, batch_first=True).to(model.device)
    targets = pad_sequence(labels, batch_first=True, padding_value=UNTRAINED).to(model.device)
    # Padding stands on the right, where causal attention never lets a trained token see it.
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=UNTRAINED, reduction="sum")


def _rate(step: int, settings: SFTSettings) -> float:
    rising = settings.warmup * settings.steps
    if step < rising:
        return (step + 1) / rising
    falling = (step - rising) / max(1.0, settings.steps - rising)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * min(1.0, falling))) / 2
