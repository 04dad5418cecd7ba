"""Training the tiny models: who moves when, what is kept, and that a run which was stopped ends as one which was not.

Run as a script, this file is the process that the tests kill and whose disk they fill: see `Forge`.
"""

import asyncio
import hashlib
import json
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

import turnwise
from turnwise.agents.scripted import ScriptedAgent
from turnwise.agents.tiny import LONG, SHORT
from turnwise.agents.transformers_agent import TransformersEngine
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.environment import Environment, Grade, Grader, Outcome
from turnwise.environments.episode import Episode
from turnwise.environments.errors import InputError
from turnwise.environments.problem import Problem
from turnwise.environments.transcript import Turn
from turnwise.protocols.gated import Gated
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.rewards import Correctness, Reward, RewardSum, Term
from turnwise.rl.advantage import Sample
from turnwise.rl.credit_log import read_credit
from turnwise.rl.episode_store import read_episodes
from turnwise.rl.learner import LearnerSettings
from turnwise.rl.loss import LossSettings
from turnwise.rl.metrics import read_metrics
from turnwise.rl.rounds import Round
from turnwise.rl.trained_policy import EmbeddedPolicy, Policy, PolicyDiedError, TrainedPolicy
from turnwise.rl.trainer import Report, Trainer, TrainingSettings, problems_of_step

STEPS = 12
SETTINGS = TrainingSettings(
    rounds="long short long", steps=4, problems=2, samples=2, temperature=1.3, evaluate_every=3,
    checkpoint_every=2, keep_episodes=3,
)  # fmt: skip
# All that a checkpoint has to hold: schedules, a reference model, several optimiser steps an update.
LEARNERS = {
    "long": LearnerSettings(learning_rate=1e-3, schedule="linear", loss=LossSettings(kl_coefficient=0.05)),
    "short": LearnerSettings(learning_rate=1e-3, schedule="cosine", warmup=2, mini_batches=2),
}
POLICIES = {
    "long": Policy(LONG, ("long",), LEARNERS["long"]),
    "short": Policy(SHORT, ("short",), LEARNERS["short"]),
}
PROTOCOL = LongShort(max_turns=3, long_tokens=20, short_tokens=12)


class Boxed(Grader):
    """Right is what is boxed last, digit by digit."""

    async def grade(self, problem: Problem, text: str) -> Grade:
        found = re.findall(r"\\boxed\{(.*?)\}", text)
        if not found:
            return Grade(Outcome.UNPARSABLE)
        return Grade(Outcome.RIGHT if found[-1] == problem.answer else Outcome.WRONG, found[-1])


TRAIN = arithmetic(Boxed(), problem_set="mixed", count=10, split="train")
TEST = arithmetic(Boxed(), problem_set="easy", count=4)


def build(folder: Path, **changes: object) -> Trainer:
    """Two tiny models that learn in turns; `changes` are of the settings."""
    return Trainer(PROTOCOL, POLICIES, TRAIN, TEST, SETTINGS.model_copy(update=changes), folder)


class Forge:
    """A process that has imported all it needs, and plays each run in a fork of itself.

    A run is then what a new process would do, without the seconds that it takes to import torch.
    """

    def __init__(self, told: Path) -> None:
        self.told = told
        environment = {**os.environ, "PYTHONPATH": str(Path(turnwise.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        with told.open("w") as complaints:
            self._process = subprocess.Popen(
                [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=complaints, text=True,
            )  # fmt: skip

    def run(self, folder: Path, **job: float | str) -> tuple[int, list[str]]:
        """The exit code of a run, and a line for each step that it reported, and for what it complained of.

        It is killed `delay` seconds after `reports` steps, or at the next one; from step `after` on no file may grow
        over `limit` bytes (0: over what TensorBoard has of events by then); it stops of itself after step `until`.
        """
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"folder": str(folder), **job}) + "\n")
        self._process.stdin.flush()
        code, lines = json.loads(self._process.stdout.readline())
        assert code != 1, self.told.read_text()
        return code, lines

    def close(self) -> None:
        self._process.communicate(timeout=600)


def forge_run(job: Mapping[str, float | str]) -> tuple[int, list[str]]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os._exit(in_fork(writing, job))
    os.close(writing)
    with os.fdopen(reading) as told:
        lines = [told.readline() for _ in range(int(job.get("reports", 0)))]
        if "delay" in job:
            select.select([told], [], [], float(job["delay"]))
            os.kill(child, signal.SIGKILL)
        lines += told.readlines()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), [line.strip() for line in lines]


def in_fork(told: int, job: Mapping[str, float | str]) -> int:
    folder = Path(str(job["folder"]))
    try:
        for count, report in enumerate(build(folder).train()):
            os.write(told, f"{report.step}\n".encode())
            if report.step == job.get("after"):
                (events,) = (folder / "tensorboard").iterdir()
                limit = int(job["limit"]) or events.stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            if report.step == job.get("until"):
                return 0
            if "delay" in job and count == job["reports"]:
                signal.pause()  # its end comes late
    except InputError as error:
        os.write(told, f"{error}\n".encode())
        return 2
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


