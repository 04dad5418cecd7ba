"""The trainer on OpenRLHF: two policies, one protocol, and a run that is stopped."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from turnwise.agents.tiny import LONG, SHORT
from turnwise.analysis.audit import audit
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.math_grader import MathGrader
from turnwise.protocols.long_short import LongShort
from turnwise.rl.episode_store import read_episodes
from turnwise.rl.learner import LearnerSettings
from turnwise.rl.trained_policy import Policy
from turnwise.rl.trainer import Trainer, TrainingSettings

pytest.importorskip("deepspeed", reason="needs OpenRLHF: make openrlhf")

import ray

from turnwise.agents.transformers_engine import load_tokenizer
from turnwise.rl.openrlhf.policy import OpenRLHFBackend, OpenRLHFPolicy
from turnwise.rl.openrlhf.settings import OpenRLHFSettings

# What Ray says when it starts, and the files and processes that it leaves to the garbage collector when it ends; and
# what vLLM imports of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning"),
    pytest.mark.filterwarnings("ignore:(unclosed file.*/dev/null|subprocess \\d+ is still running):ResourceWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

MODELS = {"long": LONG, "short": SHORT}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        "local", num_cpus=8, num_gpus=0, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000
    )
    yield
    ray.shutdown()


@contextmanager
def opened(folder: Path, grader: MathGrader) -> Iterator[Trainer]:
    on_cpu = OpenRLHFBackend(OpenRLHFSettings(gpus_per_rank=0, precision="fp32", gpus_per_actor=0, cache_gigabytes=0.2))
    learner = LearnerSettings(learning_rate=1e-4, micro_batch_size=8)
    policies = {seat: Policy(model, (seat,), learner) for seat, model in MODELS.items()}
    settings = TrainingSettings(
        rounds="long+short", steps=3, problems=4, samples=4, evaluate_every=3, checkpoint_every=1, keep_episodes=1
    )
    train = arithmetic(grader, problem_set="mixed", count=12, seed=1)
    test = arithmetic(grader, problem_set="mixed", count=6, seed=2)
    trainer = Trainer(
        LongShort(long_tokens=120, short_tokens=40), policies, train, test, settings, folder, backend=on_cpu
    )
    try:
        yield trainer
    finally:
        for trained in trainer.trained.values():
            assert isinstance(trained, OpenRLHFPolicy)
            trained.close()


def test_two_policies_learn_are_stopped_and_go_on(cluster: None, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with MathGrader() as grader:
        with opened(folder, grader) as trainer:
            reports = trainer.train()
            first = [next(reports) for _ in range(3)]  # the first evaluation, and two steps
            reports.close()  # type: ignore[attr-defined]
        with opened(folder, grader) as trainer:
            rest = list(trainer.train())
            versions = {name: trained.engine.version for name, trained in trainer.trained.items()}
    assert [report.step for report in first + rest] == [0, 1, 2, 3]
    assert versions == {"long": 3, "short": 3}
    for report in (*first[1:], *rest):
        for name in MODELS:
            assert report.figures[f"{name}/engine_mismatch"] < 1e-4, "the engine samples from other weights"
            assert report.figures[f"{name}/trained_tokens"] > 0
    for name, model in MODELS.items():
        before, after = (load_file(path / "model.safetensors") for path in (model, folder / "policies" / name / "r1"))
        assert any(not torch.equal(before[key].float(), after[key].float()) for key in before)
    stores = sorted((folder / "episodes").glob("*"))
    assert [store.name for store in stores] == ["000001", "000002", "000003"]
    for store in stores:
        found = audit(read_episodes(store / "episodes.jsonl"), load_tokenizer(LONG))
        assert (found.episodes, found.faults) == (16, ())
