"""Who fills a seat."""

from abc import ABC, abstractmethod

from turnwise.environments.transcript import Reply, Turn


class Agent(ABC):
    """Fills one seat or several. The same agent in two seats means shared weights; there is no flag for it."""

    @abstractmethod
    async def reply(self, turn: Turn, seed: int) -> Reply:
        """What the agent says in `turn`.

        All randomness derives from `seed`, so that the same turn with the same seed gets the same reply, whatever else
        is running. Raises `InputError` where the agent can never serve such a turn (no user of the run can want it to
        go on), and any other exception where this one episode failed.
        """
