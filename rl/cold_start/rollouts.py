"""Monte Carlo rollouts: how often a base model ends right when it goes on from the first thoughts of a chain."""

from array import array
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import overload

import orjson
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from turnwise.agents.agent import Agent
from turnwise.environments.environment import Environment, Grader, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Message, Transcript, Turn
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.protocols.rewards import Correctness, Reward, RewardSum
from turnwise.rl.cold_start.stopping import open_prefixes
from turnwise.rl.cold_start.thoughts import Chain, steps_of
from turnwise.rl.journal import Journal, read_lines
from turnwise.rl.rollout import rollout
from turnwise.rl.run_folder import Run

MISSING, WRONG, RIGHT, FAILED = range(4)
"""How a continuation ended, as a byte. One without a readable answer is wrong; one that an exception ended, failed."""


class RolloutSettings(BaseModel):
    """How many continuations of each prefix: `samples`, all of them unless `stop_early`.

    Then they are drawn `batch` at a time, and no more of a prefix once what the rest could show would no longer change
    which thoughts stay long, at `z` standard deviations (`turnwise.rl.cold_start.stopping`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: PositiveInt = 8
    stop_early: bool = False
    batch: PositiveInt = 8
    z: PositiveFloat = 1.15
    concurrency: PositiveInt = 64

    @property
    def rounds(self) -> list[int]:
        """How many samples a prefix has after each round in which it takes part."""
        return [*range(self.batch, self.samples, self.batch), self.samples] if self.stop_early else [self.samples]


class Continuation(ReasoningProtocol):
    """The seat "base" goes on from `opening`, the chain so far, and `closing`, to its answer.

    The chain so far is the problem's `solution`, one message a step, so that a longer prefix continues the tokens of a
    shorter one. `opening` is what a reasoning model begins with ("<think>"), and `closing` makes it answer now
    ("</think>"); each is left out where the chain so far begins with it, or holds it. All three may be empty.
    """

    seats = ("base",)

    def __init__(self, *, instruction: str = "", opening: str = "", closing: str = "", max_tokens: int = 4096) -> None:
        self.instruction = instruction
        self.opening = opening
        self.closing = closing
        self.max_tokens = max_tokens

    @property
    def fingerprint(self) -> str:
        """All that it is made of."""
        return f"Continuation {self.instruction!r} {self.opening!r} {self.closing!r} {self.max_tokens}"

    def next_turns(self, transcript: Transcript) -> Sequence[Turn]:
        """One turn."""
        if transcript.steps:
            return []
        problem = transcript.problem
        messages = [Message("system", self.instruction)] if self.instruction else []
        messages.append(Message("user", problem.statement))
        opening = "" if problem.solution.startswith(self.opening) else self.opening
        closing = "" if self.closing in problem.solution else self.closing
        begun = [opening, *steps_of(problem.solution)]
        messages += [Message("assistant", text) for text in begun if text]
        return [Turn("base", "continue", tuple(messages), (), self.max_tokens, closing)]

    def answer(self, transcript: Transcript) -> str:
        """The chain so far and what came after it, where the last box counts."""
        return transcript.problem.solution + transcript.text

    def rewards(self, group: Sequence[Episode], step: int = 0) -> list[Mapping[str, Reward]]:
        """1 for a right answer, else 0."""
        return RewardSum((Correctness(),))(group, self.seats, step)


def prefix_id(problem: Problem, thoughts: int) -> str:
    """The id of a problem whose solution is begun with so many thoughts."""
    return f"{problem.id}/{thoughts}"


class Prefixes(Sequence[Problem]):
    """Each chain's problem with its first 0, 1, ... thoughts as the solution so far; made when asked for."""

    def __init__(self, chains: Sequence[Chain], places: Sequence[tuple[int, int]]) -> None:
        self._chains = chains
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> "Prefixes": ...
    def __getitem__(self, index: int | slice) -> "Problem | Prefixes":
        if isinstance(index, slice):
            return Prefixes(self._chains, self._places[index])
        place, thoughts = self._places[index]
        chain = self._chains[place]
        begun = "".join(thought.text for thought in chain.thoughts[:thoughts])
        return replace(chain.problem, id=prefix_id(chain.problem, thoughts), solution=begun)


