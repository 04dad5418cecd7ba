"""CPU time that one turn costs, models aside: turnwise against PettingZoo and TextArena, on one dialogue of 8 turns.

    pip install -e ".[bench]"
    python benchmarks/turns.py [--episodes 200] [--repetitions 15]

Two seats say the same eight scripted lines to each other in every row, and every row checks that they were said. Each
speaker is shown all that was said before. The rows are played in turn, repetition by repetition, and each figure is
process CPU time over the number of turns, what comes once an episode (reset, grading, the line in the store) included.

- turnwise plays a turn graph with scripted agents whose replies are made beforehand: one episode after the other by
  `play_episode`, and by `rollout`, which is what the ratios are to. In the last of its rows each turn has 100 token ids
  and log-probabilities, each prompt holds the ids of everything before it, and each episode is appended to a store.
- PettingZoo plays a small AEC environment through the loop of its documentation, bare and in the two wrappers that its
  own environments wear. One checks the bounds of each line, which is about half of that row and grows with the line.
- TextArena plays a small two-player environment through the loop of its documentation, bare and in the wrapper that
  its own text games wear. That wrapper never forgets, so each episode has an environment of its own, as documented.
"""

import argparse
import asyncio
import gc
import importlib.metadata
import random
import statistics
import string
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import textarena
from gymnasium.spaces import Sequence, Space, Text
from pettingzoo import AECEnv
from pettingzoo.utils import AgentSelector, wrappers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from turnwise.agents.scripted import ScriptedAgent
from turnwise.environments.environment import Environment, Grade, Grader, Outcome
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Reply, Transcript, Turn
from turnwise.protocols.graph import END, GraphProtocol, State, TurnGraph
from turnwise.protocols.rewards import Correctness, RewardSum
from turnwise.rl.episode_store import EpisodeStore
from turnwise.rl.rollout import Team, play_episode, rollout

QUESTION, ANSWER = "What is 17 × 24?", "408"
LINES = (
    "Split 24 into 20 and 4, so that both products are easy.",
    "Then 17 × 20 is 340. Can you do the other one?",
    "17 × 4 is 68: four times ten and four times seven.",
    "So the sum to work out is 340 and 68.",
    "300 and 40 and 60 and 8: that is 400 and 8.",
    "I get 408 as well. Let us check it the other way.",
    "24 × 17 is 24 × 10 and 24 × 7, that is 240 and 168.",
    "Which is 408 again, so the answer is 408",
)
TOKENS = 100


def right(text: str) -> bool:
    return text.endswith(ANSWER)


def check(lines: tuple[str, ...]) -> None:
    if lines != LINES:
        raise RuntimeError(f"another dialogue was played: {lines}")


class AnswerGrader(Grader):
    async def grade(self, problem: Problem, text: str) -> Grade:
        return Grade(Outcome.RIGHT if right(text) else Outcome.WRONG, ANSWER)


def two_seats() -> GraphProtocol:
    states = {
        "ask": State(seat="first", then="reply"),
        "reply": State(seat="second", then="ask", closes={"Done.": END}),
    }
    graph = TurnGraph(
        seats={"first": "", "second": ""}, start="ask", states=states, max_turns=len(LINES), dialogue="chat"
    )
    return GraphProtocol(graph, RewardSum((Correctness(),)))


