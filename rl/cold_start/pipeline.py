"""From long chains of thought to dialogues of a long and a short seat, stage by stage, in a folder that can be resumed.

Long⊗Short (arXiv 2505.11827, §4.1): chunk each chain into thoughts, weigh these by Monte Carlo rollouts, let those that
matter stay long, have the others written anew. A chain that cannot be used is left out, and the rest goes on.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import orjson
from datasets import Features, Value  # type: ignore[import-untyped]

from turnwise.agents.agent import Agent
from turnwise.environments.environment import Environment, Grader, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.rl.cold_start.asking import Asking, Check, CheckGrader
from turnwise.rl.cold_start.chunking import chain_of, check_blocks, chunk_by_rules, chunking_request
from turnwise.rl.cold_start.completion import check_contents, completion_request, dialogue_of
from turnwise.rl.cold_start.metric import misfires, random_scores, score_errors, stays_long, thought_scores
from turnwise.rl.cold_start.rollouts import Continuation, RolloutSettings, RolloutStore, draw, samples_asked
from turnwise.rl.cold_start.thoughts import Chain, CountTokens, Dropped, WeighedChain, count_words, steps_of
from turnwise.rl.episode_store import EpisodeStore
from turnwise.rl.parquet import Row, write_rows
from turnwise.rl.rollout import in_order, rollout
from turnwise.rl.run_folder import Run, write_whole

FEATURES = Features(
    {
        **{name: Value("string") for name in ("id", "kind", "text")},
        **{
            name: Value("int64") for name in ("place", "tokens", "right_before", "rollouts_before", "right", "rollouts")
        },
        **{name: Value("float64") for name in ("rollout_tokens_before", "rollout_tokens", "score", "error", "misfire")},
        "long": Value("bool"),
    }
)
"""Of thoughts.parquet, one row a thought: `place` counts from 1; `right_before` of `rollouts_before` are P_{i−1}."""

OnProgress = Callable[[str, int, int], None]
"""Told of a stage, how much of it is done, and of how much at the most."""

Dialogue = list[tuple[str, str]]
"""The seat and the text of each turn."""

Score = Callable[[Chain, list[float]], list[float]]
"""The score of each thought of a chain, from the share of right continuations after 0, 1, ... thoughts."""

Assign = Callable[[Sequence[float]], list[bool]]
"""Which thoughts stay long, from their scores."""


def by_metric(chain: Chain, success: list[float]) -> list[float]:
    """The paper's score, M."""
    return thought_scores(chain.lengths, success[1:], success[0])


def by_chance(seed: int) -> Score:
    """The paper's ablation: scores that say nothing, for each chain the same ones in every run with this seed."""
    return lambda chain, success: random_scores(len(chain.thoughts), f"{seed} {chain.problem.id}")