class RolloutStore(Journal):
    """How each continuation ended: `rollouts.jsonl` in a run's folder, one a line.

    In memory there are five bytes a continuation. One that failed is not written: it is drawn again when the store is
    next opened, and not before. `drawn` and `failed` count them.
    """

    def __init__(self, folder: str | Path, run: Run) -> None:
        super().__init__(folder, run, "rollouts.jsonl")
        self._outcomes: dict[str, bytearray] = {}
        self._tokens: dict[str, array[int]] = {}
        self._errors: dict[str, str] = {}
        self.drawn = self.failed = 0
        try:
            for prefix, sample, outcome, tokens in read_lines(self.path, _decode):
                self._keep(prefix, sample, outcome, tokens)
        except BaseException:
            self.close()
            raise

    @property
    def ids(self) -> "RolloutStore":
        """The ids of the continuations that need not be drawn, as the driver asks for them."""
        return self

    def __contains__(self, episode_id: object) -> bool:
        prefix, _, sample = str(episode_id).rpartition("#")
        outcomes, place = self._outcomes.get(prefix, b""), int(sample)
        return place < len(outcomes) and outcomes[place] != MISSING

    def append(self, episode: Episode) -> None:
        """Writes how one continuation ended; that one failed is only remembered."""
        prefix, tokens = episode.transcript.problem.id, episode.transcript.token_count
        if episode.grade is None:
            self._errors[prefix] = str(episode.error)
            self.failed += 1
            self._put(prefix, episode.sample, FAILED, 0)
            return
        record = {"prefix": prefix, "sample": episode.sample, "outcome": episode.grade.outcome, "tokens": tokens}
        self.write(orjson.dumps(record))
        self._keep(prefix, episode.sample, episode.grade.outcome, tokens)

    def counts(self, chain: Chain, most: Sequence[int] | None = None) -> list[tuple[int, int]]:
        """(right, drawn) among the first so many samples, by default all, after 0, 1, ... thoughts of a chain."""
        limits = [None] * (len(chain.thoughts) + 1) if most is None else most
        return [
            (outcomes.count(RIGHT), outcomes.count(RIGHT) + outcomes.count(WRONG))
            for outcomes in (self._of(chain, thoughts)[:limit] for thoughts, limit in enumerate(limits))
        ]

    def mean_tokens(self, chain: Chain, thoughts: int, most: int | None = None) -> float:
        """Sampled tokens of a continuation from so many thoughts, on average over the first `most`; 0 without any."""
        outcomes = self._of(chain, thoughts)[:most]
        tokens = self._tokens.get(prefix_id(chain.problem, thoughts), array("I"))
        return sum(tokens[:most]) / max(1, outcomes.count(RIGHT) + outcomes.count(WRONG))

    def error(self, chain: Chain, thoughts: int) -> str:
        """What the last continuation that failed from so many thoughts of a chain died of; empty where none did."""
        return self._errors.get(prefix_id(chain.problem, thoughts), "")

    def _of(self, chain: Chain, thoughts: int) -> bytearray:
        return self._outcomes.get(prefix_id(chain.problem, thoughts), bytearray())

    def _keep(self, prefix: str, sample: int, outcome: Outcome, tokens: int) -> None:
        self._put(prefix, sample, RIGHT if outcome is Outcome.RIGHT else WRONG, tokens)
        self.drawn += 1

    def _put(self, prefix: str, sample: int, ending: int, tokens: int) -> None:
        outcomes = self._outcomes.setdefault(prefix, bytearray())
        taken = self._tokens.setdefault(prefix, array("I"))
        more = sample + 1 - len(outcomes)
        outcomes.extend(bytes([MISSING]) * more)
        taken.extend([0] * more)
        outcomes[sample], taken[sample] = ending, tokens


def _decode(line: bytes) -> tuple[str, int, Outcome, int]:
    record = orjson.loads(line)
    return record["prefix"], int(record["sample"]), Outcome(record["outcome"]), int(record["tokens"])


async def draw(
    chains: Sequence[Chain],
    protocol: Continuation,
    base: Agent,
    grader: Grader,
    settings: RolloutSettings,
    store: RolloutStore,
    *,
    seed: int = 0,
) -> AsyncGenerator[Episode, None]:
    """Draws what continuations the store lacks, and yields them as they end.

    Which are drawn follows from the chains, the settings and what the continuations came to, never from when they
    ended: a run that was stopped goes on to the same end. A continuation that fails leaves its prefix with fewer, and
    `store` with the error.
    """
    for most, places in _rounds(chains, settings, store):
        environment = Environment("prefixes", Prefixes(chains, places), grader)
        stream = rollout(
            protocol, {"base": base}, environment, samples=most, seed=seed, concurrency=settings.concurrency,
            store=store, max_failed_share=1.0,
        )  # fmt: skip
        async with aclosing(stream):
            async for episode in stream:
                yield episode


def samples_asked(chains: Sequence[Chain], settings: RolloutSettings, store: RolloutStore) -> list[list[int]]:
    """How many samples the settings ask for after 0, 1, ... thoughts of each chain, once they were drawn.

    The store may hold more, of other settings.
    """
    asked = [[0] * (len(chain.thoughts) + 1) for chain in chains]
    for most, places in _rounds(chains, settings, store):
        for place, thoughts in places:
            asked[place][thoughts] = most
    return asked


def _rounds(
    chains: Sequence[Chain], settings: RolloutSettings, store: RolloutStore
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """For each round: up to how many samples, and of which prefixes, as (chain, thoughts).

    Once a round has been drawn, or was before, the next one follows from it and from those before it alone.
    """
    asked = [[0] * (len(chain.thoughts) + 1) for chain in chains]
    for most in settings.rounds:
        places = list(_open(chains, asked, settings, store))
        yield most, places
        for place, thoughts in places:
            asked[place][thoughts] = most


def _open(
    chains: Sequence[Chain], asked: Sequence[Sequence[int]], settings: RolloutSettings, store: RolloutStore
) -> Iterator[tuple[int, int]]:
    """(chain, thoughts) of the prefixes of which more samples are needed."""
    for place, (chain, most) in enumerate(zip(chains, asked, strict=True)):
        if not any(most):
            needed = set(range(len(most)))
        else:
            needed = open_prefixes(chain.lengths, store.counts(chain, most), settings.samples, z=settings.z)
        yield from ((place, thoughts) for thoughts in sorted(needed))
