"""What each episode of a training step was paid and trained with, beside the step's episodes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from turnwise.environments.episode import Episode
from turnwise.protocols.rewards import Reward
from turnwise.rl.journal import read_lines
from turnwise.rl.run_folder import write_whole

if TYPE_CHECKING:
    from turnwise.rl.advantage import Credit  # torch: not to read what was written


@dataclass(frozen=True, slots=True)
class EpisodeCredit:
    """What each seat was paid, and the advantage of each turn (None: nobody was trained on it)."""

    rewards: Mapping[str, Reward]
    advantages: tuple[float | None, ...]


def write_credit(
    path: Path,
    groups: Sequence[Sequence[Episode]],
    paid: Sequence[Sequence[Mapping[str, Reward]]],
    credits: Iterable["Credit"],
) -> None:
    """Writes one line an episode: what was `paid`, and the advantages in the `credits` of the policies that learnt.

    Raises InputError where it cannot be written.
    """
    episodes = {episode.id: episode for group in groups for episode in group}
    advantages: dict[str, list[float | None]] = {
        id: [None] * len(episode.transcript.steps) for id, episode in episodes.items()
    }
    for credit in credits:
        for sample in credit.samples:
            for turn, advantage in zip(sample.trajectory.turns, sample.advantages, strict=True):
                advantages[sample.trajectory.episode.id][turn.place] = advantage
    rewarded = (by_seat for group in paid for by_seat in group)
    lines = [
        orjson.dumps({
            "id": id,
            "rewards": {seat: {"total": reward.total, "terms": reward.terms} for seat, reward in by_seat.items()},
            "advantages": advantages[id],
        }) + b"\n"
        for id, by_seat in zip(episodes, rewarded, strict=True)
    ]  # fmt: skip
    write_whole(path, lambda draft: draft.write_bytes(b"".join(lines)))


def read_credit(path: Path) -> dict[str, EpisodeCredit]:
    """What `write_credit` wrote, by the episode's id. Raises InputError, with the line, for a damaged one."""
    return dict(read_lines(path, _decode))


def _decode(line: bytes) -> tuple[str, EpisodeCredit]:
    record = orjson.loads(line)
    rewards = {seat: Reward(reward["terms"]) for seat, reward in record["rewards"].items()}
    return record["id"], EpisodeCredit(rewards, tuple(record["advantages"]))