@dataclass(frozen=True)
class Whole:
    """A run that was never stopped: its reports, the fingerprints of all weights after each, and its pace."""

    folder: Path
    reports: Sequence[Report]
    weights: Sequence[Mapping[str, str]]
    seconds_a_step: float


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """What is compared bit by bit is summed in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole") / "run"
    trainer = build(folder)
    start, reports, weights = time.perf_counter(), list[Report](), list[Mapping[str, str]]()
    for report in trainer.train():
        reports.append(report)
        weights.append(fingerprints(trainer))
    return Whole(folder, reports, weights, (time.perf_counter() - start) / len(reports))


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    forge = Forge(tmp_path_factory.mktemp("forge") / "stderr")
    yield forge
    forge.close()


def fingerprint(state: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b()
    for name in sorted(state):
        digest.update(name.encode() + state[name].numpy().tobytes())
    return digest.hexdigest()


def fingerprints(trainer: Trainer) -> dict[str, str]:
    """Of the weights of each policy."""
    return {name: fingerprint(trained.engine.model.state_dict()) for name, trained in trainer.trained.items()}


def saved(folder: Path) -> str:
    """The fingerprint of a checkpoint of transformers."""
    return fingerprint(load_file(folder / "model.safetensors"))


def tree(folder: Path) -> dict[str, object]:
    """All that a run has written, by file; of TensorBoard's events, which have the time in them, nothing."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "tensorboard")
    return {str(path.relative_to(folder)): content(path) for path in files}


def content(path: Path) -> object:
    """What is in a file; of a checkpoint's, how strings are shared is no part of it."""
    if path.suffix == ".pt":
        return plain(torch.load(path, weights_only=True))
    return hashlib.blake2b(path.read_bytes()).hexdigest() if path.suffix == ".safetensors" else path.read_bytes()


