"""Conversations shown turn by turn, as they happen."""

import asyncio
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.text import Text

from turnwise.agents.agent import Agent
from turnwise.environments.environment import Environment
from turnwise.environments.episode import Episode
from turnwise.environments.transcript import Reply, Turn
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.rl.episode_store import EpisodeStore
from turnwise.rl.rollout import check_team, play_episode
from turnwise.show import said, verdict


class Overheard(Agent):
    """Another agent, whose replies are told to `tell` as they come."""

    def __init__(self, agent: Agent, tell: Callable[[Turn, Reply], None]) -> None:
        self.agent = agent
        self.tell = tell

    async def reply(self, turn: Turn, seed: int) -> Reply:
        """The other agent's reply."""
        reply = await self.agent.reply(turn, seed)
        self.tell(turn, reply)
        return reply


def play_live(
    protocol: ReasoningProtocol,
    team: Mapping[str, Agent],
    environment: Environment,
    console: Console,
    *,
    seed: int = 0,
    store: EpisodeStore | None = None,
) -> list[Episode]:
    """Plays the problems one after the other and prints each turn when it is taken; what `store` holds is left out."""
    check_team(protocol, team)

    def tell(turn: Turn, reply: Reply) -> None:
        console.print(said(turn.seat, turn.prefill + reply.text, protocol.seats))

    async def play() -> list[Episode]:
        heard = {seat: Overheard(agent, tell) for seat, agent in team.items()}
        episodes = []
        for problem in environment.problems:
            if store is not None and f"{problem.id}#0" in store.ids:
                continue
            console.rule(Text(problem.id), align="left", style="dim")
            console.print(Text(problem.statement, style="bold"))
            episode = await play_episode(protocol, heard, environment.grader, problem, seed=seed)
            console.print(verdict(episode))
            episodes.append(episode)
            if store is not None:
                store.append(episode)
        return episodes

    return asyncio.run(play())