class ColdStart:
    """The stages, in order: `chunk`, `weigh`, `complete`.

    No model is asked twice for the same thing: a run that was stopped goes on by the same calls, and one with more
    chains or more continuations does only what is new. For that, `models` names the "chunker", the "base" and the
    "completer". What could not be used stands in `dropped`, and in `dropped.jsonl` of the folder; `failed` counts the
    continuations that an exception ended. Raises InputError where a stage's folder is of another model or seed.
    """

    def __init__(
        self,
        folder: str | Path,
        grader: Grader,
        *,
        models: Mapping[str, str] | None = None,
        seed: int = 0,
        on_progress: OnProgress = lambda stage, done, most: None,
    ) -> None:
        self.folder = Path(folder)
        self.grader = grader
        self.models = dict(models or {})
        self.seed = seed
        self.on_progress = on_progress
        self.dropped: list[Dropped] = []
        self.failed = 0

    def chunk(
        self, problems: Sequence[Problem], *, chunker: Agent | None = None, count_tokens: CountTokens = count_words
    ) -> list[Chain]:
        """The chains of the problems, each in its problem's `solution`, as thoughts; wrong ones are dropped.

        Without a `chunker`, by rules. `count_tokens` is the length of a text for the base model. Raises InputError
        where two problems have one id.
        """
        if twice := [id_ for id_, count in Counter(problem.id for problem in problems).items() if count > 1]:
            raise InputError(
                f"each chain needs an id of its own; {twice[0]!r} stands more than once: rename or remove it"
            )
        self._begin("reading", "chunking")
        right = self._right(problems, [problem.solution for problem in problems], "reading", "its own answer is")
        requests = {problem.id: chunking_request(problem) for problem in right}
        if chunker is None:
            blocks = {problem.id: chunk_by_rules(steps_of(problem.solution)) for problem in right}
        else:
            answers = self._ask("chunking", "chunker", list(requests.values()), check_blocks, chunker)
            blocks = {id_: check_blocks(requests[id_], text) for id_, text in answers.items()}
        chains = []
        for problem in right:
            if problem.id in blocks:
                try:
                    chains.append(chain_of(problem, blocks[problem.id], count_tokens))
                except InputError as error:
                    self.dropped.append(Dropped(problem.id, "chunking", str(error)))
        self._report()
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

        A chain is dropped where all continuations of one of its prefixes failed. Writes thoughts.parquet. Raises
        InputError for `stop_early` with another score or rule than the paper's, for which alone it can tell what
        further rollouts would change.
        """
        if settings.stop_early and (score is not by_metric or assign is not stays_long):
            raise InputError("stop_early works with the scores M and strict records alone; draw all samples instead")
        self._begin("rollouts")
        with RolloutStore(self.folder / "rollouts", self._run(protocol, "base")) as store:
            addressed = [_addressed(chain) for chain in chains]
            most = settings.samples * sum(len(chain.thoughts) + 1 for chain in chains)
            held = sum(drawn for chain in addressed for _, drawn in store.counts(chain, _all(chain, settings)))
            stream = draw(addressed, protocol, base, self.grader, settings, store, seed=self.seed)
            asyncio.run(self._follow("rollouts", stream, held, most))
            self.failed = store.failed
            weighed = []
            for chain, in_store, asked in zip(
                chains, addressed, samples_asked(addressed, settings, store), strict=True
            ):
                counts = store.counts(in_store, asked)
                missing = next((thoughts for thoughts, (_, drawn) in enumerate(counts) if not drawn), None)
                if missing is None:
                    tokens = [store.mean_tokens(in_store, *limited) for limited in enumerate(asked)]
                    weighed.append(_weighed(chain, counts, tokens, score, assign))
                else:
                    error = store.error(in_store, missing)
                    reason = f"no continuation from the first {missing} thoughts came to an end: {error}"
                    self.dropped.append(Dropped(chain.problem.id, "rollouts", reason))
        self._report()
        if weighed:
            write_rows(self.folder / "thoughts.parquet", _rows(weighed), FEATURES)
        return weighed

    def complete(self, weighed: Sequence[WeighedChain], completer: Agent) -> list[tuple[Problem, Dialogue]]:
        """Each chain as what the two seats say in turn, its short thoughts written by `completer`."""
        self._begin("completion")
        requests = {one.chain.problem.id: completion_request(one) for one in weighed if not all(one.long)}
        contents = self._ask("completion", "completer", list(requests.values()), check_contents, completer)
        written = []
        for one in weighed:
            id_ = one.chain.problem.id
            if all(one.long):
                written.append((one.chain.problem, dialogue_of(one, {})))
            elif id_ in contents:
                written.append((one.chain.problem, dialogue_of(one, check_contents(requests[id_], contents[id_]))))
        texts = [dialogue[-1][1] for _, dialogue in written]
        right = {p.id for p in self._right([p for p, _ in written], texts, "completion", "the completed answer is")}
        self._report()
        return [(problem, dialogue) for problem, dialogue in written if problem.id in right]

    def _right(self, problems: Sequence[Problem], texts: Sequence[str], stage: str, said: str) -> list[Problem]:
        """The problems that the texts answer rightly."""

        async def grade() -> list[Outcome]:
            graded = (self.grader.grade(problem, text) for problem, text in zip(problems, texts, strict=True))
            return [grade.outcome for grade in await asyncio.gather(*graded)]

        outcomes = list(zip(problems, asyncio.run(grade()), strict=True))
        self.dropped += [
            Dropped(p.id, stage, f"{said} {outcome}") for p, outcome in outcomes if outcome is not Outcome.RIGHT
        ]
        return [problem for problem, outcome in outcomes if outcome is Outcome.RIGHT]

    def _ask(self, stage: str, role: str, requests: Sequence[Problem], check: Check, agent: Agent) -> dict[str, str]:
        """The replies of an agent that passed the check, by the requests' ids; the others are dropped."""
        protocol = Asking(check)
        asked = {f"{request.id}-{_digest([request.statement])}": request for request in requests}
        environment = Environment(
            stage, [replace(request, id=id_) for id_, request in asked.items()], CheckGrader(check)
        )
        with EpisodeStore(self.folder / stage, self._run(protocol, role)) as store:
            held = sum(f"{id_}#0" in store.ids for id_ in asked)
            stream = rollout(
                protocol, {"helper": agent}, environment, seed=self.seed, store=store, max_failed_share=1.0,
            )  # fmt: skip
            asyncio.run(self._follow(stage, stream, held, len(requests)))
            answers = dict[str, str]()
            for episode in in_order(environment, store):
                id_, grade = asked[episode.transcript.problem.id].id, episode.grade
                if grade is not None and grade.right:
                    answers[id_] = str(grade.answer)
                else:
                    attempts = len(episode.transcript.steps)
                    fault = f"no valid reply in {attempts} attempts; of the last: {grade and grade.answer}"
                    self.dropped.append(Dropped(id_, stage, episode.error or fault))
            return answers

    async def _follow(self, stage: str, stream: AsyncIterator[Episode], done: int, most: int) -> None:
        self.on_progress(stage, done, most)
        async for _ in stream:
            done += 1
            self.on_progress(stage, done, most)

    def _report(self) -> None:
        lines = b"".join(orjson.dumps(one, option=orjson.OPT_APPEND_NEWLINE) for one in self.dropped)
        write_whole(self.folder / "dropped.jsonl", lambda path: path.write_bytes(lines))

    def _begin(self, *stages: str) -> None:
        """Forgets what these stages dropped when they were last called."""
        self.dropped = [one for one in self.dropped if one.stage not in stages]

    def _run(self, protocol: ReasoningProtocol, role: str) -> Run:
        return {role: self.models.get(role, ""), "seed": self.seed, "protocol": protocol.fingerprint}