def plain(value: object) -> object:
    """A state with fingerprints in place of tensors."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.shape, hashlib.blake2b(value.numpy().tobytes()).hexdigest()
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Each figure that TensorBoard shows, as (step, value)."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def name_events(folder: Path, number: int) -> None:
    """TensorBoard reads files by their names, in which the time is in whole seconds."""
    for path in (folder / "tensorboard").glob("*.[!n]*"):
        if "numbered" not in path.name:
            path.rename(path.with_name(f"events.out.tfevents.{number:010}.numbered"))


# Who moves when, and what is kept


def test_the_figures_are_logged_as_they_were_reported(whole: Whole) -> None:
    assert [report.step for report in whole.reports] == list(range(STEPS + 1))
    assert {report.steps for report in whole.reports} == {STEPS}
    assert read_metrics(whole.folder) == [{"step": report.step, **report.figures} for report in whole.reports]
    shown = scalars(whole.folder)
    assert set(shown) == {name for report in whole.reports for name in report.figures}
    for name, points in shown.items():
        logged = {report.step: report.figures[name] for report in whole.reports if name in report.figures}
        assert len(points) == len(logged)
        assert dict(points) == pytest.approx(logged, rel=1e-6)


def test_the_partner_of_a_round_stands_still_and_who_trains_moves(whole: Whole) -> None:
    rounds = ["long"] * 4 + ["short"] * 4 + ["long"] * 4
    assert [report.round and report.round.trains for report in whole.reports] == [None, *((name,) for name in rounds)]
    for report, (before, after) in zip(whole.reports[1:], pairwise(whole.weights), strict=True):
        (trains,) = report.round.trains if report.round else ()
        frozen = "short" if trains == "long" else "long"
        assert after[frozen] == before[frozen]
        assert not any(name.startswith(f"{frozen}/") for name in report.figures)
        assert report.figures[f"{trains}/groups"] == 2
        assert (after[trains] != before[trains]) == (report.figures.get(f"{trains}/trained_tokens", 0) > 0)
    for start, end in pairwise(range(0, STEPS + 1, 4)):
        assert sum(whole.weights[start][name] != whole.weights[end][name] for name in POLICIES) == 1


def test_the_trainer_computes_the_log_probabilities_that_were_sampled_from(whole: Whole) -> None:
    mismatches = [value for report in whole.reports for name, value in report.figures.items() if "mismatch" in name]
    assert len(mismatches) > STEPS / 2
    assert all(value < 1e-5 for value in mismatches), mismatches


def test_the_reference_is_the_model_before_training(whole: Whole) -> None:
    divergence = [report.figures["long/kl"] for report in whole.reports if "long/kl" in report.figures]
    assert divergence[0] == 0
    assert all(value > 0 for value in divergence[1:])


def test_after_each_of_its_rounds_the_weights_of_a_policy_are_kept(whole: Whole) -> None:
    kept = {
        name: {path.name: saved(path) for path in sorted((whole.folder / "policies" / name).iterdir())}
        for name in POLICIES
    }
    assert kept == {
        "long": {f"r{number}": whole.weights[step]["long"] for number, step in enumerate((0, 4, 12))},
        "short": {f"r{number}": whole.weights[step]["short"] for number, step in enumerate((0, 8))},
    }
    shipped = {key: tensor.float() for key, tensor in load_file(LONG / "model.safetensors").items()}
    assert kept["long"]["r0"] == fingerprint(shipped)


def test_evaluations_come_every_few_steps_and_at_the_end_of_each_round_and_the_best_is_kept(whole: Whole) -> None:
    evaluated = {report.step: report for report in whole.reports if report.evaluation is not None}
    assert list(evaluated) == [0, 3, 4, 6, 8, 9, 12]
    base = evaluated[0].evaluation
    assert base
    scores = {}
    for step, report in evaluated.items():
        assert report.evaluation
        assert report.evaluation.episodes == 4
        assert report.figures["evaluation/right"] == report.evaluation.accuracy
        assert report.figures["evaluation/tokens"] == report.evaluation.tokens
        gained = (report.evaluation.accuracy - base.accuracy) / base.accuracy
        scores[step] = 1 - report.evaluation.tokens / base.tokens + (3 if gained >= 0 else 5) * gained
        assert report.figures["evaluation/aes"] == pytest.approx(scores[step], abs=1e-12)
    assert not any("evaluation/aes" in report.figures for report in whole.reports if report.step not in evaluated)
    best = max(scores, key=lambda step: scores[step])
    assert 0 < best < STEPS, "the run must be one whose best is neither its first nor its last"
    assert {name: saved(whole.folder / "best" / name) for name in POLICIES} == whole.weights[best]


def test_of_every_third_step_the_episodes_are_kept(whole: Whole) -> None:
    folders = sorted((whole.folder / "episodes").iterdir())
    assert [folder.name for folder in folders] == ["000003", "000006", "000009", "000012"]
    seeds = set[int]()
    for step, folder in zip(range(3, 13, 3), folders, strict=True):
        episodes = list(read_episodes(folder / "episodes.jsonl"))
        problems = problems_of_step(TRAIN.problems, 2, step, 0)
        assert sorted(one.id for one in episodes) == sorted(f"{p.id}#{n}" for p in problems for n in range(2))
        figures = whole.reports[step].figures
        assert sum(one.right for one in episodes) / 4 == figures["right"]
        assert sum(one.transcript.token_count for one in episodes) / 4 == pytest.approx(figures["tokens"])
        seeds |= {one.seed for one in episodes}
        learnt = {name: sum(name in r.round.trains for r in whole.reports[1:step] if r.round) for name in POLICIES}
        for turn in (turn for one in episodes for turn in one.transcript.steps):
            assert turn.reply.model == turn.seat
            assert turn.reply.version == learnt[turn.seat], "the policy that spoke is the one that had learnt so far"
            assert len(turn.reply.log_probabilities) == turn.reply.token_count
        assert json.loads((folder / "run.json").read_text())["step"] == step
    assert len(seeds) == 4


# Stopped and taken up again


def test_kill_9_ten_times_changes_nothing(tmp_path: Path, whole: Whole, forge: Forge) -> None:
    rng, folder, first = random.Random(3), tmp_path / "run", list[int]()
    for number in range(10):
        code, told = forge.run(
            folder, reports=rng.choice((0, 0, 1, 1, 2)), delay=rng.uniform(0, max(0.1, whole.seconds_a_step))
        )
        assert code == -signal.SIGKILL, "it had ended before it was killed"
        first += [int(told[0])] if told else []
        if (folder / "tensorboard").exists():
            name_events(folder, number)
    code, told = forge.run(folder)
    assert code == 0, told
    name_events(folder, 10)
    first.append(int(told[0]))
    assert first == sorted(first)
    assert len(set(first)) > 3, f"runs went on from steps {first}"
    assert [line["step"] for line in read_metrics(folder)] == list(range(STEPS + 1))
    assert tree(folder) == tree(whole.folder)
    assert scalars(folder) == scalars(whole.folder)


def test_a_run_that_is_left_goes_on_in_the_same_process_and_in_another(tmp_path: Path, whole: Whole) -> None:
    folder = tmp_path / "run"
    trainer = build(folder)
    leave_after(trainer, 7)
    # What a kill may leave: drafts, a line and an episode that are torn, and a step that the checkpoint is before.
    (folder / "checkpoint.pt.draft").write_bytes(b"PK")
    (folder / "metrics.jsonl.draft").write_bytes(b"{")
    (folder / "policies" / "short" / "r1.draft").mkdir()
    (folder / "policies" / "short" / "r1.draft" / "model.safetensors").write_bytes(b"torn")
    shutil.copytree(folder / "episodes" / "000006", folder / "episodes" / "000009")
    with (folder / "metrics.jsonl").open("ab") as metrics:
        metrics.write(b'{"step":8,"ri')
    with (folder / "episodes" / "000006" / "episodes.jsonl").open("ab") as episodes:
        episodes.write(b'{"id":"torn')
    name_events(folder, 0)
    first = leave_after(trainer, 10)
    assert first == 7, "step 6 was the last that was saved"
    name_events(folder, 1)
    other = build(folder, checkpoint_every=7)  # which is no part of what the run is
    assert [report.step for report in other.train()] == list(range(11, STEPS + 1))
    name_events(folder, 2)
    assert fingerprints(other) == whole.weights[-1]
    found, expected = tree(folder), tree(whole.folder)
    torn = found.pop("episodes/000006/episodes.jsonl")
    assert isinstance(torn, bytes)
    assert torn.removesuffix(b'{"id":"torn') == expected.pop("episodes/000006/episodes.jsonl")
    assert found == expected
    assert scalars(folder) == scalars(whole.folder)
    done = build(folder)
    assert list(done.train()) == [], "it is done"
    versions = {name: trained.engine.version for name, trained in other.trained.items()}
    assert {name: trained.engine.version for name, trained in done.trained.items()} == versions


def test_a_training_that_is_left_ends_with_its_trainer(tmp_path: Path) -> None:
    with build(tmp_path / "run") as trainer:
        reports = trainer.train()
        assert [next(reports).step for _ in range(2)] == [0, 1]
    assert list(reports) == []


class Filed(EmbeddedPolicy):
    """Keeps its state in a file of its own, as a backend does whose state is too large for one process."""

    def state(self, folder: Path) -> Mapping[str, object]:
        folder.mkdir(parents=True)
        torch.save(super().state(folder), folder / "state.pt")
        return {"file": "state.pt"}

    def load(self, state: Mapping[str, object], folder: Path) -> None:
        super().load(torch.load(folder / str(state["file"]), weights_only=True), folder)


def test_a_backend_that_writes_its_own_state_goes_on_from_it(tmp_path: Path, whole: Whole) -> None:
    folder = tmp_path / "run"

    def filed() -> Trainer:
        return Trainer(PROTOCOL, POLICIES, TRAIN, TEST, SETTINGS, folder, backend=Filed)

    leave_after(filed(), 7)
    assert [path.name for path in (folder / "states").iterdir()] == ["000006"]
    assert {path.name for path in (folder / "states" / "000006").iterdir()} == set(POLICIES)
    (folder / "states" / "000008" / "long").mkdir(parents=True)  # as a kill may leave it
    again = filed()
    assert [report.step for report in again.train()] == list(range(7, STEPS + 1))
    assert fingerprints(again) == whole.weights[-1]
    assert [path.name for path in (folder / "states").iterdir()] == [f"{STEPS:06}"]


class Mortal(EmbeddedPolicy):
    """Dies in those of all updates that it is told to, and in those of all openings."""

    updates: ClassVar[int]
    dies_in: ClassVar[Container[int]]
    openings: ClassVar[int]
    dies_opened: ClassVar[Container[int]]

    @classmethod
    def will_die(cls, *, updates: Container[int] = (), openings: Container[int] = ()) -> None:
        cls.updates, cls.dies_in, cls.openings, cls.dies_opened = 0, updates, 0, openings

    def __init__(self, policy: Policy, *, updates: int, temperature: float) -> None:
        Mortal.openings += 1
        if Mortal.openings in Mortal.dies_opened:
            raise PolicyDiedError("a rank died")
        super().__init__(policy, updates=updates, temperature=temperature)

    async def update(
        self, samples: Sequence[Sample], *, control_states: Collection[str], seed: int
    ) -> dict[str, float]:
        Mortal.updates += 1
        if Mortal.updates in Mortal.dies_in:
            raise PolicyDiedError("a rank died")
        return await super().update(samples, control_states=control_states, seed=seed)


def test_where_a_process_dies_all_are_opened_anew_and_the_run_ends_as_if_none_had(
    tmp_path: Path, whole: Whole, caplog: pytest.LogCaptureFixture
) -> None:
    Mortal.will_die(updates=(4, 10, 11), openings=(8,))
    trainer = Trainer(PROTOCOL, POLICIES, TRAIN, TEST, SETTINGS, tmp_path / "run", backend=Mortal)
    steps = [report.step for report in trainer.train()]
    # It is saved after each second step, and dies in step 4, in step 8, as it is opened anew, and then in step 7.
    assert steps == [0, 1, 2, 3, 3, 4, 5, 6, 7, *range(7, STEPS + 1)]
    assert (
        caplog.messages
        == ["a rank died: all policies are opened anew, and the run goes on from its last checkpoint"] * 4
    )
    assert fingerprints(trainer) == whole.weights[-1]
    assert tree(tmp_path / "run") == tree(whole.folder)


def test_a_process_that_dies_again_and_again_ends_the_run(tmp_path: Path) -> None:
    """Also where it takes up a checkpoint, and gets some way, each time."""
    Mortal.will_die(updates=range(4, 100, 2))
    reports = Trainer(PROTOCOL, POLICIES, TRAIN, TEST, SETTINGS, tmp_path / "run", backend=Mortal).train()
    with pytest.raises(
        InputError, match=r"within 3 tries; step 4 was not \(a rank died\): see to what ends the process"
    ):
        list(reports)
    assert Mortal.updates == 10
    Mortal.will_die(openings=(2,))
    with pytest.raises(InputError, match="must live until the training begins; a rank died: see to what ends them"):
        Trainer(PROTOCOL, POLICIES, TRAIN, TEST, SETTINGS, tmp_path / "other", backend=Mortal)
    assert not (tmp_path / "other").exists()


def leave_after(trainer: Trainer, step: int) -> int:
    """Trains up to a step, and says which was the first."""
    reports = trainer.train()
    steps = [next(report.step for report in reports)]
    while steps[-1] < step:
        steps.append(next(reports).step)
    reports.close()  # type: ignore[attr-defined]
    return steps[0]


# Stale episodes


class Apart(TrainedPolicy):
    """Learns in a thread, on a copy of the model that is sampled from."""

    concurrent = True

    def __init__(self, policy: Policy, *, updates: int, temperature: float) -> None:
        self.learner = EmbeddedPolicy(policy, updates=updates, temperature=temperature)
        self.engine = TransformersEngine.load(policy.model, dtype=torch.float32)

    async def update(
        self, samples: Sequence[Sample], *, control_states: Collection[str], seed: int
    ) -> dict[str, float]:
        learn = self.learner.update(samples, control_states=control_states, seed=seed)
        return await asyncio.to_thread(asyncio.run, learn)

    async def publish(self, *, interrupt: bool = False) -> None:
        await self.learner.publish()
        self.engine.model.load_state_dict(self.learner.engine.model.state_dict())
        self.engine.version = self.learner.engine.version

    def save_pretrained(self, folder: Path) -> None:
        self.learner.save_pretrained(folder)

    def state(self, folder: Path) -> Mapping[str, object]:
        return self.learner.state(folder)

    def load(self, state: Mapping[str, object], folder: Path) -> None:
        self.learner.load(state, folder)


def test_stale_episodes_are_those_of_each_step_and_not_staler_than_they_may_be(tmp_path: Path) -> None:
    capped = LearnerSettings(learning_rate=1e-4, loss=LossSettings(importance_cap=2.0))
    policies = {name: replace(policy, learner=capped) for name, policy in POLICIES.items()}
    settings = SETTINGS.model_copy(update={"rounds": "long+short", "steps": 6, "staleness": 2, "keep_episodes": 1})

    def build_stale() -> Trainer:
        return Trainer(PROTOCOL, policies, TRAIN, TEST, settings, tmp_path / "run", backend=Apart)

    leave_after(build_stale(), 3)
    trainer = build_stale()
    assert [report.step for report in trainer.train()] == [3, 4, 5, 6], "step 2 was the last that was saved"
    logged = read_metrics(tmp_path / "run")
    assert [step["step"] for step in logged] == list(range(7))
    for name in POLICIES:
        lags = [step[f"{name}/staleness/most"] for step in logged[1:]]
        assert max(lags) == 2
        assert lags[0] == 0, "nothing is older"
        assert all(step[f"{name}/staleness"] <= lag for step, lag in zip(logged[1:], lags, strict=True))
        assert trainer.trained[name].engine.version == 6
    for step in range(1, 7):
        episodes = list(read_episodes(tmp_path / "run" / "episodes" / f"{step:06}" / "episodes.jsonl"))
        expected = [problem.id for problem in problems_of_step(TRAIN.problems, 2, step, 0) for _ in range(2)]
        assert sorted(episode.transcript.problem.id for episode in episodes) == sorted(expected)
        assert {step.reply.version for e in episodes for step in e.transcript.steps} <= set(range(step))


def test_staleness_needs_an_engine_beside_the_learner_and_a_correction(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"policies \['long', 'short'\] have no loss.importance_cap: set it, to 2 say"):
        build(tmp_path / "run", staleness=1)
    capped = LearnerSettings(loss=LossSettings(importance_cap=2.0))
    policies = {name: replace(policy, learner=capped) for name, policy in POLICIES.items()}
    with pytest.raises(InputError, match="staleness needs engines that sample while the policies learn"):
        Trainer(PROTOCOL, policies, TRAIN, TEST, SETTINGS.model_copy(update={"staleness": 1}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Other runs


def test_another_seed_is_another_run(tmp_path: Path, whole: Whole) -> None:
    other = build(tmp_path / "run", seed=1)
    reports = other.train()
    next(reports)
    assert fingerprints(other) == whole.weights[0]
    assert next(reports).figures != whole.reports[1].figures
    after = fingerprints(other)
    assert after["long"] != whole.weights[1]["long"]
    assert after["short"] == whole.weights[0]["short"]
    reports.close()  # type: ignore[attr-defined]


def test_in_a_round_of_both_both_move(tmp_path: Path, whole: Whole) -> None:
    trainer = build(tmp_path / "run", rounds="", steps=1)
    assert trainer.rounds == [Round(1, ("long", "short"), 1)]
    _, report = trainer.train()
    after = fingerprints(trainer)
    assert after["long"] != whole.weights[0]["long"]
    assert after["short"] != whole.weights[0]["short"]
    assert {path.name for path in (tmp_path / "run" / "policies").glob("*/*")} == {"r0", "r1"}
    assert {name: saved(tmp_path / "run" / "policies" / name / "r1") for name in POLICIES} == after
    assert report.figures["long/groups"] == report.figures["short/groups"] == 2


def test_one_policy_in_two_seats_learns_from_what_both_said(tmp_path: Path) -> None:
    policies = {"both": Policy(LONG, ("long", "short"), LearnerSettings(learning_rate=1e-3))}
    settings = SETTINGS.model_copy(update={"rounds": "", "steps": 1, "keep_episodes": 1, "samples": 3})
    trainer = Trainer(PROTOCOL, policies, TRAIN, TEST, settings, tmp_path / "run")
    team = trainer.team(1.0)
    assert team["long"] is team["short"]
    before = fingerprints(trainer)
    _, report = trainer.train()
    assert fingerprints(trainer) != before
    assert report.figures["both/groups"] == 4, "two problems, for each seat by itself"
    said = {
        seat: sum(
            turn.reply.token_count
            for one in read_episodes(tmp_path / "run" / "episodes" / "000001" / "episodes.jsonl")
            for turn in one.transcript.steps
            if turn.seat == seat
        )
        for seat in PROTOCOL.seats
    }
    assert report.figures["both/groups_equal"] == report.figures["both/groups_single"] == 0
    assert report.figures["both/trained_tokens"] == said["long"] + said["short"]
    assert {turn.reply.model for turn in next(episodes_of(tmp_path / "run")).transcript.steps} == {"both"}
    credit = read_credit(tmp_path / "run" / "episodes" / "000001" / "credit.jsonl")
    assert {one.id: len(one.transcript.steps) for one in episodes_of(tmp_path / "run")} == {
        id: len(one.advantages) for id, one in credit.items()
    }
    assert None not in {advantage for one in credit.values() for advantage in one.advantages}
    assert {seat for one in credit.values() for seat in one.rewards} == {"long", "short"}


def episodes_of(folder: Path) -> Iterator[Episode]:
    return (one for path in sorted(folder.rglob("episodes.jsonl")) for one in read_episodes(path))


def scripted(
    folder: Path, say: Callable[[Turn], str], *, samples: int = 3, problems: int = 2, steps: int = 1
) -> Trainer:
    """The long model learns, and the short one's lines are written."""
    settings = SETTINGS.model_copy(
        update={"rounds": "", "steps": steps, "samples": samples, "problems": problems, "keep_episodes": 1}
    )
    partners = {"short": ScriptedAgent(lambda turn, _: say(turn))}
    return Trainer(PROTOCOL, {"long": POLICIES["long"]}, TRAIN, TEST, settings, folder, partners=partners)


