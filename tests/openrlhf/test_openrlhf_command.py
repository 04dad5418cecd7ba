"""`turnwise train` on a Ray cluster, as a user starts it: killed, left by Ray, started again; and without vLLM."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from turnwise.agents.tiny import ROUTER
from turnwise.analysis.audit import audit
from turnwise.rl.episode_store import read_episodes
from turnwise.rl.metrics import read_metrics

pytest.importorskip("deepspeed", reason="needs OpenRLHF: make openrlhf")

from ray.cluster_utils import Cluster

from turnwise.agents.transformers_engine import load_tokenizer

# The files and processes that Ray leaves to the garbage collector when it ends.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning"),
    pytest.mark.filterwarnings("ignore:(unclosed file.*/dev/null|subprocess \\d+ is still running):ResourceWarning"),
]

STEPS = 4
SETTINGS = {
    "backend": "openrlhf", "openrlhf.engine": "transformers", "openrlhf.ranks": 1, "openrlhf.gpus-per-rank": 0,
    "openrlhf.gpus-per-actor": 0, "openrlhf.precision": "fp32", "train": "easy", "test": "easy", "train-problems": 12,
    "test-problems": 4, "short-tokens": 20, "think-tokens": 60, "training.steps": STEPS, "training.problems": 4,
    "training.samples": 4, "training.checkpoint-every": 1, "training.keep-episodes": 1, "training.evaluate-every": 4,
}  # fmt: skip


@contextmanager
def cluster() -> Iterator[str]:
    """The address of a Ray with one node."""
    nodes = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 4, "num_gpus": 0, "object_store_memory": 100_000_000, "include_dashboard": False
        },
    )  # fmt: skip
    try:
        yield nodes.address
    finally:
        nodes.shutdown()


def train(folder: Path, address: str) -> "subprocess.Popen[str]":
    flags = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "turnwise", "train", "thinkless", *flags, "--output", str(folder)]
    return subprocess.Popen(
        [*command, "--ray-address", address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def until_step(folder: Path, step: int, process: "subprocess.Popen[str]") -> None:
    """Waits until a step was logged."""
    while (ended := process.poll()) is None and not logged(folder, step):
        time.sleep(0.05)
    assert logged(folder, step), (ended, process.communicate())


def logged(folder: Path, step: int) -> bool:
    return any(figures["step"] >= step for figures in read_metrics(folder))


def test_a_run_that_is_killed_and_left_by_ray_ends_as_it_should_and_needs_no_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of which all processes of Ray, and the command, have it that vLLM is not installed.
    (tmp_path / "sitecustomize.py").write_text('import sys\n\nsys.modules["vllm"] = None\n')
    source = Path(__file__).parents[2] / "src"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(source)]))
    folder = tmp_path / "run"
    with cluster() as address:
        killed = train(folder, address)
        until_step(folder, 1, killed)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        assert killed.returncode == -signal.SIGKILL
        left = train(folder, address)
        until_step(folder, 2, left)
        left.send_signal(signal.SIGSTOP)  # so that Ray is gone before it has ended
    left.send_signal(signal.SIGCONT)
    _, told = left.communicate(timeout=1800)
    assert left.returncode != 0, told
    with cluster() as address:
        last = train(folder, address)
        printed, told = last.communicate()
    assert last.returncode == 0, told
    metrics = read_metrics(folder)
    assert [figures["step"] for figures in metrics] == list(range(STEPS + 1)), printed
    for step in range(1, STEPS + 1):
        store = folder / "episodes" / f"{step:06}" / "episodes.jsonl"
        found = audit(read_episodes(store), load_tokenizer(ROUTER))
        assert (found.episodes, found.failed_episodes, found.faults) == (16, 0, ())
        assert metrics[step]["solver/engine_mismatch"] < 1e-4
