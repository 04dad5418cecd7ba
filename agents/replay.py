"""An agent that says again what stored episodes have it saying."""

from collections.abc import Iterable

from turnwise.agents.agent import Agent
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.seeds import turn_seed
from turnwise.environments.transcript import Reply, Turn


class ReplayAgent(Agent):
    """Replies as stored episodes did at the same turn: of the same run seed, problem, sample and place in the dialogue.

    One agent can fill every seat. Raises InputError for a turn that no stored episode holds, and for one that another
    seat took there, or the same one in another state of the protocol.
    """

    def __init__(self, episodes: Iterable[Episode]) -> None:
        self._steps = {
            turn_seed(episode.seed, episode.transcript.problem.id, episode.sample, place): step
            for episode in episodes
            for place, step in enumerate(episode.transcript.steps)
        }

    async def reply(self, turn: Turn, seed: int) -> Reply:
        """The stored reply of the turn whose seed this is."""
        step = self._steps.get(seed)
        if step is None:
            raise InputError(
                f"no stored episode holds this turn of seat {turn.seat!r}: replay the same problems with the same seed"
            )
        if (step.seat, step.state) != (turn.seat, turn.state):
            raise InputError(
                f"the stored turn is of seat {step.seat!r} in state {step.state!r}, not of {turn.seat!r} in "
                f"{turn.state!r}: replay the same protocol"
            )
        return step.reply