def scripted(tokens: int) -> Team:
    """One agent in both seats, whose replies carry `tokens` token ids each, as new integers in every prompt."""
    rng, replies = random.Random(0), list[Reply]()
    before = [rng.randrange(150_000) for _ in range(TOKENS // 2 if tokens else 0)]
    for line in LINES:
        ids = [rng.randrange(150_000) for _ in range(tokens)]
        log_probabilities = tuple(-rng.expovariate(2) for _ in ids)
        prompt = tuple(int(str(token)) for token in before)
        replies.append(Reply(line, tokens or 12, "end", None, tuple(ids), log_probabilities, prompt))
        before += ids

    def say(turn: Turn, seed: int) -> Reply:
        return replies[len(turn.messages) - 1]

    agent = ScriptedAgent(say)
    return {"first": agent, "second": agent}


def turnwise_play(episodes: int) -> Callable[[], None]:
    protocol, team, grader, problem = two_seats(), scripted(0), AnswerGrader(), Problem("p", QUESTION, ANSWER)

    async def play() -> None:
        for sample in range(episodes):
            episode = await play_episode(protocol, team, grader, problem, sample=sample)
            check(said(episode.transcript))

    return lambda: asyncio.run(play())


def turnwise_rollout(episodes: int, tokens: int = 0, folder: Path | None = None) -> Callable[[], None]:
    protocol, team = two_seats(), scripted(tokens)
    environment = Environment("bench", [Problem("p", QUESTION, ANSWER)], AnswerGrader())
    repetitions = iter(range(1_000_000))

    async def play(store: EpisodeStore | None) -> None:
        count = 0
        async for episode in rollout(protocol, team, environment, samples=episodes, store=store):
            check(said(episode.transcript))
            count += 1
        if count != episodes:
            raise RuntimeError(f"{count} episodes were played, not {episodes}")

    def run() -> None:
        if folder is None:
            asyncio.run(play(None))
        else:
            with EpisodeStore(folder / str(next(repetitions)), {"protocol": "bench"}) as store:
                asyncio.run(play(store))

    return run


def said(transcript: Transcript) -> tuple[str, ...]:
    return tuple(step.reply.text for step in transcript.steps)


class PettingZooDialogue(AECEnv[str, tuple[str, ...], str]):
    """Written as PettingZoo's own turn-based environments are; an agent observes the lines said so far."""

    metadata = {"name": "dialogue_v0", "is_parallelizable": False, "render_modes": []}  # noqa: RUF012 - its own form

    def __init__(self) -> None:
        super().__init__()
        self.possible_agents = ["first", "second"]
        self._line = Text(200, charset=string.printable + "×")
        self._lines = Sequence(self._line)

    def observation_space(self, agent: str) -> Space[tuple[str, ...]]:
        return self._lines

    def action_space(self, agent: str) -> Space[str]:
        return self._line

    def reset(self, seed: int | None = None, options: dict[str, object] | None = None) -> None:
        self.agents = self.possible_agents[:]
        self.rewards = dict.fromkeys(self.agents, 0.0)
        self._cumulative_rewards = dict.fromkeys(self.agents, 0.0)
        self.terminations = dict.fromkeys(self.agents, False)
        self.truncations = dict.fromkeys(self.agents, False)
        self.infos: dict[str, dict[str, object]] = {agent: {} for agent in self.agents}
        self.said: list[str] = []
        self._selector = AgentSelector(self.agents)
        self.agent_selection = self._selector.next()

    def observe(self, agent: str) -> tuple[str, ...]:
        return tuple(self.said)

    def step(self, action: str | None) -> None:
        agent = self.agent_selection
        if self.terminations[agent] or self.truncations[agent]:
            self._was_dead_step(action)
            return
        self._cumulative_rewards[agent] = 0
        self.said.append(action or "")
        if len(self.said) == len(LINES):
            self.rewards = dict.fromkeys(self.agents, float(right(self.said[-1])))
            self.terminations = dict.fromkeys(self.agents, True)
        self.agent_selection = self._selector.next()
        self._accumulate_rewards()


def pettingzoo(episodes: int, *, wrapped: bool) -> Callable[[], None]:
    raw = PettingZooDialogue()
    env = wrappers.OrderEnforcingWrapper(wrappers.AssertOutOfBoundsWrapper(raw)) if wrapped else raw

    def play() -> None:
        for _ in range(episodes):
            lines = iter(LINES)
            env.reset()
            for _agent in env.agent_iter():
                _observation, _reward, termination, truncation, _info = env.last()
                env.step(None if termination or truncation else next(lines))
            check(tuple(raw.said))

    return play


class TextArenaDialogue(textarena.Env):
    """Written as TextArena's own conversations are; a player observes the lines said since its last turn."""

    def reset(self, num_players: int, seed: int | None = None) -> None:
        self.said: list[str] = []
        self.state = textarena.TwoPlayerState(num_players=num_players, max_turns=len(LINES), seed=seed)
        self.state.reset(game_state={}, player_prompt_function=lambda player_id, game_state: QUESTION)

    def step(self, action: str) -> tuple[bool, textarena.Info]:
        self.said.append(action)
        self.state.add_observation(
            from_id=self.state.current_player_id,
            message=action,
            observation_type=textarena.ObservationType.PLAYER_ACTION,
        )
        if len(self.said) == len(LINES):
            self.state.set_draw(reason="right" if right(action) else "wrong")
        return self.state.step()


def text_arena(episodes: int, *, wrapped: bool) -> Callable[[], None]:
    name = "Dialogue-v0" if wrapped else "Dialogue-v0-raw"
    textarena.register(
        name, TextArenaDialogue, default_wrappers=[textarena.wrappers.LLMObservationWrapper] if wrapped else None
    )

    def play() -> None:
        for _ in range(episodes):
            lines, done = iter(LINES), False
            env = textarena.make(name)
            env.reset(num_players=2)
            while not done:
                _player, _observation = env.get_observation()
                done, _info = env.step(action=next(lines))
            env.close()
            check(tuple(env.said))

    return play


def microseconds(play: Callable[[], None], episodes: int) -> float:
    gc.collect()
    start = time.process_time()
    play()
    return (time.process_time() - start) / (episodes * len(LINES)) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--repetitions", type=int, default=15)
    arguments = parser.parse_args()
    count = arguments.episodes
    zoo, arena = (f"{name} {importlib.metadata.version(name)}" for name in ("pettingzoo", "textarena"))
    with TemporaryDirectory() as folder:
        rows = {
            "turnwise, play_episode": turnwise_play(count),
            "turnwise, rollout": turnwise_rollout(count),
            "turnwise, rollout, tokens, store": turnwise_rollout(count, TOKENS, Path(folder)),
            f"{zoo}, bare": pettingzoo(count, wrapped=False),
            f"{zoo}, wrapped": pettingzoo(count, wrapped=True),
            f"{arena}, bare": text_arena(count, wrapped=False),
            f"{arena}, wrapped": text_arena(count, wrapped=True),
        }
        for play in rows.values():
            play()
        figures: dict[str, list[float]] = {name: [] for name in rows}
        for _ in track(range(arguments.repetitions), transient=True):
            for name, play in rows.items():
                figures[name].append(microseconds(play, count))
    bare = statistics.median(figures["turnwise, rollout"])
    table = Table(title=f"CPU time per turn, {len(LINES)} turns, {count} episodes, {arguments.repetitions} repetitions")
    table.add_column("")
    table.add_column("µs, median (min-max)", justify="right")
    table.add_column("ratio to rollout", justify="right")
    for name, times in figures.items():
        median = statistics.median(times)
        table.add_row(name, f"{median:.1f} ({min(times):.1f}-{max(times):.1f})", f"{median / bare:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
