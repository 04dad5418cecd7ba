"""Checkpoints of a training run: read whole, or refused with what to do."""

from pathlib import Path
from pickle import UnpicklingError
from typing import TypedDict

import torch

from turnwise.environments.errors import InputError
from turnwise.rl.run_folder import Run


class Checkpoint(TypedDict):
    """What has to be known to go on. Randomness and the position in the data follow from the number of the step.

    `policies` are their own states, `base` the accuracy and tokens of the first evaluation, `best` the score of the
    best one, and `shares` those of each mode in the last steps.
    """

    run: Run
    step: int
    policies: dict[str, dict[str, object]]
    base: tuple[float, float] | None
    best: float
    shares: list[dict[str, float]]


def read_checkpoint(path: Path, run: Run) -> Checkpoint | None:
    """That of a run, if there is one. Raises InputError for one that is damaged or of another run."""
    if not path.exists():
        return None
    try:
        found: Checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except (EOFError, OSError, RuntimeError, UnpicklingError) as error:
        raise InputError(
            f"{path} must be a whole checkpoint, and is damaged ({type(error).__name__}): remove it, and the run "
            "begins anew"
        ) from error
    if lacking := Checkpoint.__required_keys__ - found.keys():
        raise InputError(
            f"{path} is of another version of turnwise: it has no {', '.join(sorted(lacking))}; remove it, and the "
            "run begins anew"
        )
    if different := sorted(key for key in {**run, **found["run"]} if run.get(key) != found["run"].get(key)):
        raise InputError(
            f"{path} is the checkpoint of another run: it differs in {', '.join(different)}; remove it, and the "
            "run begins anew"
        )
    return found
