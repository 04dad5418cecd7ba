"""Supervised fine-tuning: cross-entropy on what a policy should have said, and on nothing else."""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from turnwise.environments.errors import InputError
from turnwise.rl.trajectory import TokenSequence

UNTRAINED = -100


class SFTSettings(BaseModel):
    """How to train. The learning rate rises over the first `warmup` of the steps and falls to a tenth by cosine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: PositiveInt
    batch_size: PositiveInt = 64
    learning_rate: PositiveFloat = 1e-5
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: PositiveFloat = 1.0
    save_every: PositiveInt = 200


def train(
    model: PreTrainedModel,
    sequences: Iterator[TokenSequence],
    settings: SFTSettings,
    *,
    checkpoint: Path | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Trains `model` in place by AdamW, one loss denominator a step: the mean over all trained tokens of the batch.

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
    for step, batch in enumerate(
        islice(_batches(sequences, settings.batch_size), done, settings.steps), start=done + 1
    ):
        loss = sft_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        done = step
        on_step(step, loss.item())
        if checkpoint is not None and (step % settings.save_every == 0 or step == settings.steps):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            _save(state | {"scheduler": scheduler.state_dict()}, checkpoint)
    model.train(False)
    if done < settings.steps:
        raise InputError(f"the sequences ran out after {done} of {settings.steps} steps; give more, or ask for fewer")


def sft_loss(model: PreTrainedModel, batch: list[TokenSequence]) -> torch.Tensor:
    """Mean cross-entropy (nats) over the trained tokens of a batch of sequences."""
    token_ids = [torch.tensor(sequence.token_ids) for sequence in batch]
    labels = [
        ids.masked_fill(~torch.tensor(sequence.mask), UNTRAINED) for ids, sequence in zip(token_ids, batch, strict=True)
    ]
    inputs = pad_sequence(token_ids, batch_first=True).to(model.device)
    targets = pad_sequence(labels, batch_first=True, padding_value=UNTRAINED).to(model.device)
    # Padding stands on the right, where causal attention never lets a trained token see it.
    logits = model(input_ids=inputs, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten(), ignore_index=UNTRAINED)


def _batches(sequences: Iterator[TokenSequence], size: int, window: int = 8) -> Iterator[list[TokenSequence]]:
    """Batches of like length: sorted within a window of several batches, which then come in a fixed scattered order."""
    while drawn := sorted(islice(sequences, size * window), key=lambda sequence: len(sequence.token_ids)):
        starts = list(range(0, len(drawn), size))
        for start in sorted(starts, key=lambda start: (start // size * 5) % window):
            yield drawn[start : start + size]


def _rate(step: int, settings: SFTSettings) -> float:
    rising = settings.warmup * settings.steps
    if step < rising:
        return (step + 1) / rising
    falling = (step - rising) / max(1.0, settings.steps - rising)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * min(1.0, falling))) / 2


def _save(state: dict[str, object], path: Path) -> None:
    """Never leaves a half-written checkpoint in place of a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    torch.save(state, draft)
    draft.replace(path)