def test_a_partner_that_is_a_script_plays_along_and_does_not_learn(tmp_path: Path) -> None:
    trainer = scripted(tmp_path / "run", lambda turn: "<answer>It is \\boxed{7}.</answer>")
    before = fingerprints(trainer)
    first, report = trainer.train()
    assert fingerprints(trainer) != before
    sevens = sum(problem.answer == "7" for problem in TEST.problems) / 4
    assert first.figures["evaluation/right"] == sevens
    assert not any(name.startswith("short/") for name in report.figures)
    assert "reward/short" in report.figures
    assert {path.name for path in (tmp_path / "run" / "policies").iterdir()} == {"long"}
    for one in episodes_of(tmp_path / "run"):
        assert [(turn.seat, turn.reply.model) for turn in one.transcript.steps] == [
            ("long", "long"), ("short", "scripted short"),
        ]  # fmt: skip


def test_a_policy_that_was_never_heard_stands_still_and_a_mode_that_is_always_chosen_raises_the_alarm(
    tmp_path: Path,
) -> None:
    settings = TrainingSettings(steps=6, problems=1, samples=2, evaluate_every=6, checkpoint_every=1, keep_episodes=0)
    partners = {"router": ScriptedAgent(lambda turn, seed: "<short>")}

    def trainer() -> Trainer:
        return Trainer(Gated(PROTOCOL), POLICIES, TRAIN, TEST, settings, tmp_path, partners=partners)

    first = trainer()
    before, reports = fingerprints(first), first.train()
    assert [next(reports).collapsed for _ in range(4)] == [None] * 4
    reports.close()  # type: ignore[attr-defined]
    reports = first.train()
    assert [next(reports).collapsed for _ in range(2)] == [None, "<short>"]
    reports.close()  # type: ignore[attr-defined]
    assert fingerprints(first)["long"] == before["long"]
    again = trainer()
    (last,) = again.train()
    assert (last.step, last.collapsed, last.modes) == (6, "<short>", {"<short>": 1.0})
    assert (last.figures["long/groups"], last.figures["short/groups"]) == (0, 1)
    assert fingerprints(again)["long"] == before["long"]
    assert not (tmp_path / "episodes").exists()