def _weighed(
    chain: Chain, counts: Sequence[tuple[int, int]], tokens: Sequence[float], score: Score, assign: Assign
) -> WeighedChain:
    scores = score(chain, [right / drawn for right, drawn in counts])
    return WeighedChain(
        chain,
        right=tuple(right for right, _ in counts),
        rollouts=tuple(drawn for _, drawn in counts),
        rollout_tokens=tuple(tokens),
        scores=tuple(scores),
        errors=tuple(score_errors(chain.lengths, counts)),
        misfires=tuple(misfires(counts)),
        long=tuple(assign(scores)),
    )


def _rows(weighed: Iterable[WeighedChain]) -> Iterator[Row]:
    for one in weighed:
        for place, thought in enumerate(one.chain.thoughts):
            yield {
                "id": one.chain.problem.id, "kind": thought.kind, "text": thought.text, "place": place + 1,
                "tokens": thought.tokens, "right_before": one.right[place], "rollouts_before": one.rollouts[place],
                "rollout_tokens_before": one.rollout_tokens[place], "right": one.right[place + 1],
                "rollouts": one.rollouts[place + 1], "rollout_tokens": one.rollout_tokens[place + 1],
                "score": one.scores[place],
                "error": one.errors[place], "misfire": one.misfires[place], "long": one.long[place],
            }  # fmt: skip


def _addressed(chain: Chain) -> Chain:
    """The chain under an id that tells all that its rollouts depend on: were it cut otherwise, they are drawn anew."""
    problem = chain.problem
    id_ = f"{problem.id}-{_digest([problem.statement, problem.answer, *(thought.text for thought in chain.thoughts)])}"
    return replace(chain, problem=replace(chain.problem, id=id_))


def _all(chain: Chain, settings: RolloutSettings) -> list[int]:
    return [settings.samples] * (len(chain.thoughts) + 1)


def _digest(texts: Iterable[str]) -> str:
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=6).hexdigest()
