"""Agents that say again what stored episodes have them saying: throughout, or up to where another story begins."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

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


class BranchingAgent(Agent):
    """Replies as it did before where it is asked the same again (`same_turn`), by the same seed, and else as `agent`.

    `said` has the turns that were taken, by their seeds, with the replies. The same turn with the same seed gets the
    same reply from an agent, so what it would say again need not be sampled again.
    """

    def __init__(self, agent: Agent, said: Mapping[int, tuple[Turn, Reply]]) -> None:
        self._agent = agent
        self._said = said

    async def reply(self, turn: Turn, seed: int) -> Reply:
        """The stored reply to this turn, or a new one."""
        if seed in self._said:
            known, reply = self._said[seed]
            if same_turn(known, turn):
                return reply
        return await self._agent.reply(turn, seed)


def same_turn(one: Turn, other: Turn) -> bool:
    """Whether two turns ask the same: of texts that were sampled the tokens count, and not what they were sampled with.

    Log-probabilities of the same tokens differ in their last digits, by what else was in the batch.
    """
    return one == other or _as_read(one) == _as_read(other)


def _as_read(turn: Turn) -> Turn:
    messages = (
        message
        if message.reply is None
        else message._replace(
            reply=replace(message.reply, log_probabilities=(), prompt_token_ids=(), model="", version=0)
        )
        for message in turn.messages
    )
    return turn._replace(messages=tuple(messages))