def test_an_episode_that_fails_is_left_out_of_what_is_learnt(tmp_path: Path) -> None:
    failed = list[str]()

    def say(turn: Turn) -> str:
        question = turn.messages[1].text
        if not failed and question in {problem.question for problem in TRAIN.problems}:
            failed.append(question)
            raise KeyError("no line")
        return "<answer>\\boxed{7}</answer>"

    _, report = scripted(tmp_path / "run", say, samples=2, problems=6).train()
    assert report.figures["failed"] == 1
    (bad,) = [one for one in episodes_of(tmp_path / "run") if one.error]
    assert (bad.error, [turn.seat for turn in bad.transcript.steps]) == ("KeyError: 'no line'", ["long"])
    assert report.figures["long/groups_single"] == 1, "what is left of its group has nobody to be compared with"
    assert report.figures["long/groups"] == 6


# Problems


class TestProblemsOfStep:
    problems: ClassVar = [Problem(f"p{number}", "?", "!") for number in range(7)]

    def test_an_epoch_as_literals(self) -> None:
        ids = [[one.id for one in problems_of_step(self.problems, 3, step, 0)] for step in (1, 2, 3, 4)]
        assert ids == [["p0", "p6", "p2"], ["p3", "p1", "p5"], ["p2", "p4", "p3"], ["p5", "p6", "p1"]]

    @given(st.integers(1, 7), st.integers(0, 5), st.integers(0, 3))
    def test_each_is_played_at_most_once_an_epoch(self, number: int, epoch: int, seed: int) -> None:
        steps = 7 // number
        played = [
            problem.id
            for step in range(epoch * steps + 1, (epoch + 1) * steps + 1)
            for problem in problems_of_step(self.problems, number, step, seed)
        ]
        assert len(set(played)) == len(played) == steps * number

    def test_epochs_and_seeds_have_orders_of_their_own(self) -> None:
        def order(seed: int, epoch: int) -> tuple[str, ...]:
            steps = range(7 * epoch + 1, 7 * epoch + 8)
            return tuple(one.id for step in steps for one in problems_of_step(self.problems, 1, step, seed))

        orders = {order(seed, epoch) for seed in range(3) for epoch in range(3)}
        assert len(orders) == 9
        assert all(sorted(one) == [f"p{number}" for number in range(7)] for one in orders)


