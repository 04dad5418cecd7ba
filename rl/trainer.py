"""Several policies trained together: rollouts, credit, updates, evaluation, checkpoints."""

import asyncio
import random
import shutil
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from turnwise.agents.agent import Agent
from turnwise.agents.engine import EngineAgent
from turnwise.environments.environment import Environment
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.seeds import turn_seed
from turnwise.protocols.protocol import ReasoningProtocol
from turnwise.rl.advantage import Credit, Estimator, Grouping, assign_credit
from turnwise.rl.checkpoint import Checkpoint, read_checkpoint
from turnwise.rl.credit_log import write_credit
from turnwise.rl.episode_store import EpisodeStore
from turnwise.rl.metrics import (
    MetricsLog,
    collapsed_mode,
    evaluation_figures,
    mode_shares,
    staleness_figures,
    training_figures,
)
from turnwise.rl.rollout import in_order, rollout
from turnwise.rl.rounds import Round, parse_rounds
from turnwise.rl.run_folder import Run, claim, write_whole
from turnwise.rl.summary import Summary, accuracy_efficiency_score, summarise
from turnwise.rl.trained_policy import Backend, EmbeddedPolicy, Policy, PolicyDiedError, TrainedPolicy
from turnwise.rl.watchdog import LOGGER, watching

# So many steps with but one mode raise the alarm.
COLLAPSED_FOR = 5
# So many times policies are opened anew for one step.
LIVES = 3


class TrainingSettings(BaseModel):
    """How long, on how much, and by what credit the policies are trained.

    `rounds` says who trains in each of them, `steps` steps long: "long long short" (`turnwise.rl.rounds`); empty: all
    policies at once. A step plays `problems` problems `samples` times each, at `temperature`. `estimator`, `grouping`
    and `skip_equal` are `assign_credit`'s. After every `evaluate_every` steps, and at the end of each round, the
    policies are evaluated, at `evaluation_temperature`; every `checkpoint_every` the state of the run is saved; of
    every `keep_episodes`-th step the episodes are kept (0: of none).

    With a `staleness` of s the episodes of the s next steps are begun while a step is still learnt from, and go on over
    the updates, so that nobody waits for the longest dialogue. Every step still learns from all of its own episodes,
    whatever their length; each token is weighed by the version that it was sampled from
    (`LossSettings.importance_cap`). What is sampled then depends on how long everything takes, not on the seed alone.

    A stage that takes longer than `deadline` seconds is warned of, with who waits for whom.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: str = ""
    steps: PositiveInt = 100
    problems: PositiveInt = 24
    samples: PositiveInt = 8
    temperature: PositiveFloat = 1.0
    estimator: Estimator = "mean-centred"
    grouping: Grouping = "seat"
    skip_equal: bool = False
    seed: int = 0
    evaluate_every: PositiveInt = 20
    evaluation_temperature: Annotated[float, Field(ge=0)] = 0.6
    checkpoint_every: PositiveInt = 10
    keep_episodes: Annotated[int, Field(ge=0)] = 10
    staleness: Annotated[int, Field(ge=0)] = 0
    deadline: PositiveFloat = 1800.0


@dataclass(frozen=True, slots=True)
class Report:
    """One training step, as it was logged. `collapsed` is the mode that has driven out all others of late, if any."""

    step: int
    steps: int
    round: Round | None
    figures: Mapping[str, float]
    evaluation: Summary | None
    collapsed: str | None

    @property
    def modes(self) -> Mapping[str, float]:
        """The share of each mode among the choices of the step's episodes."""
        return mode_shares(self.figures)


