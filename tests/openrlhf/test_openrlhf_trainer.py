"""The trainer on OpenRLHF: two policies, one protocol, all arrangements; what dies is replaced, what stops goes on."""

import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from turnwise.agents.tiny import LONG, ROUTER, SHORT
from turnwise.analysis.audit import audit
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.errors import InputError
from turnwise.environments.math_grader import MathGrader
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.advantage import assign_credit
from turnwise.rl.episode_store import read_episodes
from turnwise.rl.learner import LearnerSettings
from turnwise.rl.loss import LossSettings
from turnwise.rl.metrics import read_metrics
from turnwise.rl.trained_policy import Policy
from turnwise.rl.trainer import Trainer, TrainingSettings

pytest.importorskip("deepspeed", reason="needs OpenRLHF: make openrlhf")

import ray
from ray.cluster_utils import Cluster

from turnwise.agents.transformers_engine import load_tokenizer
from turnwise.rl.openrlhf.policy import OpenRLHFBackend, OpenRLHFPolicy
from turnwise.rl.openrlhf.rollout_engine import RolloutEngine
from turnwise.rl.openrlhf.settings import OpenRLHFSettings

# What Ray says when it starts, and the files and processes that it leaves to the garbage collector when it ends; and
# what vLLM imports of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning"),
    pytest.mark.filterwarnings("ignore:(unclosed file.*/dev/null|subprocess \\d+ is still running):ResourceWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

# The workers of Ray have the functions below by value: they cannot import a test.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

MODELS = {"long": LONG, "short": SHORT}
ON_CPU = OpenRLHFSettings(gpus_per_rank=0, precision="fp32", gpus_per_actor=0, cache_gigabytes=0.2)
BY_TRANSFORMERS = ON_CPU.model_copy(update={"engine": "transformers"})
PROTOCOL = LongShort(long_tokens=120, short_tokens=40)
LEARNER = LearnerSettings(learning_rate=1e-4, loss=LossSettings(importance_cap=2.0))
SETTINGS = TrainingSettings(
    rounds="long+short", steps=3, problems=4, samples=4, evaluate_every=3, checkpoint_every=1, keep_episodes=1
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two nodes, as Ray has it."""
    node = {"num_cpus": 4, "num_gpus": 0, "object_store_memory": 100_000_000}
    nodes = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    nodes.add_node(**node)
    ray.init(address=nodes.address, log_to_driver=False)
    yield
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    with MathGrader() as opened:
        yield opened


def long_short(folder: Path, grader: MathGrader, models: Mapping[str, Path] = MODELS, **changes: object) -> Trainer:
    """Two policies."""
    settings = SETTINGS.model_copy(update=changes)
    return Trainer(
        PROTOCOL,
        {seat: Policy(model, (seat,), LEARNER) for seat, model in models.items()},
        arithmetic(grader, problem_set="mixed", count=12, seed=1),
        arithmetic(grader, problem_set="mixed", count=6, seed=2),
        settings,
        folder,
        backend=OpenRLHFBackend(ON_CPU, interrupts=settings.staleness > 0),
    )


def thinkless(folder: Path, grader: MathGrader, openrlhf: OpenRLHFSettings, **changes: object) -> Trainer:
    """One policy."""
    return Trainer(
        Thinkless(short_tokens=20, think_tokens=200),
        {"solver": Policy(ROUTER, ("solver",), LEARNER)},
        arithmetic(grader, problem_set="easy", count=12, seed=1),
        arithmetic(grader, problem_set="easy", count=6, seed=2),
        SETTINGS.model_copy(update={"rounds": "solver", **changes}),
        folder,
        backend=OpenRLHFBackend(openrlhf),
    )


def of(trainer: Trainer, name: str) -> OpenRLHFPolicy:
    trained = trainer.trained[name]
    assert isinstance(trained, OpenRLHFPolicy)
    return trained


def assert_sound(folder: Path, steps: int, *, tokenizer: Path) -> None:
    """Each step was logged once, and has all of its episodes, each once, by the audit."""
    assert [figures["step"] for figures in read_metrics(folder)] == list(range(steps + 1))
    stores = sorted((folder / "episodes").glob("*"))
    assert [store.name for store in stores] == [f"{step:06}" for step in range(1, steps + 1)]
    for store in stores:
        found = audit(read_episodes(store / "episodes.jsonl"), load_tokenizer(tokenizer))
        assert (found.episodes, found.failed_episodes, found.faults) == (16, 0, ())


def assert_engines_sample_from_what_was_learnt(folder: Path, names: list[str]) -> None:
    for figures in read_metrics(folder)[1:]:
        for name in names:
            assert figures[f"{name}/engine_mismatch"] < 1e-4
            assert figures[f"{name}/trained_tokens"] > 0


def test_two_policies_learn_are_stopped_and_go_on(cluster: None, grader: MathGrader, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with long_short(folder, grader) as trainer:
        reports = trainer.train()
        assert next(reports).step == 0  # the first evaluation
        learners = [of(trainer, name)._learner for name in MODELS]
        for learner in learners:
            learner._all(learner._policy, "__ray_call__", _count_sequences)
        first = [next(reports).step for _ in range(2)]
        computed = [learner._all(learner._policy, "__ray_call__", _counted)[0] for learner in learners]
        reports.close()  # type: ignore[attr-defined]
    with long_short(folder, grader) as trainer:
        assert first + [report.step for report in trainer.train()] == [1, 2, 3]
        assert {name: trained.engine.version for name, trained in trainer.trained.items()} == {"long": 3, "short": 3}
    assert_engines_sample_from_what_was_learnt(folder, ["long", "short"])
    assert_sound(folder, 3, tokenizer=LONG)
    # Each policy computed its own samples that teach something, once, and none of the other's.
    assert computed == [sum(taught(folder, step, name) for step in (1, 2)) for name in MODELS]
    for name, model in MODELS.items():
        saved = folder / "policies" / name / "r1"
        assert load_tokenizer(saved).backend_tokenizer.to_str() == load_tokenizer(model).backend_tokenizer.to_str()
        before, after = (load_file(path / "model.safetensors") for path in (model, saved))
        assert any(not torch.equal(before[key].float(), after[key].float()) for key in before)


def taught(folder: Path, step: int, seat: str) -> int:
    """How many of a seat's sequences of a step have an advantage."""
    by_problem = attrgetter("transcript.problem.id")
    episodes = sorted(read_episodes(folder / "episodes" / f"{step:06}" / "episodes.jsonl"), key=by_problem)
    groups = [list(group) for _, group in groupby(episodes, key=by_problem)]
    samples = assign_credit(groups, [PROTOCOL.rewards(group, step) for group in groups], (seat,)).samples
    return sum(any(sample.advantages) for sample in samples)


def _count_sequences(rank: Any) -> None:  # noqa: ANN401
    rank.sequences = 0

    def count(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        rank.sequences += len(inputs[0])

    rank.actor.register_forward_pre_hook(count)


def _counted(rank: Any) -> int:  # noqa: ANN401
    return int(rank.sequences)


@pytest.fixture(scope="module")
def short_of_other_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short model with 8 tokens more, the first of them in its tokenizer."""
    folder = tmp_path_factory.mktemp("short")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(SHORT), load_tokenizer(SHORT)
    assert tokenizer.add_tokens(["quite"]) == 1
    model.resize_token_embeddings(len(tokenizer) + 7)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_episodes_go_on_over_the_updates_of_two_tokenizers(
    cluster: None, grader: MathGrader, tmp_path: Path, short_of_other_tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    interrupts = list[bool]()
    update = RolloutEngine.update

    async def seen(engine: RolloutEngine, *weights: object, interrupt: bool = False, **rest: object) -> None:
        interrupts.append(interrupt)
        await update(engine, *weights, interrupt=interrupt, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(RolloutEngine, "update", seen)
    with long_short(folder, grader, {"long": LONG, "short": short_of_other_tokens}, staleness=1) as trainer:
        assert [report.step for report in trainer.train()] == [0, 1, 2, 3]
    assert_sound(folder, 3, tokenizer=LONG)
    logged = read_metrics(folder)[1:]
    assert [figures["long/staleness/most"] for figures in logged] == [0, 1, 1]
    stores = (folder / "episodes" / f"{step:06}" / "episodes.jsonl" for step in (2, 3))
    replies = [s.reply for store in stores for episode in read_episodes(store) for s in episode.transcript.steps]
    assert all(list(reply.versions) == sorted(reply.versions) for reply in replies)
    assert any(interrupts), "no update left replies running"


@pytest.mark.parametrize("arrangement", ["colocated", "transformers"])
def test_one_policy_in_other_arrangements(cluster: None, grader: MathGrader, tmp_path: Path, arrangement: str) -> None:
    """Both sleeping in turns, with two ranks and two engines, and without vLLM."""
    folder = tmp_path / "run"
    colocated = {"colocated": True, "ranks": 2, "actors": 2, "zero_stage": 3}
    changes = colocated if arrangement == "colocated" else {"engine": "transformers"}
    with thinkless(folder, grader, ON_CPU.model_copy(update=changes), steps=2) as trainer:
        assert [report.step for report in trainer.train()] == [0, 1, 2]
    assert_engines_sample_from_what_was_learnt(folder, ["solver"])
    assert_sound(folder, 2, tokenizer=ROUTER)


# Faults


def kill_while_it_answers(policy: OpenRLHFPolicy, pid: int) -> threading.Thread:
    """Kills a process of an engine as soon as turns wait for its answers."""

    def kill() -> None:
        while not policy.engine.waits_for():
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_what_dies_is_replaced_and_no_episode_is_lost(
    cluster: None, grader: MathGrader, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """First an engine, while it samples; then a rank, which takes all policies back to the last checkpoint."""
    folder = tmp_path / "run"
    with long_short(folder, grader) as trainer:
        reports = trainer.train()
        assert next(reports).step == 0
        (engine,) = ray.get([actor.__ray_call__.remote(_pid) for actor in of(trainer, "long").engine.actors])
        killer = kill_while_it_answers(of(trainer, "long"), engine)
        assert next(reports).step == 1
        killer.join()
        assert caplog.messages == []
        rank = of(trainer, "short")._learner._policy._actor_handlers[0]
        os.kill(ray.get(rank.__ray_call__.remote(_pid)), signal.SIGKILL)
        assert [report.step for report in reports] == [2, 3]
    (told,) = caplog.messages
    assert told.startswith(f"a rank that trains {SHORT} died in ")
    assert told.endswith("all policies are opened anew, and the run goes on from its last checkpoint")
    assert_engines_sample_from_what_was_learnt(folder, ["long", "short"])
    assert_sound(folder, 3, tokenizer=LONG)


def _pid(_: object) -> int:
    return os.getpid()


def _fill_the_disk(_: object) -> None:
    """From now on the process can write no file of more than 100 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def test_a_full_disk_costs_what_came_after_the_last_checkpoint_and_who_is_waited_for_is_told(
    cluster: None, grader: MathGrader, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    with thinkless(folder, grader, BY_TRANSFORMERS, deadline=0.02) as trainer:
        reports = trainer.train()
        assert [next(reports).step for _ in range(2)] == [0, 1]
        (rank,) = of(trainer, "solver")._learner._policy._actor_handlers
        ray.get(rank.__ray_call__.remote(_fill_the_disk))
        with pytest.raises(InputError, match=r"^cannot write .*checkpoint\.pt: .*; make room and run the same") as told:
            next(reports)
        assert "\n" not in str(told.value)
    for told_late in (
        r"^the rollout of step 1 has taken \d+ s; it waits for solver: \d+ turn\(s\) for actor 0 of .*, up to \d+ s$",
        r"^the update of step 1 has taken \d+ s; it waits for solver: rank\(s\) \[0\] of 1 for 'learn'$",
    ):
        assert any(re.search(told_late, message) for message in caplog.messages), caplog.messages[:20]
    with thinkless(folder, grader, BY_TRANSFORMERS) as trainer:
        assert [report.step for report in trainer.train()] == [2, 3]
    assert_sound(folder, 3, tokenizer=ROUTER)