# What cannot be


@pytest.mark.parametrize(
    ("changes", "policies", "message"),
    [
        (
            {"samples": 1},
            POLICIES,
            "a group needs at least 2 samples to be its own baseline; got samples=1: 8 is usual",
        ),
        (
            {"problems": 11},
            POLICIES,
            "a step plays 11 problems, but arithmetic-mixed has 10: ask for fewer a step",
        ),
        (
            {"rounds": "long judge"},
            POLICIES,
            "rounds name who trains in each, of ['long', 'short'], joined by + where several do; got ['judge'] in "
            "'long judge'",
        ),
        ({"rounds": " "}, POLICIES, "training needs at least one round, such as 'long+short'; got ' '"),
        (
            {"rounds": ""},
            {**POLICIES, "judge": Policy(LONG, ("judge",))},
            "policy 'judge' must fill seats of this protocol, of ['long', 'short']; got ['judge']",
        ),
        (
            {"rounds": ""},
            {**POLICIES, "spare": Policy(LONG, ())},
            "policy 'spare' must fill seats of this protocol, of ['long', 'short']; got none",
        ),
        (
            {"rounds": ""},
            {**POLICIES, "other": Policy(LONG, ("short",))},
            "each seat must be filled once, by a policy or a partner; seat(s) ['short'] are filled [2] times",
        ),
        (
            {"rounds": ""},
            {"both": Policy(LONG, ("long", "short", "long"))},
            "each seat must be filled once, by a policy or a partner; seat(s) ['long'] are filled [2] times",
        ),
        (
            {"rounds": ""},
            {"long": POLICIES["long"]},
            "each seat must be filled once, by a policy or a partner; seat(s) ['short'] are filled [0] times",
        ),
        ({"rounds": ""}, {}, "training needs at least one round, such as ''; got ''"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained(
    tmp_path: Path, changes: Mapping[str, object], policies: Mapping[str, Policy], message: str
) -> None:
    with pytest.raises(InputError) as error:
        Trainer(PROTOCOL, policies, TRAIN, TEST, SETTINGS.model_copy(update=changes), tmp_path / "run")
    assert str(error.value) == message
    assert not (tmp_path / "run").exists()


def test_a_partner_for_no_seat(tmp_path: Path) -> None:
    partners = {"judge": ScriptedAgent(["fine"])}
    with pytest.raises(InputError, match=r"^partners must fill seats .* of \['long', 'short'\]; got \['judge'\]$"):
        Trainer(PROTOCOL, POLICIES, TRAIN, TEST, SETTINGS, tmp_path / "run", partners=partners)


def test_a_seat_that_a_policy_and_a_partner_fill(tmp_path: Path) -> None:
    partners = {"short": ScriptedAgent(["<answer>"])}
    with pytest.raises(InputError, match=r"seat\(s\) \['short'\] are filled \[2\] times$"):
        Trainer(PROTOCOL, POLICIES, TRAIN, TEST, SETTINGS, tmp_path / "run", partners=partners)


@pytest.mark.parametrize(
    "settings",
    [{"steps": 0}, {"samples": 0}, {"temperature": 0}, {"evaluate_every": 0}, {"episodes": 3}, {"seed": "x"}],
)
def test_settings_that_make_no_sense(settings: dict[str, object]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=rf"1 validation error for TrainingSettings\n{name}\n"):
        TrainingSettings.model_validate(settings)


class PaysNaN(LongShort):
    """Pays by hand, and carelessly."""

    def rewards(self, group: Sequence[Episode], step: int = 0) -> list[Mapping[str, Reward]]:
        return [{seat: Reward({"bonus": math.nan if one.sample else 1.0}) for seat in self.seats} for one in group]


class Divides(Term):
    """0 / 0."""

    name: ClassVar[str] = "per answer"

    def pay(self, group: Sequence[Episode], seat: str) -> list[float]:
        return [math.nan for _ in group]


def stops_at_step_1(trainer: Trainer) -> str:
    """What it complains of in its first step; the weights are what they were, and so is the run."""
    before, reports = fingerprints(trainer), trainer.train()
    assert next(reports).step == 0
    saved_run = tree(trainer.folder)
    with pytest.raises(InputError) as error:
        next(reports)
    assert fingerprints(trainer) == before
    assert {name: entry for name, entry in tree(trainer.folder).items() if "episodes" not in name} == saved_run
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_reward_that_is_no_number(tmp_path: Path) -> None:
    protocol = PaysNaN(max_turns=2, long_tokens=4, short_tokens=4)
    complaint = stops_at_step_1(Trainer(protocol, POLICIES, TRAIN, TEST, SETTINGS, tmp_path / "run"))
    first = problems_of_step(TRAIN.problems, 2, 1, 0)[0]
    assert complaint == (
        f"a reward must be a finite number; seat 'long' was paid nan for '{first.id}#1': mend the protocol's reward"
    )


def test_a_term_that_is_no_number(tmp_path: Path) -> None:
    reward = RewardSum((Correctness(), Divides()))
    protocol = LongShort(max_turns=2, long_tokens=4, short_tokens=4, reward=reward)
    complaint = stops_at_step_1(Trainer(protocol, POLICIES, TRAIN, TEST, SETTINGS, tmp_path / "run"))
    assert re.match(
        r"a reward must be finite; seat 'long' in episode '\S+#0' got \{'correctness': \d\.0, 'per answer': nan\}: ",
        complaint,
    )


def test_a_step_of_which_all_episodes_fail(tmp_path: Path) -> None:
    def say(turn: Turn) -> str:
        if turn.messages[1].text in {problem.question for problem in TRAIN.problems}:
            raise KeyError("no line")
        return "<answer>\\boxed{7}</answer>"

    complaint = stops_at_step_1(scripted(tmp_path / "run", say))
    assert re.fullmatch(
        r"6 of 6 episodes failed, over the allowed share of 10%; the first: arithmetic-\S+#\d: KeyError: 'no line'",
        complaint,
    )


def test_a_folder_of_another_run_is_left_alone(whole: Whole) -> None:
    before = tree(whole.folder)
    with pytest.raises(InputError) as error:
        build(whole.folder, seed=1)
    assert re.fullmatch(
        r".* holds another run \(settings: '\{.*\"seed\":0.*\}' there, '\{.*\"seed\":1.*\}' here\); choose another "
        r"folder or remove it",
        str(error.value),
    )
    with pytest.raises(
        InputError, match=r"holds another run \(protocol: 'LongShort \w+' there, 'LongShort \w+' here\);"
    ):
        Trainer(LongShort(), POLICIES, TRAIN, TEST, SETTINGS, whole.folder)
    other = {**POLICIES, "short": replace(POLICIES["short"], model=LONG)}
    with pytest.raises(InputError, match=r"holds another run \([\w ]*short: "):
        Trainer(PROTOCOL, other, TRAIN, TEST, SETTINGS, whole.folder)
    fewer = Environment(TRAIN.name, TRAIN.problems[:9], TRAIN.grader)
    with pytest.raises(InputError, match=r"holds another run \(environment: "):
        Trainer(PROTOCOL, POLICIES, fewer, TEST, SETTINGS, whole.folder)
    assert tree(whole.folder) == before


def test_a_checkpoint_of_another_run(tmp_path: Path, whole: Whole) -> None:
    trainer = build(tmp_path / "run", seed=1)
    shutil.copy(whole.folder / "checkpoint.pt", tmp_path / "run")
    with pytest.raises(InputError) as error:
        next(trainer.train())
    assert str(error.value) == (
        f"{tmp_path / 'run' / 'checkpoint.pt'} is the checkpoint of another run: it differs in settings; remove it, "
        "and the run begins anew"
    )


def test_a_damaged_checkpoint(tmp_path: Path, whole: Whole) -> None:
    folder = tmp_path / "run"
    trainer, path = build(folder), folder / "checkpoint.pt"
    checkpoint = (whole.folder / "checkpoint.pt").read_bytes()
    for damaged in (b"", b"PK", checkpoint[:1000], checkpoint[: len(checkpoint) // 2], checkpoint[:-1], b"none\n" * 9):
        path.write_bytes(damaged)
        with pytest.raises(InputError) as error:
            next(trainer.train())
        assert re.fullmatch(
            rf"{path} must be a whole checkpoint, and is damaged \(\w+\): remove it, and the run begins anew",
            str(error.value),
        )
    older = torch.load(whole.folder / "checkpoint.pt", weights_only=True)
    older["learners"] = older.pop("policies")
    torch.save(older, path)
    with pytest.raises(InputError, match=f"{path} is of another version of turnwise: it has no policies; remove it"):
        next(trainer.train())
    path.unlink()
    reports = trainer.train()
    assert next(reports).figures == whole.reports[0].figures
    reports.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("after", "limit", "complaint"),
    [
        (5, 10_000_000, r"cannot write {}/checkpoint\.pt: .+; make room"),
        (6, 1_000_000, r"cannot write {}/policies/short/r1: .*File too large.*; make room"),
        (4, 0, r"cannot write to {}/metrics\.jsonl: File too large; the last checkpoint is safe: make room"),
    ],
    ids=["checkpoint", "weights", "events"],
)
def test_a_full_disk_costs_no_more_than_what_came_after_the_last_checkpoint(
    tmp_path: Path, whole: Whole, forge: Forge, after: int, limit: int, complaint: str
) -> None:
    folder = tmp_path / "run"
    code, told = forge.run(folder, after=after, limit=limit)
    assert code == 2, told
    assert re.fullmatch(complaint.format(folder) + " and run the same command again", told[-1]), told[-1]
    assert not list(folder.rglob("*.draft"))
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 4 + 2 * (after == 6)
    code, told = forge.run(folder, until=8)
    assert (code, told) == (0, [str(step) for step in range(7 if after == 6 else 5, 9)])
    assert read_metrics(folder) == read_metrics(whole.folder)[:9]
    snapshots = [f"policies/{name}/r1" for name in POLICIES]
    assert [saved(folder / path) for path in snapshots] == [saved(whole.folder / path) for path in snapshots]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(forge_run(json.loads(line))), flush=True)