class Trainer:
    """Trains `policies` on the problems of `environment`, and evaluates them on those of `evaluation`.

    The seats that no policy fills are filled by `partners`. `backend` opens each policy where it is to be trained: it
    is called with the policy, how many `updates` that will have, and the `temperature` of what it learns from.

    `folder` holds the whole run: `metrics.jsonl`, events for TensorBoard, `episodes/`, `policies/NAME/rK` (the weights
    after the K-th of a policy's rounds), `best/NAME` (of the evaluation with the best AES against the first one),
    `checkpoint.pt`, and beside it `states/` where a backend writes there. A run that was stopped goes on from there:
    all randomness comes from the seed and the number of the step, so it ends, bit for bit, as if it had not stopped.
    Where a process of a policy dies, all policies are opened anew, and the run goes on from there, too.

    `close`, or the end of a `with`, ends the processes that a backend has started.

    Raises InputError for seats without an agent, policies without a seat, groups that are too small to be compared,
    and a folder that holds another run.
    """

    def __init__(
        self,
        protocol: ReasoningProtocol,
        policies: Mapping[str, Policy],
        environment: Environment,
        evaluation: Environment,
        settings: TrainingSettings,
        folder: str | Path,
        *,
        partners: Mapping[str, Agent] | None = None,
        backend: Backend = EmbeddedPolicy,
    ) -> None:
        self.protocol, self.policies, self.settings, self.folder = protocol, policies, settings, Path(folder)
        self.environment, self.evaluation = environment, evaluation
        self._partners = dict(partners or {})
        self.rounds = parse_rounds(settings.rounds or "+".join(policies), settings.steps, tuple(policies))
        self._check()
        self.steps = self.rounds[-1].end
        self._backend = backend
        self._opened = ExitStack()
        self._training: Generator[Report, None, None] | None = None
        try:
            self._open()
        except PolicyDiedError as error:
            raise InputError(
                f"a policy's processes must live until the training begins; {error}: see to what ends them, most often "
                "too little memory, and run the same command again"
            ) from error
        try:
            # Not before the models are there: a slip in their path would leave the folder taken.
            claim(self.folder, self._run())
        except InputError:
            self.close()
            raise
        self._done = self._furthest = -1
        self._base: tuple[float, float] | None = None
        self._best = float("-inf")
        self._shares: deque[Mapping[str, float]] = deque(maxlen=COLLAPSED_FOR)
        self._deaths = 0
        self._begun: dict[int, asyncio.Task[list[Episode]]] = {}

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes of the policies, and a training that was left: at the end of Python it could not end."""
        if self._training is not None:
            self._training.close()
        self._opened.close()

    def train(self) -> Iterator[Report]:
        """Trains to the end, from where the run in the folder was, and reports each step.

        Step 0 is the first evaluation, before anything is learnt.
        """
        self._training = self._train_on()
        return self._training

    def _train_on(self) -> Generator[Report, None, None]:
        while self._done < self.steps:
            try:
                with asyncio.Runner() as runner:
                    yield from self._train(runner)
            except PolicyDiedError as error:
                self._reopen(error)

    def _train(self, runner: asyncio.Runner) -> Iterator[Report]:
        self._begun.clear()
        self._resume()
        if self._done >= 0:  # for those who ask the team before anything is played
            runner.run(self._publish())
        log = MetricsLog(self.folder, last=self._done)
        try:
            while self._done < self.steps:
                report = runner.run(self._step(self._done + 1))
                log.write(report.step, report.figures)
                self._done = report.step
                if report.step > self._furthest:  # what is done again is no progress
                    self._furthest, self._deaths = report.step, 0
                ends_round = report.round is None or report.step == report.round.end
                if ends_round or report.step % self.settings.checkpoint_every == 0:
                    self._save()
                yield report
        finally:
            log.close()

    def _open(self) -> None:
        """Has the backend open all policies, or none."""
        self.trained: dict[str, TrainedPolicy] = {}
        with ExitStack() as opened:
            for name, policy in self.policies.items():
                updates = self.settings.steps * sum(name in round.trains for round in self.rounds)
                trained = self._backend(policy, updates=updates, temperature=self.settings.temperature)
                opened.callback(trained.close)
                self.trained[name] = trained
                if self.settings.staleness and not trained.concurrent:
                    raise InputError(
                        "staleness needs engines that sample while the policies learn, which those of this backend do "
                        "not: train on OpenRLHF with vLLM, not colocated, or set staleness to 0"
                    )
            self._opened = opened.pop_all()

    def _reopen(self, error: PolicyDiedError) -> None:
        """Goes on after the death of a policy's process."""
        self._deaths += 1
        if self._deaths > LIVES:
            raise InputError(
                f"a step must be learnt from within {LIVES} tries; step {self._done + 1} was not ({error}): see to "
                "what ends the process, most often too little memory, and run the same command again"
            ) from error
        LOGGER.warning("%s: all policies are opened anew, and the run goes on from its last checkpoint", error)
        self._opened.close()
        try:
            self._open()
        except PolicyDiedError as another:
            self._reopen(another)

    def team(self, temperature: float) -> dict[str, Agent]:
        """All agents, the policies as they are now, at some temperature."""
        team = dict(self._partners)
        for name, policy in self.policies.items():
            agent = EngineAgent(self.trained[name].engine, temperature=temperature, name=name)
            team |= dict.fromkeys(policy.seats, agent)
        return team

    async def _step(self, step: int) -> Report:
        """Plays, learns, evaluates."""
        if step == 0:
            for name in self.policies:
                self._snapshot(name, step)
            summary, figures = await self._evaluate()
            return Report(0, self.steps, None, figures, summary, None)
        now = next(round for round in self.rounds if step <= round.end)
        episodes = await self._episodes(step)
        groups = self._groups(episodes)
        paid = [self.protocol.rewards(group, step) for group in groups]
        control = self.protocol.control_states
        figures = training_figures(groups, paid, control)
        figures["failed"] = float(len(episodes) - sum(map(len, groups)))
        credits = {
            name: assign_credit(
                groups, paid, self.policies[name].seats, estimator=self.settings.estimator,
                grouping=self.settings.grouping, skip_equal=self.settings.skip_equal,
            )
            for name in now.trains
        }  # fmt: skip
        learnt = await self._learn(step, credits)
        for name, credit in credits.items():
            counts = {"groups": credit.groups, "groups_equal": credit.equal, "groups_single": credit.single}
            figures |= {f"{name}/{figure}": value for figure, value in {**counts, **learnt[name]}.items()}
        if kept := self._kept(step):
            write_credit(kept / "credit.jsonl", groups, paid, list(credits.values()))
        self._shares.append(mode_shares(figures))
        if step == now.end:
            for name in now.trains:
                self._snapshot(name, step)
        evaluation = None
        if step == now.end or step % self.settings.evaluate_every == 0:
            evaluation, evaluated = await self._evaluate()
            figures |= evaluated
        collapsed = collapsed_mode(self._shares) if len(self._shares) == COLLAPSED_FOR else None
        return Report(step, self.steps, now, figures, evaluation, collapsed)

    async def _episodes(self, step: int) -> list[Episode]:
        """Those of a step. Where they may be stale, those of the next steps are begun, one step after the other."""
        for number in range(step, min(step + self.settings.staleness, self.steps) + 1):
            if number not in self._begun:
                self._begun[number] = asyncio.create_task(self._play(number))
        try:
            return await self._begun[step]
        finally:
            del self._begun[step]

    async def _learn(self, step: int, credits: Mapping[str, Credit]) -> dict[str, dict[str, float]]:
        """Has each policy learn from its own samples, all at the same time where they have processes of their own."""
        control, seed = self.protocol.control_states, self._seed("update", step)
        with self._watched(f"the update of step {step}"):
            found = await asyncio.gather(
                *(self.trained[name].update(credit.samples, control_states=control, seed=seed)
                  for name, credit in credits.items())
            )  # fmt: skip
            learnt = dict(zip(credits, found, strict=True))
            if self.settings.staleness:
                for name, credit in credits.items():
                    learnt[name] |= staleness_figures(credit.samples, self.trained[name].engine.version)
                await self._publish(interrupt=True)
        return learnt

    async def _play(self, step: int) -> list[Episode]:
        problems = problems_of_step(self.environment.problems, self.settings.problems, step, self.settings.seed)
        environment = Environment(self.environment.name, problems, self.environment.grader)
        settings, store = self.settings, None
        if folder := self._kept(step):
            shutil.rmtree(folder, ignore_errors=True)  # of a step that a kill cut short, and that is done again
            store = EpisodeStore(folder, {**self._run(), "step": step})
        with store or nullcontext(), self._watched(f"the rollout of step {step}"):
            return await self._roll_out(
                environment, settings.samples, settings.temperature, self._seed("play", step), store
            )

    def _kept(self, step: int) -> Path | None:
        """Where the episodes of a step are kept, with the credit for them; None where they are not."""
        keep = self.settings.keep_episodes
        return self.folder / "episodes" / f"{step:06}" if keep and step % keep == 0 else None

    async def _roll_out(
        self, environment: Environment, samples: int, temperature: float, seed: int, store: EpisodeStore | None = None
    ) -> list[Episode]:
        """All episodes at once, in the problems' order.

        At once, so that what is batched with what, on which the last bits of a log-probability depend, does not depend
        on how long grading takes. The engines forget what they have cached, for the same reason, and since weights may
        have changed.
        """
        if not self.settings.staleness:
            await self._publish()
        stream = rollout(
            self.protocol, self.team(temperature), environment, samples=samples, seed=seed, store=store,
            concurrency=len(environment.problems) * samples,
        )  # fmt: skip
        return in_order(environment, [episode async for episode in stream])

    async def _publish(self, *, interrupt: bool = False) -> None:
        await asyncio.gather(*(trained.publish(interrupt=interrupt) for trained in self.trained.values()))

    def _watched(self, stage: str) -> AbstractContextManager[None]:
        def waits_for() -> str:
            told = ((name, trained.waits_for()) for name, trained in self.trained.items())
            return "; ".join(f"{name}: {waiting}" for name, waiting in told if waiting) or "nobody else"

        return watching(stage, waits_for, self.settings.deadline)

    def _groups(self, episodes: Sequence[Episode]) -> list[list[Episode]]:
        """The episodes that ended in a grade, by problem."""
        graded = (episode for episode in episodes if episode.grade is not None)
        return [list(group) for _, group in groupby(graded, key=lambda episode: episode.transcript.problem.id)]

    async def _evaluate(self) -> tuple[Summary, dict[str, float]]:
        """Plays the evaluation's problems once each; saves the policies where they have never done better."""
        with self._watched("the evaluation"):
            episodes = await self._roll_out(
                self.evaluation, 1, self.settings.evaluation_temperature, self._seed("evaluate", 0)
            )
        summary = summarise(episodes)
        accuracy, tokens = self._base = self._base or (summary.accuracy, summary.tokens)
        score = summary.accuracy
        if accuracy:
            score = accuracy_efficiency_score(
                summary.accuracy, summary.tokens, base_accuracy=accuracy, base_tokens=tokens
            )
        if score > self._best:
            self._best = score
            for name in self.policies:
                self._save_weights(name, self.folder / "best" / name)
        return summary, {"evaluation/aes": score, **evaluation_figures(episodes, self.protocol.control_states)}

    def _snapshot(self, name: str, step: int) -> None:
        """Keeps the weights that a policy has after its rounds up to `step`."""
        rounds = sum(name in round.trains and round.end <= step for round in self.rounds)
        self._save_weights(name, self.folder / "policies" / name / f"r{rounds}")

    def _save_weights(self, name: str, folder: Path) -> None:
        write_whole(folder, self.trained[name].save_pretrained)

    def _save(self) -> None:
        """Writes a checkpoint. What policies write beside it stands in a folder of its own, until the next is whole."""
        states = self.folder / "states"
        mine = states / f"{self._done:06}"

        def write(path: Path) -> None:
            shutil.rmtree(mine, ignore_errors=True)  # of a run that was killed before its checkpoint was whole
            state: Checkpoint = {
                "run": self._run(),
                "step": self._done,
                "policies": {name: dict(trained.state(mine / name)) for name, trained in self.trained.items()},
                "base": self._base,
                "best": self._best,
                "shares": [dict(shares) for shares in self._shares],
            }
            torch.save(state, path)

        write_whole(self.folder / "checkpoint.pt", write)
        for older in states.glob("*"):
            if older != mine:
                shutil.rmtree(older, ignore_errors=True)

    def _resume(self) -> None:
        state = read_checkpoint(self.folder / "checkpoint.pt", self._run())
        if state is None:
            return
        for name, trained in self.trained.items():
            trained.load(state["policies"][name], self.folder / "states" / f"{state['step']:06}" / name)
        self._done, self._base, self._best = state["step"], state["base"], state["best"]
        self._shares.clear()
        self._shares.extend(state["shares"])

    def _run(self) -> Run:
        settings = self.settings.model_dump_json(exclude={"checkpoint_every", "keep_episodes", "deadline"})
        run = {
            "protocol": self.protocol.fingerprint,
            "environment": self.environment.fingerprint,
            "evaluation": self.evaluation.fingerprint,
            "settings": settings,
        }
        for name, policy in self.policies.items():
            run[f"policy {name}"] = f"{policy.model} in {', '.join(policy.seats)}: {policy.learner.model_dump_json()}"
        return run

    def _seed(self, what: str, step: int) -> int:
        return turn_seed(self.settings.seed, what, step, 0)

    def _check(self) -> None:
        settings, seats = self.settings, self.protocol.seats
        if settings.samples < 2:
            raise InputError(
                f"a group needs at least 2 samples to be its own baseline; got samples={settings.samples}: 8 is usual"
            )
        if settings.problems > len(self.environment.problems):
            raise InputError(
                f"a step plays {settings.problems} problems, but {self.environment.name} has "
                f"{len(self.environment.problems)}: ask for fewer a step"
            )
        if settings.staleness and (
            without := [n for n, p in self.policies.items() if not p.learner.loss.importance_cap]
        ):
            raise InputError(
                f"what is stale must be weighed by the version that it was sampled from; policies {without} have no "
                "loss.importance_cap: set it, to 2 say, or staleness to 0"
            )
        filled = [seat for policy in self.policies.values() for seat in policy.seats] + [*self._partners]
        for name, policy in self.policies.items():
            if not policy.seats or (strange := [seat for seat in policy.seats if seat not in seats]):
                got = strange if policy.seats else "none"
                raise InputError(f"policy {name!r} must fill seats of this protocol, of {list(seats)}; got {got}")
        if strange := [seat for seat in self._partners if seat not in seats]:
            raise InputError(f"partners must fill seats of this protocol, of {list(seats)}; got {strange}")
        if wrong := [seat for seat in seats if filled.count(seat) != 1]:
            raise InputError(
                f"each seat must be filled once, by a policy or a partner; seat(s) {wrong} are filled "
                f"{[filled.count(seat) for seat in wrong]} times"
            )


def problems_of_step(problems: Sequence[Problem], number: int, step: int, seed: int) -> list[Problem]:
    """The `number` problems that training step `step` (from 1) plays: each once an epoch, in an order of the epoch's.

    What does not fill the last step of an epoch is left out of it.
    """
    epoch, place = divmod(step - 1, len(problems) // number)
    order = random.Random(f"epoch {epoch} {seed}").sample(range(len(problems)), len(problems))
    return [problems[index] for index in order[place * number : (place + 1) * number]]
