"""What was played, to learn from."""

import asyncio
import os
import warnings
from importlib import import_module
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import pytest
import torch

from turnwise.agents.tiny import LONG, ROUTER, SHORT
from turnwise.agents.transformers_agent import TransformersAgent, TransformersEngine
from turnwise.environments.arithmetic import arithmetic
from turnwise.environments.math_grader import MathGrader
from turnwise.protocols.graph import GraphProtocol
from turnwise.protocols.long_short import LongShort
from turnwise.protocols.thinkless import Thinkless
from turnwise.rl.advantage import Sample, assign_credit
from turnwise.rl.rollout import in_order, rollout

# Before Ray is imported: it then listens on the loopback device alone.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

if find_spec("deepspeed") is not None:
    with warnings.catch_warnings():
        # What the compiler says of OpenRLHF's source, the first time.
        warnings.simplefilter("ignore")
        import_module("turnwise.rl.openrlhf.names")


def played(protocol: GraphProtocol, models: dict[str, Path], seat: str, temperature: float = 1.0) -> list[Sample]:
    team = {
        name: TransformersAgent(TransformersEngine.load(path, dtype=torch.float32), temperature=temperature)
        for name, path in models.items()
    }

    async def gather() -> list[Sample]:
        with MathGrader() as grader:
            environment = arithmetic(grader, count=4, split="train")
            episodes = [episode async for episode in rollout(protocol, team, environment, samples=4, seed=1)]
        problems = groupby(in_order(environment, episodes), key=lambda episode: episode.transcript.problem.id)
        groups = [list(group) for _, group in problems]
        return list(assign_credit(groups, [protocol.rewards(group, 1) for group in groups], (seat,)).samples)

    return asyncio.run(gather())


@pytest.fixture(scope="session")
def routed() -> list[Sample]:
    """Of Thinkless: a control token, then a short or a long answer."""
    return played(Thinkless(), {"solver": ROUTER}, "solver")


@pytest.fixture(scope="session")
def turns() -> list[Sample]:
    """Of Long⊗Short: what the other said stands between the turns."""
    return played(LongShort(), {"long": LONG, "short": SHORT}, "long")
