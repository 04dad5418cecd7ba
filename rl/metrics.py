"""Figures over training steps, as JSON lines and for TensorBoard."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean

import orjson
from torch.utils.tensorboard.writer import SummaryWriter

from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.protocols.rewards import Reward
from turnwise.rl.advantage import Sample
from turnwise.rl.run_folder import write_whole
from turnwise.rl.summary import by_level, summarise

SHARE = "share of modes/"


class MetricsLog:
    """Writes `metrics.jsonl`, one line a step, and TensorBoard's events into `tensorboard/`.

    What stands there of steps after `last` is taken back: they are done again, by a run that resumes.
    """

    def __init__(self, folder: Path, *, last: int) -> None:
        self._path = folder / "metrics.jsonl"
        kept = [line for line in _lines(self._path) if orjson.loads(line)["step"] <= last]
        write_whole(self._path, lambda path: path.write_bytes(b"".join(line + b"\n" for line in kept)))
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=last + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Appends the figures of one step."""
        line = orjson.dumps({"step": step, **figures})
        try:
            with self._path.open("ab") as file:
                file.write(line + b"\n")
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        except OSError as error:
            raise InputError(
                f"cannot write to {self._path}: {error.strerror}; the last checkpoint is safe: make room and run the "
                "same command again"
            ) from error

    def close(self) -> None:
        """Lets TensorBoard's writer go."""
        with suppress(OSError):  # of a full disk, of which `write` has told
            self._writer.close()


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """The figures of each step that a run has logged, in order, with its number as "step"."""
    return [orjson.loads(line) for line in _lines(Path(folder) / "metrics.jsonl")]


def _lines(path: Path) -> list[bytes]:
    """The whole lines of a file; a last line that a kill left torn is none."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def training_figures(
    groups: Sequence[Sequence[Episode]],
    paid: Sequence[Sequence[Mapping[str, Reward]]],
    control_states: Collection[str] = (),
) -> dict[str, float]:
    """What a step's graded episodes came to: right answers, tokens, turns, modes, each seat's reward and its terms."""
    figures = _figures([episode for group in groups for episode in group], control_states)
    for seat in paid[0][0]:
        rewards = [rewarded[seat] for group in paid for rewarded in group]
        figures[f"reward/{seat}"] = fmean(reward.total for reward in rewards)
        for term in rewards[0].terms:
            figures[f"reward/{seat}/{term}"] = fmean(reward.terms[term] for reward in rewards)
    return figures


def evaluation_figures(episodes: Sequence[Episode], control_states: Collection[str] = ()) -> dict[str, float]:
    """Right answers, tokens, turns and modes of an evaluation, over all and by level."""
    levels = by_level(episodes)
    parts = {"evaluation": list(episodes)}
    for level in levels if len(levels) > 1 else ():
        parts[f"evaluation/level {level}"] = [e for e in episodes if e.transcript.problem.level == level]
    return {
        f"{part}/{name}": value
        for part, chosen in parts.items()
        for name, value in _figures(chosen, control_states).items()
    }


def staleness_figures(samples: Sequence[Sample], version: int) -> dict[str, float]:
    """How many versions the tokens that a policy of `version` learns from lag behind: on average, and at the most."""
    lags = [
        version - of_token
        for sample in samples
        for turn in sample.trajectory.turns
        for of_token in turn.step.reply.versions or (turn.step.reply.version,) * (turn.end - turn.start)
    ]
    return {"staleness": fmean(lags), "staleness/most": float(max(lags))} if lags else {}


def mode_shares(figures: Mapping[str, float]) -> dict[str, float]:
    """Of the figures of one step, the share of each mode."""
    return {name.removeprefix(SHARE): value for name, value in figures.items() if name.startswith(SHARE)}


def collapsed_mode(steps: Sequence[Mapping[str, float]], *, below: float = 0.02) -> str | None:
    """The mode beside which all others had less than `below` of the choices in each of these steps, if there is one.

    A policy that has collapsed no longer tries its other modes, and so cannot learn that they would be better.
    """
    first = steps[0] if steps else {}
    return next((mode for mode in first if all(step.get(mode, 0.0) > 1 - below for step in steps)), None)


def _figures(episodes: Sequence[Episode], control_states: Collection[str]) -> dict[str, float]:
    summary = summarise(episodes)
    figures = {"right": summary.accuracy, "tokens": summary.tokens, "turns": summary.turns}
    chosen = [
        (step.reply.stop or "other", episode.right)
        for episode in episodes
        for step in episode.transcript.steps
        if step.state in control_states
    ]
    for mode, count in sorted(Counter(mode for mode, _ in chosen).items()):
        figures[f"{SHARE}{mode}"] = count / len(chosen)
        figures[f"right by mode/{mode}"] = fmean(right for other, right in chosen if other == mode)
    return figures
