"""Plays many episodes at once, each moving on as soon as its own reply is there."""

import asyncio
from collections.abc import AsyncGenerator, Container, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from turnwise.agents.agent import Agent
from turnwise.environments.environment import Environment, Grader
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.seeds import turn_seed
from turnwise.environments.transcript import Step, Transcript, Turn
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.rl.episode_store import EpisodeStore

Team = Mapping[str, Agent]


class Store(Protocol):
    """Where episodes are kept as they end, and by whose ids those that are there already are known."""

    @property
    def ids(self) -> Container[str]:
        """The ids of the episodes that need not be played again."""

    def append(self, episode: Episode) -> None:
        """Keeps one episode."""


async def play_episode(
    protocol: ReasoningProtocol, team: Team, grader: Grader, problem: Problem, *, sample: int = 0, seed: int = 0
) -> Episode:
    """Plays one problem to its end and grades it. An exception ends the episode and is recorded on it.

    InputError alone is raised: it is the run that is wrong then, not the episode.
    """
    transcript = Transcript(problem)
    try:
        while turns := protocol.next_turns(transcript):
            taken = [
                _take(team, turn, turn_seed(seed, problem.id, sample, place))
                for place, turn in enumerate(turns, start=len(transcript.steps))
            ]
            steps = [await taken[0]] if len(taken) == 1 else await _all(taken)
            transcript = transcript.extended(*steps)
        grade = await grader.grade(problem, protocol.answer(transcript))
    except InputError:
        raise
    except (Exception, asyncio.CancelledError) as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise  # it is this episode that is called off, and not something that its agent waited for
        return Episode(transcript, sample, seed, error=f"{type(error).__name__}: {error}")
    return Episode(transcript, sample, seed, grade)


async def _take(team: Team, turn: Turn, seed: int) -> Step:
    reply = await team[turn.seat].reply(turn, seed)
    reply.text.encode()  # a text that cannot be stored fails here, where it costs no other episode
    return Step(turn.seat, turn.state, reply, turn.prefill)


async def _all(taken: Sequence[Coroutine[None, None, Step]]) -> list[Step]:
    """The steps of simultaneous turns, in the protocol's order. The first exception calls the other turns off."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in taken]
    except BaseExceptionGroup as errors:
        raise _first(errors) from None
    return [task.result() for task in tasks]


async def rollout(
    protocol: ReasoningProtocol,
    team: Team,
    environment: Environment,
    *,
    samples: int = 1,
    seed: int = 0,
    concurrency: int = 64,
    store: Store | None = None,
    max_failed_share: float = 0.1,
    only: Container[str] | None = None,
) -> AsyncGenerator[Episode, None]:
    """Plays each problem `samples` times and yields the episodes as they end, `concurrency` of them at a time.

    With a `store`, each episode is written before it is yielded, and those that it already holds are not played again
    (those that failed are). `only` has the ids of those that are to be played, where not all are. Raises InputError for
    a seat without an agent, and once more than `max_failed_share` of the episodes (of at least 20, or of all) have
    failed.
    """
    check_team(protocol, team)
    if samples < 1 or concurrency < 1:
        raise InputError(f"samples and concurrency must be at least 1; got {samples} and {concurrency}")
    waiting = _unplayed(environment, samples, store, only)
    ended: asyncio.Queue[Episode | None] = asyncio.Queue(maxsize=concurrency)

    async def work() -> None:
        for problem, sample in waiting:
            episode = await play_episode(protocol, team, environment.grader, problem, sample=sample, seed=seed)
            if store is not None:
                store.append(episode)
            await ended.put(episode)

    async def work_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(environment.problems) * samples)):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            await ended.put(None)
            raise _first(errors) from None
        await ended.put(None)

    workers = asyncio.create_task(work_all())
    failures, first, total = 0, "", 0
    try:
        while (episode := await ended.get()) is not None:
            total += 1
            if episode.error:
                failures, first = failures + 1, first or f"{episode.id}: {episode.error}"
            yield episode
            if total >= 20:
                _check_failures(failures, first, total, max_failed_share)
        await workers
        _check_failures(failures, first, total, max_failed_share)
    finally:
        workers.cancel()
        await asyncio.gather(workers, return_exceptions=True)


def play(
    protocol: ReasoningProtocol,
    team: Team,
    environment: Environment,
    *,
    samples: int = 1,
    seed: int = 0,
    concurrency: int = 64,
    store: EpisodeStore | None = None,
) -> list[Episode]:
    """Plays all episodes and returns them, those that the store already held included, in the problems' order."""

    async def gather() -> list[Episode]:
        stream = rollout(protocol, team, environment, samples=samples, seed=seed, concurrency=concurrency, store=store)
        return [episode async for episode in stream]

    played = asyncio.run(gather())
    return in_order(environment, played if store is None else store)


def in_order(environment: Environment, episodes: Iterable[Episode]) -> list[Episode]:
    """Those of the episodes that are on the environment's problems, in the order of these, and of their samples."""
    places = {problem.id: place for place, problem in enumerate(environment.problems)}
    known = [episode for episode in episodes if episode.transcript.problem.id in places]
    return sorted(known, key=lambda episode: (places[episode.transcript.problem.id], episode.sample))


def check_team(protocol: ReasoningProtocol, team: Team) -> None:
    """Raises InputError unless each of the protocol's seats has an agent."""
    if missing := [seat for seat in protocol.seats if seat not in team]:
        raise InputError(f"no agent for seat(s) {missing}; the team has {sorted(team)}")


def _unplayed(
    environment: Environment, samples: int, store: Store | None, only: Container[str] | None
) -> Iterator[tuple[Problem, int]]:
    played: Container[str] = store.ids if store is not None else frozenset()
    for problem in environment.problems:
        for sample in range(samples):
            id = f"{problem.id}#{sample}"
            if id not in played and (only is None or id in only):
                yield problem, sample


def _check_failures(failures: int, first: str, total: int, max_share: float) -> None:
    if failures > max_share * total:
        raise InputError(
            f"{failures} of {total} episodes failed, over the allowed share of {max_share:.0%}; the first: {first}"
        )


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
