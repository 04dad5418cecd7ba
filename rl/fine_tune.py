"""Fine-tunes a model on a set, in a folder of its own."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from turnwise.agents.transformers_engine import TransformersEngine
from turnwise.rl.run_folder import Run, claim, write_whole
from turnwise.rl.sft import SFTSettings, train
from turnwise.rl.sft_sets import read_set, shuffled


def fine_tune(
    model: str | Path,
    data: Path,
    settings: SFTSettings,
    folder: Path,
    *,
    seed: int = 0,
    together: int = 1,
    longest: int | None = None,
    device: str = "cpu",
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Path:
    """Trains `model` on a set of `turnwise.rl.sft_sets`, in single precision; returns the folder of the result.

    The set is read over and over in an order of `seed`, in which `together` neighbouring rows stay neighbours; rows are
    clipped to `longest` tokens, by default the model's context. Killed, it goes on by the same call, from the last
    checkpoint; done, it is not done again. Raises InputError where `folder` is of another training.
    """
    claim_fine_tuning(model, data, settings, folder, seed=seed, together=together, longest=longest)
    trained, checkpoint = folder / "model", folder / "checkpoint.pt"
    if not trained.exists():
        # Updates by a small learning rate would be lost in the rounding of half precision.
        engine = TransformersEngine.load(model, device=device, dtype=torch.float32)
        sequences = read_set(data, engine.template, longest=min(longest or engine.context, engine.context))
        stream = shuffled(sequences, seed=seed, together=together)
        train(engine.model, stream, settings, checkpoint=checkpoint, on_step=on_step)

        def save(path: Path) -> None:
            engine.model.save_pretrained(path)
            engine.tokenizer.save_pretrained(path)

        write_whole(trained, save)
    checkpoint.unlink(missing_ok=True)
    return trained


def claim_fine_tuning(
    model: str | Path,
    data: Path,
    settings: SFTSettings,
    folder: Path,
    *,
    seed: int,
    together: int,
    longest: int | None,
    also: Run | None = None,
) -> None:
    """Makes `folder` that of this fine-tuning, as `claim` does."""
    digest = hashlib.blake2b(data.read_bytes(), digest_size=8).hexdigest()
    order = f"seed {seed}, {together} together, {longest or 'all'} tokens"
    run = {"model": str(model), "data": digest, "settings": settings.model_dump_json(), "order": order}
    claim(folder, {**run, **(also or {})})
