"""From long chains of thought to dialogues of a long and a short seat, stage by stage, in a folder that can be resumed.

Long⊗Short (arXiv 2505.11827, §4.1): chunk each chain into thoughts, weigh these by Monte Carlo rollouts, let those that
matter stay long, have the others written anew. What cannot be used is left out, and said: `ColdStart.dropped`.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path

from turnwise.agents.agent import Agent
from turnwise.environments.environment import Environment, Grader, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.rl.cold_start.asking import Asking, Check, CheckGrader
from turnwise.rl.cold_start.chunking import chain_of, check_blocks, chunk_by_rules, chunking_request
from turnwise.rl.cold_start.completion import check_contents, completion_request, dialogue_of
from turnwise.rl.cold_start.metric import misfires, score_errors, stays_long, thought_scores
from turnwise.rl.cold_start.rollouts import Continuation, RolloutSettings, RolloutStore, draw
from turnwise.rl.cold_start.thoughts import Chain, CountTokens, Dropped, WeighedChain, count_words, steps_of
from turnwise.rl.episode_store import EpisodeStore
from turnwise.rl.rollout import rollout
from turnwise.rl.run_folder import Run

OnProgress = Callable[[str, int, int], None]
"""Told of a stage, how much of it is done, and of how much at the most."""

Score = Callable[[Chain, list[float]], list[float]]
Assign = Callable[[Sequence[float]], list[bool]]


def by_metric(chain: Chain, success: list[float]) -> list[float]:
    """M of each thought of a chain, from the success after 0, 1, ... thoughts."""
    return thought_scores(chain.lengths, success[1:], success[0])


class ColdStart:
    """The stages, each to be called once and in order: `chunk`, `weigh`, `complete`.

    A run that was stopped is resumed by the same calls: no model is asked again for what it has said. `models` is what,
    besides the problems and the settings, must be equal for that (their names, say). Raises InputError where `folder`
    holds another run.
    """

    def __init__(
        self,
        folder: str | Path,
        grader: Grader,
        *,
        models: Run | None = None,
        seed: int = 0,
        concurrency: int = 64,
        on_progress: OnProgress = lambda stage, done, most: None,
    ) -> None:
        self.folder = Path(folder)
        self.grader = grader
        self.models = dict(models or {})
        self.seed = seed
        self.concurrency = concurrency
        self.on_progress = on_progress
        self.dropped: list[Dropped] = []

    def chunk(
        self, problems: Sequence[Problem], *, chunker: Agent | None = None, count_tokens: CountTokens = count_words
    ) -> list[Chain]:
        """The chains of the problems, each in its problem's `solution`, as thoughts; wrong ones are dropped.

        Without a `chunker`, by rules. `count_tokens` is the length of a text for the base model.
        """
        right = self._right(problems, [problem.solution for problem in problems], "reading", "its own answer is")
        requests = {problem.id: chunking_request(problem) for problem in right}
        if chunker is None:
            blocks = {problem.id: chunk_by_rules(steps_of(problem.solution)) for problem in right}
        else:
            answers = self._ask("chunking", list(requests.values()), check_blocks, chunker)
            blocks = {id_: check_blocks(requests[id_], text) for id_, text in answers.items()}
        chains = []
        for problem in right:
            if problem.id in blocks:
                try:
                    chains.append(chain_of(problem, blocks[problem.id], count_tokens))
                except InputError as error:
                    self.dropped.append(Dropped(problem.id, "chunking", str(error)))
        return chains

    def weigh(
        self,
        chains: Sequence[Chain],
        base: Agent,
        protocol: Continuation,
        settings: RolloutSettings,
        *,
        score: Score = by_metric,
        assign: Assign = stays_long,
    ) -> list[WeighedChain]:
        """What each thought is worth, by continuations of the base model, and which thoughts stay long.

        A chain is dropped where all continuations of one of its prefixes failed.
        """
        run = {**self._run(chain.problem for chain in chains), "protocol": protocol.fingerprint}
        run["settings"] = settings.model_dump_json(exclude={"concurrency"})
        run["thoughts"] = _digest(thought.text for chain in chains for thought in chain.thoughts)
        prefixes = sum(len(chain.thoughts) + 1 for chain in chains)
        with RolloutStore(self.folder / "rollouts", run) as store:
            drawn = store.drawn
            stream = draw(chains, protocol, base, self.grader, settings, store, seed=self.seed)
            asyncio.run(self._follow("rollouts", stream, drawn, prefixes * settings.samples))
            return [weighed for chain in chains if (weighed := self._weighed(chain, store, score, assign))]

    def complete(
        self, weighed: Sequence[WeighedChain], completer: Agent
    ) -> list[tuple[Problem, list[tuple[str, str]]]]:
        """Each chain as what the two seats say in turn, its short thoughts written by `completer`."""
        requests = {one.chain.problem.id: completion_request(one) for one in weighed if not all(one.long)}
        contents = self._ask("completion", list(requests.values()), check_contents, completer)
        written = []
        for one in weighed:
            id_ = one.chain.problem.id
            if all(one.long):
                written.append((one.chain.problem, dialogue_of(one, {})))
            elif id_ in contents:
                written.append((one.chain.problem, dialogue_of(one, check_contents(requests[id_], contents[id_]))))
        texts = [dialogue[-1][1] for _, dialogue in written]
        right = {p.id for p in self._right([p for p, _ in written], texts, "completion", "the completed answer is")}
        return [(problem, dialogue) for problem, dialogue in written if problem.id in right]

    def _right(self, problems: Sequence[Problem], texts: Sequence[str], stage: str, said: str) -> list[Problem]:
        """The problems that the texts answer rightly."""

        async def grade() -> list[Outcome]:
            graded = (self.grader.grade(problem, text) for problem, text in zip(problems, texts, strict=True))
            return [grade.outcome for grade in await asyncio.gather(*graded)]

        outcomes = list(zip(problems, asyncio.run(grade()), strict=True))
        self.dropped += [Dropped(p.id, stage, f"{said} {outcome}") for p, outcome in outcomes if outcome != "right"]
        return [problem for problem, outcome in outcomes if outcome == "right"]

    def _ask(self, stage: str, requests: Sequence[Problem], check: Check, agent: Agent) -> dict[str, str]:
        """The replies of an agent that passed the check, by the requests' ids; the others are dropped."""
        protocol = Asking(check)
        environment = Environment(stage, requests, CheckGrader(check))
        run = {**self._run(requests), "protocol": protocol.fingerprint}
        with EpisodeStore(self.folder / stage, run) as store:
            stream = rollout(
                protocol, {"helper": agent}, environment, seed=self.seed, concurrency=self.concurrency, store=store,
                max_failed_share=1.0,
            )  # fmt: skip
            asyncio.run(self._follow(stage, stream, len(store.ids), len(requests)))
            answers = dict[str, str]()
            for episode in store:
                id_, grade = episode.transcript.problem.id, episode.grade
                if grade is not None and grade.right:
                    answers[id_] = str(grade.answer)
                else:
                    turns = len(episode.transcript.steps)
                    reason = (
                        episode.error or f"no valid reply in {turns} attempts; of the last: {grade and grade.answer}"
                    )
                    self.dropped.append(Dropped(id_, stage, reason))
            return answers

    async def _follow(self, stage: str, stream: AsyncIterator[Episode], done: int, most: int) -> None:
        self.on_progress(stage, done, most)
        async for _ in stream:
            done += 1
            self.on_progress(stage, done, most)

    def _weighed(self, chain: Chain, store: RolloutStore, score: Score, assign: Assign) -> WeighedChain | None:
        counts = store.counts(chain)
        if missing := [thoughts for thoughts, (_, drawn) in enumerate(counts) if not drawn]:
            error = store.error(chain, missing[0])
            reason = f"no continuation from the first {missing[0]} thoughts came to an end: {error}"
            self.dropped.append(Dropped(chain.problem.id, "rollouts", reason))
            return None
        scores = score(chain, [right / drawn for right, drawn in counts])
        return WeighedChain(
            chain,
            right=tuple(right for right, _ in counts),
            rollouts=tuple(drawn for _, drawn in counts),
            rollout_tokens=tuple(store.mean_tokens(chain, thoughts) for thoughts in range(len(counts))),
            scores=tuple(scores),
            errors=tuple(score_errors(chain.lengths, counts)),
            misfires=tuple(misfires(counts)),
            long=tuple(assign(scores)),
        )

    def _run(self, problems: Iterable[Problem]) -> dict[str, str | int | float]:
        return {**self.models, "seed": self.seed, "problems": _digest(f"{p.id} {p.statement}" for p in problems)}


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()
